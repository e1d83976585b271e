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
"""

import argparse
import json
from pathlib import Path

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
    op, gradient, implementation, B=1, T=8192, H=8, G=None, D=64, P=64, dtype="bfloat16", **options
):
    """The public op, or the gradients of all its inputs for given cotangents of both results.

    op: "ssd" (N is D), or gated linear attention by its decay: "none", "scalar", "vector".
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


def with_block(block, **kwargs):
    """As `public`, with a block of so many steps and chunks in place of the table's."""
    from tilescan.pallas_kernels.tpu import ssd as kernels

    kernels.block_for = lambda *_: kernels.Block(*block)
    return public(implementation="pallas", **kwargs)


# The table.


def rows() -> list[dict]:
    """The committed table."""
    return json.loads(RESULTS.read_text())["rows"]


def row(op, gradient, implementation, generation, shape, result) -> dict:
    """A row of the table, of what `compile_jobs` returned; `bound` is None without cycles."""
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
    """One case; where the profiler has no model for it, its bytes without cycles."""
    job = Job("tilescan.benchmarks.chunked_scans_tpu_static:public", kwargs)
    (result,) = compile_jobs([job], generation, timeout=600.0)
    if "not_modelled" not in result:
        return result
    source = f"not modelled: {result['not_modelled'][:120]}"
    (result,) = compile_jobs([job], generation, profile=False, timeout=600.0)
    return {"source": source} | result


def measure(generation: str, ops, console) -> None:
    """Both implementations, forward and gradient, of some ops on one generation."""
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


def sweep(generation: str, console) -> None:
    for op in ("scalar", "vector"):
        for block in SWEEP:
            kwargs = {"op": op, "gradient": True, "block": block} | SHAPES[op] | {"T": 2048}
            job = Job("tilescan.benchmarks.chunked_scans_tpu_static:with_block", kwargs)
            (result,) = compile_jobs([job], generation, timeout=300.0)
            cycles = {n: c for n, c in result.get("cycles", {}).items() if "chunked_scan_" in n}
            console.print(generation, op, block, cycles or str(result)[:200])


def show(found: list[dict], console) -> None:
    table = Table(title="Chunked scans on TPUs, static figures: nothing ran on a device")
    for head in HEADS:
        table.add_column(head)
    text = lambda x: "-" if x is None else f"{x:,}" if isinstance(x, int) else str(x)
    for r in found:
        table.add_row(*(text(r.get(head)) for head in HEADS))
    console.print(table)


def main() -> None:
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
