"""Static cost of the chunked scans on TPUs, the kernels beside XLA's own program, with no TPU.

    python -m tilescan.benchmarks.chunked_scans_tpu_static  # writes the committed table
    python -m tilescan.benchmarks.chunked_scans_tpu_static --ops ssd --generations v5e
    python -m tilescan.benchmarks.chunked_scans_tpu_static --sweep  # for pallas_kernels/tpu/ssd.py

A row takes ten seconds to some minutes. It is written as soon as it is known, in place of an older
one. Time is short, 1,024 steps of eight chunks: of longer ones the profiler has no model for some
of the copies in the gradients, or takes over half an hour.

The figures are those of libtpu's static profile (planning/aot_tpu.py): NOTHING HERE RAN ON A
DEVICE. They rank programs within one generation; they are not times. Both columns are the whole
compiled program of the public op, with its copies and paddings; an operation in a loop counts as
often as the loop runs. `bytes` is what XLA says that the program reads and writes (of a loop's body
once), `bandwidth_cycles` these over the memory's bandwidth, and `bound` the larger of the two
counts of cycles: the profile gives every transfer the whole bandwidth. On v5p the cycles are those
of one of a chip's two cores, between which only the kernels are split.

Dimensions: B batch, T time, H heads, G groups of heads, D key or state dim, P value dim.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from tilescan.benchmarks.tpu_static import CHIPS, versions
from tilescan.planning.aot_tpu import PROFILED, Job, available, compile_jobs

RESULTS = (
    Path(__file__).resolve().parent.parent
    / "results"
    / "benchmarks"
    / "chunked_scans_tpu_static.json"
)
SHAPES = {
    "ssd": {"B": 1, "T": 1024, "H": 16, "G": 1, "D": 128, "P": 64},
    "scalar": {"B": 1, "T": 1024, "H": 8, "D": 64, "P": 64},
    "vector": {"B": 1, "T": 1024, "H": 8, "D": 64, "P": 64},
}
NAMES = {
    "ssd": "ssd",
    "scalar": "gated_linear_attention, scalar decay",
    "vector": "gated_linear_attention, vector decay",
}
HEADS = (
    "generation", "op", "direction", "implementation", "cycles", "kernel_cycles",
    "bandwidth_cycles", "bound", "bytes", "temp_bytes", "vmem", "source",
)  # fmt: skip
SWEEP = ((128, 2), (128, 4), (128, 8), (256, 2), (256, 4))


# Jobs, called in the worker.


def public(
    op: str,
    gradient: bool,
    implementation: str | None,
    B: int = 1,
    T: int = 8192,
    H: int = 8,
    G: int | None = None,
    D: int = 64,
    P: int = 64,
    dtype: str = "bfloat16",
    **options: Any,
) -> tuple[Callable, tuple]:
    """Returns the public op, or the gradients of all its inputs for given cotangents of both
    results, and the shapes of its arguments.

    Args:
      op: "ssd" (N is D), or gated linear attention by its decay: "none", "scalar", "vector".
      gradient: the gradients rather than the op.
      **options: of the op.
    """
    from tilescan.ops.gated_linear_attention import gated_linear_attention
    from tilescan.ops.ssd import ssd

    spec, f32 = jax.ShapeDtypeStruct, jnp.float32
    G = H if G is None else G
    options["implementation"] = implementation
    if op == "ssd":
        projection = spec((B, T, G, D), dtype)
        arrays = (
            spec((B, T, H, P), dtype), spec((B, T, H), f32), spec((H,), f32),
            projection, projection, spec((B, H, P, D), f32),
        )  # fmt: skip

        def function(x, dt, A, K, C, S):
            return ssd(x, dt, A, K, C, initial_state=S, **options)
    else:
        shape = {"none": None, "scalar": (B, T, H), "vector": (B, T, H, D)}[op]
        arrays = (
            spec((B, T, H, D), dtype), spec((B, T, G, D), dtype), spec((B, T, G, P), dtype),
            None if shape is None else spec(shape, f32), spec((B, H, D, P), f32),
        )  # fmt: skip

        def function(q, k, v, a, S):
            return gated_linear_attention(q, k, v, a, initial_state=S, **options)

    if not gradient:
        return function, arrays

    def pullback(arrays, cotangents):
        return jax.vjp(function, *arrays)[1](cotangents)

    return pullback, (arrays, jax.eval_shape(function, *arrays))


def with_block(block: tuple[int, int], **kwargs: Any) -> tuple[Callable, tuple]:
    """Returns the same as `public`, with a block of (steps, chunks) in place of the table's."""
    from tilescan.pallas_kernels.tpu import ssd as kernels

    kernels.block_for = lambda *_: kernels.Block(*block)
    return public(implementation="pallas", **kwargs)


# The table.


def rows() -> list[dict]:
    """Returns the rows of the committed table."""
    return json.loads(RESULTS.read_text())["rows"]


def row(
    op: str, gradient: bool, implementation: str, generation: str, shape: dict, result: dict
) -> dict:
    """Returns a row of the table from what `compile_jobs` gave; without cycles, `bound` is None."""
    found = {
        "op": NAMES[op], "implementation": "tilescan" if implementation == "pallas" else "xla",
        "direction": "gradient" if gradient else "forward", "generation": generation,
        "dtype": "bfloat16", "shape": shape, "source": result.get("source", "static profile"),
    }  # fmt: skip
    for key in ("error", "not_modelled"):
        if key in result:
            return found | {"source": f"{key.replace('_', ' ')}: {result[key][:120]}"}
    chip, trips = CHIPS[generation], result["trips"]
    found["bytes"] = result["bytes_accessed"]
    found["bandwidth_cycles"] = round(found["bytes"] / chip["bandwidth"] * chip["clock"])
    found |= {key: result[key] for key in ("temp_bytes", "vmem")}
    if "cycles" in result:
        cycles = {name: n * trips.get(name, 1) for name, n in result["cycles"].items()}
        found["cycles"] = sum(cycles.values())
        found["kernel_cycles"] = sum(n for name, n in cycles.items() if "chunked_scan_" in name)
        found["bound"] = max(found["cycles"], found["bandwidth_cycles"])
    return found


def compiled(kwargs: dict, generation: str) -> dict:
    """Compiles one case; where the profiler has no model for it, its bytes without cycles."""
    job = Job("tilescan.benchmarks.chunked_scans_tpu_static:public", kwargs)
    (result,) = compile_jobs([job], generation, timeout=600.0)
    if "not_modelled" not in result:
        return result
    source = f"not modelled: {result['not_modelled'][:120]}"
    (result,) = compile_jobs([job], generation, profile=False, timeout=600.0)
    return {"source": source} | result


def measure(generation: str, ops: Iterable[str], console: Console) -> None:
    """Compiles both implementations, forward and gradient, of some ops for one generation."""
    for op in ops:
        for gradient in (False, True):
            for implementation in ("pallas", "xla"):
                kwargs = {"op": op, "gradient": gradient, "implementation": implementation}
                result = compiled(kwargs | SHAPES[op], generation)
                found = row(op, gradient, implementation, generation, SHAPES[op], result)
                console.print(*(found.get(key) for key in HEADS))
                keep(found)


def keep(new: dict) -> None:
    """Writes a row to the committed table, in place of that of the same case."""
    case = lambda r: tuple(r[key] for key in ("generation", "op", "direction", "implementation"))
    kept = [r for r in (rows() if RESULTS.exists() else []) if case(r) != case(new)]
    note = "static figures of libtpu's compiler; nothing ran on a device"
    record = {"note": note, "versions": versions(), "rows": sorted([*kept, new], key=case)}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def sweep(generation: str, console: Console) -> None:
    """Prints the kernels' cycles in the gradients, for each block of SWEEP."""
    for op in ("scalar", "vector"):
        for block in SWEEP:
            kwargs = {"op": op, "gradient": True, "block": block} | SHAPES[op] | {"T": 2048}
            job = Job("tilescan.benchmarks.chunked_scans_tpu_static:with_block", kwargs)
            (result,) = compile_jobs([job], generation, timeout=300.0)
            cycles = {n: c for n, c in result.get("cycles", {}).items() if "chunked_scan_" in n}
            console.print(generation, op, block, cycles or str(result)[:200])


def show(found: list[dict], console: Console) -> None:
    """Prints the table."""
    table = Table(title="Chunked scans on TPUs, static figures: nothing ran on a device")
    for head in HEADS:
        table.add_column(head)
    text = lambda x: "-" if x is None else f"{x:,}" if isinstance(x, int) else str(x)
    for r in found:
        table.add_row(*(text(r.get(head)) for head in HEADS))
    console.print(table)


def main() -> None:
    """Compiles the cases that the command line asks for, and prints and writes their rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sweep", action="store_true", help="try many blocks; writes nothing")
    parser.add_argument("--generations", default=",".join(PROFILED))
    parser.add_argument("--ops", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    if not available():
        parser.error('libtpu is not installed; pip install "tilescan[dev]" brings it')
    console = Console(width=220)
    for generation in arguments.generations.split(","):
        if arguments.sweep:
            sweep(generation, console)
        else:
            measure(generation, arguments.ops, console)
    if not arguments.sweep:
        show(rows(), console)


if __name__ == "__main__":
    main()
