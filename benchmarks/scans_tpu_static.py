"""Static cost of the diagonal scans' TPU kernels, beside XLA's own programs, with no TPU.

    python -m tilescan.benchmarks.scans_tpu_static

prints the table and writes results/benchmarks/scans_tpu_static.json.

The figures are those of libtpu's static profile (planning/aot_tpu.py): NOTHING HERE RAN ON A
DEVICE. They rank programs within one generation; they are not times. `bytes` are what a program
moves between HBM and the core: for a kernel, its blocks, counted; for XLA's programs, XLA's own
count. `least_bytes` are every input and output of the operation once. `bound` is the larger of the
cycles and of the bytes over the memory's bandwidth, in cycles.

XLA's loops: their body is profiled, and counted, once, so cycles and bytes are multiplied by the
trips. The associative scan is too large to be profiled: there are bytes alone. `around` are the
cycles of what XLA does around the kernels of a program: above all, complex inputs are split into
planes, and complex outputs are joined from them.

Dimensions: B batch, T time, D and E channels, N state dim.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from tilescan.benchmarks.tpu_static import CHIPS, versions
from tilescan.ops import selective_scan_tpu
from tilescan.planning.aot_tpu import PROFILED, Job, available, compile_jobs

RESULTS = (
    Path(__file__).resolve().parent.parent / "results" / "benchmarks" / "scans_tpu_static.json"
)
LINEAR = {"B": 1, "T": 16384, "D": 1024}
SELECTIVE = {"B": 1, "T": 512, "E": 1024, "N": 16}


# Jobs, called in the worker: (function, its arguments' shapes).

Program = tuple[Callable, tuple]


def linear_gradient(
    B: int,
    T: int,
    D: int,
    dtype: str,
    constant: bool = False,
    segments: bool = False,
    implementation: str | None = None,
) -> Program:
    """Returns both results of the public op and the gradients of all its inputs, for given
    cotangents.
    """
    from tilescan.ops.linear_recurrence import linear_recurrence

    spec = jax.ShapeDtypeStruct
    a, b = spec((D,) if constant else (B, T, D), dtype), spec((B, T, D), dtype)
    state = spec((B, D), "complex64" if dtype == "complex64" else "float32")
    ids = spec((B, T), "int32") if segments else None

    def function(a, b, state, ids, dh, dlast):
        op = lambda a, b, state: linear_recurrence(
            a, b, initial_state=state, segment_ids=ids, implementation=implementation
        )
        results, pullback = jax.vjp(op, a, b, state)
        return results, pullback((dh, dlast))

    return function, (a, b, state, ids, b, state)


def selective_gradient(
    B: int,
    T: int,
    E: int,
    N: int,
    dtype: str,
    segments: bool = False,
    implementation: str | None = None,
    around: bool = True,
) -> Program:
    """Returns the same as `linear_gradient`, of the selective scan.

    Args:
      around: with D, z and a softplus of dt.
    """
    from tilescan.ops.selective_scan import selective_scan

    spec = jax.ShapeDtypeStruct
    x, BC = spec((B, T, E), dtype), spec((B, T, N), dtype)
    A, D, state = (spec(shape, "float32") for shape in ((E, N), (E,), (B, E, N)))
    ids = spec((B, T), "int32") if segments else None

    def function(x, dt, A, B, C, D, z, state, ids, dy, dlast):
        options = dict(segment_ids=ids, implementation=implementation)

        def op(x, dt, A, B, C, D, z, state):
            sides = dict(D=D, z=z, dt_softplus=True) if around else {}
            return selective_scan(x, dt, A, B, C, initial_state=state, **sides, **options)

        results, pullback = jax.vjp(op, x, dt, A, B, C, D, z, state)
        return results, pullback((dy, dlast))

    return function, (x, x, A, BC, BC, D, x, state, ids, x, state)


def selective_forward(
    B: int, T: int, E: int, N: int, dtype: str, implementation: str | None
) -> Program:
    """Returns the selective scan alone."""
    from tilescan.ops.selective_scan import selective_scan

    spec = jax.ShapeDtypeStruct
    x, BC = spec((B, T, E), dtype), spec((B, T, N), dtype)
    op = lambda *arrays: selective_scan(*arrays, implementation=implementation)
    return op, (x, x, spec((E, N), "float32"), BC, BC)


def associative(B: int, T: int, D: int, dtype: str) -> Program:
    """Returns JAX's associative scan of the pairs, all of time at once."""
    x = jax.ShapeDtypeStruct((B, T, D), dtype)

    def combine(earlier, later):
        return later[0] * earlier[0], later[0] * earlier[1] + later[1]

    return lambda a, b: jax.lax.associative_scan(combine, (a, b), axis=1)[1], (x, x)


def stepwise(B: int, T: int, D: int, dtype: str) -> Program:
    """Returns JAX's scan, a step at a time."""
    x = jax.ShapeDtypeStruct((B, T, D), dtype)

    def recurrence(a, b):
        step = lambda h, x: (x[0] * h + x[1],) * 2
        xs = jnp.moveaxis(a, 1, 0), jnp.moveaxis(b, 1, 0)
        return jnp.moveaxis(jax.lax.scan(step, jnp.zeros((B, D), dtype), xs)[1], 0, 1)

    return recurrence, (x, x)


# The table.


@dataclasses.dataclass
class Row:
    """A row of the table; see the module's text."""

    op: str
    implementation: str
    direction: str
    dtype: str
    decays: str
    generation: str
    shape: dict
    source: str = "static profile"
    cycles: int | None = None
    around: int | None = None
    bytes: int | None = None
    least_bytes: int | None = None
    bandwidth_cycles: int | None = None
    bound: int | None = None
    vmem: int | None = None


def _linear_bytes(direction, dtype, constant):
    """Returns the bytes that the op needs: b and h; dh, h and db; and a (and da) if they vary."""
    arrays = {"forward": 2, "backward": 3}[direction]
    if not constant:
        arrays += {"forward": 1, "backward": 2}[direction]
    return arrays * math.prod(LINEAR.values()) * jnp.dtype(dtype).itemsize


def _selective_bytes(direction, dtype):
    """Returns (bytes that the kernel moves, bytes that the operation needs)."""
    B, T, E, N = SELECTIVE.values()
    block, own = selective_scan_tpu.block_for(B, T, E, N), jnp.dtype(dtype).itemsize
    chunks = T // block.steps
    columns = B * T * N * 128 // block.steps * 4  # B or C, [N, C] padded to 128 lanes
    rates = B * chunks * E * N * 4
    if direction == "forward":  # x, dt, y; B, C; A, states
        moved = B * T * E * (own + 8) + 2 * block.parts * columns + 2 * rates
        return moved, B * T * (3 * E + 2 * N) * own
    # x, dt, dy, dx, ddt; B, C, dB, dC; A, states
    moved = B * T * E * (2 * own + 12) + 4 * block.parts * columns + 2 * rates
    return moved, B * T * (5 * E + 4 * N) * own


def _jobs():
    """Returns (job, rows that it fills, trips of its loop) of every program."""
    target = "tilescan.benchmarks.scans_tpu_static:"
    found = []
    for dtype, constant in (
        ("float32", False), ("bfloat16", False), ("float32", True), ("complex64", False),
    ):  # fmt: skip
        kwargs = dict(LINEAR, dtype=dtype, constant=constant)
        decays = "shared by all steps" if constant else "by step"
        rows = []
        for direction in ("forward", "backward"):
            moved = _linear_bytes(direction, dtype, constant)
            row = dict(op="linear_recurrence", implementation="pallas", direction=direction)
            row |= dict(dtype=dtype, decays=decays, shape=LINEAR, bytes=moved, least_bytes=moved)
            rows.append(row)
        found.append((Job(target + "linear_gradient", kwargs), rows, 1))
    for name, trips in (("associative", 1), ("stepwise", LINEAR["T"])):
        library = {"associative": "jax.lax.associative_scan", "stepwise": "jax.lax.scan"}[name]
        row = dict(op="linear_recurrence", implementation=library, direction="forward")
        row |= dict(dtype="float32", decays="by step", shape=LINEAR)
        row["least_bytes"] = _linear_bytes("forward", "float32", False)
        found.append((Job(target + name, dict(LINEAR, dtype="float32")), [row], trips))
    for dtype in ("float32", "bfloat16"):
        rows = []
        for direction in ("forward", "backward"):
            moved, least = _selective_bytes(direction, dtype)
            row = dict(op="selective_scan", implementation="pallas", direction=direction)
            row |= dict(dtype=dtype, decays="by input", shape=SELECTIVE)
            rows.append(row | dict(bytes=moved, least_bytes=least))
        kwargs = dict(SELECTIVE, dtype=dtype, around=False)
        found.append((Job(target + "selective_gradient", kwargs), rows, 1))
    row = dict(op="selective_scan", implementation="xla", direction="forward", dtype="float32")
    row |= dict(decays="by input", shape=SELECTIVE)
    row["least_bytes"] = _selective_bytes("forward", "float32")[1]
    kwargs = dict(SELECTIVE, dtype="float32", implementation="xla")
    found.append((Job(target + "selective_forward", kwargs), [row], SELECTIVE["T"] // 64))
    return found


NAMES = {
    ("linear_recurrence", "forward"): "linear_scan",
    ("linear_recurrence", "backward"): "linear_scan_gradient",
    ("selective_scan", "forward"): "selective_scan",
    ("selective_scan", "backward"): "selective_scan_backward",
}


def rows(generations: Sequence[str] = PROFILED) -> list[dict]:
    """Compiles all programs; returns one dict for each and generation, with the fields of `Row`."""
    found = []
    for generation in generations:
        for job, planned, trips in _jobs():
            # One process each: the profiler keeps its memory.
            profile = not job.target.endswith(":associative")
            (result,) = compile_jobs([job], generation, profile=profile)
            for row in planned:
                filled = _fill(Row(generation=generation, **row), result, trips)
                found.append(dataclasses.asdict(filled))
    return found


def _fill(row, result, trips):
    for key in ("error", "not_modelled"):
        if key in result:
            row.source = f"{key.replace('_', ' ')}: {result[key][:160]}"
            return row
    chip, runs = CHIPS[row.generation], result["trips"]
    cycles = {name: n * runs.get(name, 1) for name, n in result.get("cycles", {}).items()}
    if row.implementation == "pallas":
        own = lambda name: name.split(".")[0] == NAMES[row.op, row.direction]
        row.cycles = sum(n for name, n in cycles.items() if own(name))
        kernels = set(NAMES.values())
        row.around = sum(n for name, n in cycles.items() if name.split(".")[0] not in kernels)
        row.vmem = result["vmem"]
    else:
        row.cycles = sum(cycles.values()) or None
        row.bytes = result["bytes_accessed"] * trips
        if trips > 1:
            row.source = f"static profile; a loop's body times {trips}"
        elif row.cycles is None:
            row.source = "XLA's count of bytes"
    row.bandwidth_cycles = round(row.bytes / chip["cores"] / chip["bandwidth"] * chip["clock"])
    row.bound = max(row.cycles or 0, row.bandwidth_cycles)
    return row


def _print(found, console):
    table = Table(title="Diagonal scans on TPUs, static figures: nothing ran on a device")
    heads = ("gen", "op", "implementation", "direction", "dtype", "decays", "cycles", "around",
             "MiB", "least MiB", "bytes/bw", "bound", "source")  # fmt: skip
    for head in heads:
        table.add_column(head)
    number = lambda x: "-" if x is None else f"{x:,}"
    mebibytes = lambda x: "-" if x is None else f"{x / 2**20:,.0f}"
    for r in found:
        table.add_row(
            r["generation"], r["op"], r["implementation"], r["direction"], r["dtype"], r["decays"],
            number(r["cycles"]), number(r["around"]), mebibytes(r["bytes"]),
            mebibytes(r["least_bytes"]), number(r["bandwidth_cycles"]), number(r["bound"]),
            r["source"],
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Compiles all programs, prints their table and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--generations", default=",".join(PROFILED))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not available():
        parser.error('libtpu is not installed; pip install "tilescan[dev]" brings it')
    console = Console(width=200)
    found = rows(arguments.generations.split(","))
    _print(found, console)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "note": "static figures of libtpu's compiler; nothing ran on a device",
        "versions": versions(),
        "rows": found,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
