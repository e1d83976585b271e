"""Static cost of the TPU attention kernels, ours beside JAX's own, with no TPU.

    python -m tilescan.benchmarks.tpu_static  # writes results/benchmarks/tpu_static.json
    python -m tilescan.benchmarks.tpu_static --sweep  # tiles, for block_sizes.py
    python -m tilescan.benchmarks.tpu_static --generations v6e --kernels forward

The figures are those of libtpu's static profile (planning/aot_tpu.py): NOTHING HERE RAN ON A
DEVICE. They rank kernels within one generation; they are not times. `bound` is the larger of the
cycles and of the bytes moved over the memory's bandwidth, in cycles: the profile gives every
transfer the whole bandwidth. `MXU` is the share of the peak of the matrix unit that useful
operations (2 per visible score, product and head dimension) reach in `bound` cycles.

The profiler takes values from memory for 0, so masks that use tables can't be profiled. Their
rows ("estimated") are the cycles of one live tile, full or partial, taken from the profiled Full
and Causal walks with the same tile, times the live tiles, counted exactly.

Dimensions: B batch, T query time, S key time, H heads, G key-value heads, D head dim.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from tilescan.ops import attention_tpu, masks
from tilescan.pallas_kernels import tiles
from tilescan.pallas_kernels.tpu import flash_attention as kernels
from tilescan.planning import chips
from tilescan.planning.aot_tpu import PROFILED, Job, available, compile_jobs

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks" / "tpu_static.json"
SHAPE = {"B": 1, "T": 4096, "H": 2, "D": 128}
KERNELS = ("forward", "dq", "dkv")
# Per core: bytes per second of HBM (the vendor's, rounded), clock, and cores that share a kernel's
# parallel axes. The clock is inferred from the peak and the profiled multiplications per cycle.
CHIPS = {
    "v5e": {"bandwidth": 0.82e12, "clock": 1.5e9, "cores": 1},
    "v5p": {"bandwidth": 2.77e12 / 2, "clock": 1.75e9, "cores": 2},
    "v6e": {"bandwidth": 1.64e12, "clock": 1.75e9, "cores": 1},
}
MASKS = {
    "full": lambda T: masks.Full(),
    "causal": lambda T: masks.Causal(),
    "window 512": lambda T: masks.SlidingWindow(511),
    "sinks 4 + window 512": lambda T: masks.Lambda(4, 512),
    "butterfly of 512": lambda T: masks.BlockSparse(masks.butterfly(T // 512), 512),
    "causal, 4 segments": lambda T: masks.Causal() & masks.Segments(np.arange(T)[None, :] * 4 // T),
}
PROFILED_MASKS = ("full", "causal", "window 512")
# (block_q, block_k_major, block_k). Backward steps beyond 512 take libtpu minutes and gigabytes.
STOCK_FORWARD = ((512, 1024, 512), (1024, 1024, 512), (1024, 1024, 1024))
STOCK_BACKWARD = ((512, 512, 512), (512, 1024, 512))
SWEEP = {
    "forward": ((512, 1024, 512), (1024, 1024, 512), (1024, 2048, 512), (1024, 2048, 1024)),
    "dq": ((512, 1024, 512), (1024, 1024, 512), (1024, 2048, 512), (1024, 1024, 256)),
    "dkv": ((1024, 512, 512), (1024, 1024, 512), (2048, 512, 512), (2048, 1024, 512)),
}
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "backward": 7}


# Jobs, called in the worker: (function, its arguments' shapes).

Program = tuple[Callable, tuple]
Sides = Sequence[int]  # of a tile: queries, keys, compute step


def public(
    gradient: bool,
    B: int = 1,
    T: int = 1024,
    S: int = 1024,
    H: int = 2,
    G: int = 1,
    D: int = 64,
    mask: str = "causal",
    dtype: str = "bfloat16",
    **options: Any,
) -> Program:
    """Returns the public op, or its gradient, as a user's program calls it."""
    from tilescan.ops.attention import attention

    spec = jax.ShapeDtypeStruct
    segments, offset = spec((B, T), jnp.int32), spec((), jnp.int32)
    q, k = spec((B, T, H, D), dtype), spec((B, S, G, D), dtype)
    bias = spec((1, H, T, S), jnp.float32) if options.pop("bias", False) else None
    traced = options.pop("traced_offset", False)

    def forward(q, k, v, bias, segments, offset):
        seen = masks.Causal() & masks.Segments(segments) if mask == "packed" else MASKS[mask](S)
        return attention(
            q, k, v, mask=seen, bias=bias, q_offset=offset if traced else None, **options
        )

    def loss(q, k, v, *rest):
        return jnp.sum(forward(q, k, v, *rest).astype(jnp.float32) ** 2)

    function = jax.grad(loss, argnums=(0, 1, 2)) if gradient else forward
    return function, (q, k, k, bias, segments, offset)


def ours(
    kernel: str,
    mask: str,
    tile: Sides | None,
    B: int,
    T: int,
    H: int,
    D: int,
    vmem_limit: int | None = attention_tpu.VMEM_LIMIT,
) -> Program:
    """Returns one kernel of ours, on arrays as the kernel takes them."""
    plan = _plan(kernel, mask, tile, B, T, H, D)
    spec = jax.ShapeDtypeStruct
    x, row = spec((B, H, T, D), jnp.bfloat16), spec((B, H, 1, T), jnp.float32)
    walk = (plan.schedule, plan.tile, plan.scores(D**-0.5, None))
    options = {"vmem_limit": vmem_limit}
    if kernel == "forward":
        return lambda q, k, v: kernels.forward(q, k, v, *walk, **options), (x, x, x)
    backward = kernels.backward_dq if kernel == "dq" else kernels.backward_dkv
    return lambda *arrays: backward(*arrays, *walk, **options), (x, x, x, x, row, row)


def stock(kernel: str, mask: str, tile: Sides, B: int, T: int, H: int, D: int) -> Program:
    """Returns JAX's TPU flash attention: its forward kernel, or the whole gradient."""
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    q, major, k = tile
    sizes = BlockSizes(
        block_b=1, block_q=q, block_k_major=major, block_k=k,
        block_q_major_dkv=q, block_q_dkv=q, block_k_major_dkv=major, block_k_dkv=k,
        block_q_dq=q, block_k_major_dq=major, block_k_dq=k,
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((B, H, T, D), jnp.bfloat16)

    def forward(q, k, v):
        return flash_attention(
            q, k, v, causal=mask == "causal", sm_scale=D**-0.5, block_sizes=sizes
        )

    if kernel == "forward":
        return forward, (x, x, x)

    def gradient(q, k, v, do):
        return jax.vjp(forward, q, k, v)[1](do)

    return gradient, (x, x, x, x)


def splash(kernel: str, mask: str, tile: Sides, B: int, T: int, H: int, D: int) -> Program:
    """Returns JAX's splash attention, forward: the profiler aborts on it, so its instructions are
    counted.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as sk
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as sm

    q, major, k = tile
    window = {"causal": (None, 0), "window 512": (511, 0)}[mask]
    head = sm.CausalMask((T, T)) if window[0] is None else sm.LocalMask((T, T), window, 0)
    attention = sk.make_splash_mha(
        sm.MultiHeadMask([head] * H), head_shards=1, q_seq_shards=1,
        block_sizes=sk.BlockSizes(block_q=q, block_kv=major, block_kv_compute=k),
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((H, T, D), jnp.bfloat16)
    return lambda q, k, v: attention(q, k, v), (x, x, x)


# Figures that need no compiler.


def _plan(kernel, mask, tile, B, T, H, D):
    x = jax.ShapeDtypeStruct((B, T, H, D), jnp.bfloat16)
    tile = None if tile is None else kernels.Tile(*tile)
    return attention_tpu.plan_for(kernel, x, x, x, MASKS[mask](T), 0, tile)


def live_tiles(mask: str, tile: Sides, T: int) -> dict[str, int]:
    """Returns how many tiles of a batch row and head are full and partial."""
    kinds = masks.tile_kinds(MASKS[mask](T), T, T, tile[0], tile[1], 0)
    return {
        "full": int((kinds == tiles.FULL).sum()),
        "partial": int((kinds == tiles.PARTIAL).sum()),
    }


def transfers(kernel: str, mask: str, tile: Sides | None, B: int, T: int, H: int, D: int) -> int:
    """Returns the bytes that one kernel of ours moves, by the pipeline's rule: a block is fetched
    when its index differs from the step before.
    """
    plan = _plan(kernel, mask, tile, B, T, H, D)
    outer = plan.keys if kernel == "dkv" else plan.queries
    inner = plan.queries if kernel == "dkv" else plan.keys
    steps = jnp.arange(plan.schedule.steps)[None, :]
    walk, _ = plan.schedule.lookup(0, jnp.arange(outer.tiles)[:, None], steps, plan.schedule.tables)
    walk = np.broadcast_to(np.asarray(walk), (outer.tiles, plan.schedule.steps)).ravel()
    fetches = 1 + int((np.diff(walk) != 0).sum())
    row, statistic = 2 * D, 4  # bytes of a vector of bfloat16, and of a row's statistic
    fixed = {
        "forward": outer.padded * (2 * row + statistic),  # q, o, lse
        "dq": outer.padded * (3 * row + 2 * statistic),  # q, do, dq, lse, delta
        "dkv": outer.padded * 4 * row,  # k, v, dk, dv
    }[kernel]
    walked = fetches * inner.block * (2 * row + (2 * statistic if kernel == "dkv" else 0))
    return B * H * (fixed + walked)


def visible_scores(mask: str, T: int) -> int:
    """Returns how many scores a mask lets through, of T x T."""
    if mask == "full":
        return T * T
    return int(masks.as_array(MASKS[mask](T), T, T, 0).sum())


# The table.


@dataclasses.dataclass
class Row:
    """A row of the table; see the module's text."""

    implementation: str
    kernel: str
    mask: str
    generation: str
    tile: list[int]
    source: str  # "static profile", "estimated", "instructions only" or why there is no figure
    cycles: int | None = None
    bytes: int | None = None
    bandwidth_cycles: int | None = None
    bound: int | None = None
    mxu_share: float | None = None
    vmem: int | None = None
    bundles: int | None = None
    spills: int | None = None
    live: dict | None = None
    shape: dict = dataclasses.field(default_factory=lambda: dict(SHAPE))


def _finish(row: Row) -> Row:
    """Fills in what follows from cycles and bytes."""
    chip, shape = CHIPS[row.generation], row.shape
    if row.bytes is not None:
        row.bandwidth_cycles = round(row.bytes / chip["cores"] / chip["bandwidth"] * chip["clock"])
    if row.cycles is not None:
        row.bound = max(row.cycles, row.bandwidth_cycles or 0)
        scores = shape["B"] * shape["H"] * visible_scores(row.mask, shape["T"])
        operations = 2 * shape["D"] * PRODUCTS[row.kernel] * scores / chip["cores"]
        peak = chips.CHIPS[row.generation].flops / chip["cores"]
        row.mxu_share = round(operations / (row.bound / chip["clock"] * peak), 4)
    return row


def _measured(row: Row, result: dict) -> Row:
    for key in ("error", "not_modelled"):
        if key in result:
            row.source = f"{key.replace('_', ' ')}: {result[key][:160]}"
            return row
    names = set(result["custom_calls"])
    if row.kernel == "backward":  # the gradient's program holds the forward kernel as well
        names = {name for name in names if "bwd" in name or "dkv" in name or "dq" in name}
    cycles = [result["cycles"][name] for name in names if name in result.get("cycles", {})]
    row.cycles = sum(cycles) if cycles else None
    row.vmem = result["vmem"]
    counts = [
        c for n, c in result.get("bundles", {}).items() if any(m.startswith(n) for m in names)
    ]
    if counts:
        row.bundles = sum(c.get("bundles", 0) for c in counts)
        row.spills = sum(c.get("VSTORE:SPILL", 0) for c in counts)
    if row.implementation == "tilescan":
        row.bytes = transfers(row.kernel, row.mask, row.tile, **row.shape)
        row.live = live_tiles(row.mask, row.tile, row.shape["T"])
    return _finish(row)


def _run(rows: list[Row], generation: str, console, *, profile=True, bundles=True) -> list[Row]:
    target = {"tilescan": "ours", "jax flash": "stock", "jax splash": "splash"}
    jobs = [
        Job(
            f"tilescan.benchmarks.tpu_static:{target[row.implementation]}",
            {"kernel": row.kernel, "mask": row.mask, "tile": row.tile, **row.shape},
        )
        for row in rows
    ]
    with console.status(f"{generation}: {len(jobs)} compilations"):
        results = compile_jobs(jobs, generation, profile=profile, bundles=bundles)
    for row, result in zip(rows, results, strict=True):
        _measured(row, result)
        console.print(
            generation, row.implementation, row.kernel, row.mask, row.tile, row.cycles, row.source
        )
    return rows


def default_tile(
    kernel: str, generation: str, mask: str, shape: dict[str, int] = SHAPE
) -> list[int]:
    """Returns the tile that the op takes for a kernel."""
    del generation  # one table for all of them
    spec = jax.ShapeDtypeStruct((shape["B"], shape["T"], shape["H"], shape["D"]), jnp.bfloat16)
    plan = attention_tpu.plan_for(kernel, spec, spec, spec, MASKS[mask](shape["T"]), 0)
    return list(dataclasses.astuple(plan.tile))


def table_rows(generation: str, kernels_: tuple[str, ...], console: Console) -> list[Row]:
    """Returns all rows of one generation, which it compiles."""
    row = lambda name, kernel, mask, tile, source="static profile": Row(
        name, kernel, mask, generation, list(tile), source
    )
    # Ours, profiled and estimated.
    found = []
    for mask in PROFILED_MASKS:
        own = [row("tilescan", k, mask, default_tile(k, generation, mask)) for k in kernels_]
        found += _run(own, generation, console)
    found += estimates(generation, kernels_, console)
    # JAX's flash attention, with the best of some tiles.
    for mask in ("full", "causal"):
        if "forward" in kernels_:
            candidates = [row("jax flash", "forward", mask, tile) for tile in STOCK_FORWARD]
            found.append(_best(_run(candidates, generation, console, bundles=False)))
        if "dq" in kernels_ and "dkv" in kernels_:
            candidates = [row("jax flash", "backward", mask, tile) for tile in STOCK_BACKWARD]
            found.append(_best(_run(candidates, generation, console, bundles=False)))
            if found[-1].cycles is None:
                found += one_head(generation, mask, console)
    # JAX's splash attention and ours, by counts of instructions.
    if "forward" in kernels_:
        for mask in ("causal", "window 512"):
            tile = (512, 512, 512)
            pair = [row(name, "forward", mask, tile, "instructions only")
                    for name in ("tilescan", "jax splash")]  # fmt: skip
            _run(pair, generation, console, profile=False)
            pair[1].live = pair[0].live
            found += pair
    return found


def one_head(generation: str, mask: str, console: Console) -> list[Row]:
    """Returns both backward passes of one head, where the profiler has no model for what XLA does
    around the stock kernels of two.
    """
    shape = SHAPE | {"H": 1}
    row = lambda name, kernel, tile: Row(
        name, kernel, mask, generation, list(tile), "static profile", shape=shape
    )
    own = [row("tilescan", k, default_tile(k, generation, mask, shape)) for k in ("dq", "dkv")]
    stock_rows = [row("jax flash", "backward", tile) for tile in STOCK_BACKWARD]
    found = _run(own, generation, console)
    return [*found, _best(_run(stock_rows, generation, console, bundles=False))]


def estimates(generation: str, kernels_: tuple[str, ...], console: Console) -> list[Row]:
    """Returns rows of the masks that use tables, and the profiled rows that they are made from."""
    rows, bases = [], {}
    for kernel in kernels_:
        for mask in MASKS:
            if mask not in PROFILED_MASKS:
                tile = default_tile(kernel, generation, mask)
                rows.append(Row("tilescan", kernel, mask, generation, tile, "estimated"))
                for base in ("full", "causal"):
                    source = "static profile, for estimates"
                    bases[kernel, base, tuple(tile)] = Row(
                        "tilescan", kernel, base, generation, tile, source
                    )
    _run(list(bases.values()), generation, console, bundles=False)
    for row in rows:
        _estimate(row, *(bases[row.kernel, base, tuple(row.tile)] for base in ("full", "causal")))
    return [*bases.values(), *rows]


def _best(rows: list[Row]) -> Row:
    return min(rows, key=lambda row: row.cycles or float("inf"))


def _estimate(row: Row, full: Row, causal: Row) -> None:
    """Fills in cycles of a mask that uses tables, from Full's and Causal's with the same tile."""
    if full.cycles is None or causal.cycles is None:
        row.source = "no profile to estimate from"
        return
    per_full = full.cycles / full.live["full"]
    # A partial tile costs what Causal's walk has left over.
    per_partial = (causal.cycles - causal.live["full"] * per_full) / causal.live["partial"]
    row.live = live_tiles(row.mask, row.tile, row.shape["T"])
    row.cycles = round(row.live["full"] * per_full + row.live["partial"] * per_partial)
    row.bytes = transfers(row.kernel, row.mask, row.tile, **row.shape)
    _finish(row)


def _print(rows: list[Row], console) -> None:
    table = Table(title="TPU attention, static figures: nothing ran on a device")
    heads = ("gen", "kernel", "mask", "H", "implementation", "tile", "cycles", "bytes/bw", "bound",
             "MXU", "VMEM MiB", "bundles", "spills", "live full+partial", "source")  # fmt: skip
    for head in heads:
        table.add_column(head)
    show = lambda x: "-" if x is None else f"{x:,}" if isinstance(x, int) else str(x)
    for r in sorted(
        rows, key=lambda r: (r.generation, r.mask, r.shape["H"], r.kernel, r.implementation)
    ):
        table.add_row(
            r.generation, r.kernel, r.mask, str(r.shape["H"]), r.implementation,
            "/".join(map(str, r.tile)),
            show(r.cycles), show(r.bandwidth_cycles), show(r.bound),
            "-" if r.mxu_share is None else f"{r.mxu_share:.0%}",
            "-" if r.vmem is None else f"{r.vmem / 2**20:.1f}", show(r.bundles), show(r.spills),
            "-" if r.live is None else f"{r.live['full']}+{r.live['partial']}", r.source,
        )  # fmt: skip
    console.print(table)


def versions() -> dict[str, str]:
    """Returns the versions of JAX, libtpu and Python, and the commit."""
    from importlib.metadata import version

    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=root
    ).stdout.strip()
    return {
        "jax": jax.__version__,
        "libtpu": version("libtpu"),
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def sweep(generations: Iterable[str], names: Iterable[str], console: Console) -> list[Row]:
    """Returns rows of our kernels with each tile of SWEEP, which it compiles."""
    rows = []
    for generation in generations:
        for kernel in names:
            for mask in ("full", "causal"):
                tried = [
                    Row("tilescan", kernel, mask, generation, list(tile), "static profile")
                    for tile in SWEEP[kernel]
                ]
                rows += _run(tried, generation, console, bundles=False)
    return rows


def main() -> None:
    """Compiles the table or the sweep that the command line asks for, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sweep", action="store_true", help="try many tiles; writes nothing")
    parser.add_argument("--generations", default=",".join(PROFILED))
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not available():
        parser.error('libtpu is not installed; pip install "tilescan[dev]" brings it')
    console = Console(width=200)
    generations, names = arguments.generations.split(","), tuple(arguments.kernels.split(","))
    if arguments.sweep:
        _print(sweep(generations, names, console), console)
        return
    rows = [row for generation in generations for row in table_rows(generation, names, console)]
    _print(rows, console)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "note": "static figures of libtpu's compiler; nothing ran on a device",
        "versions": versions(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
