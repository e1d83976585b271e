"""What compilers say of the kernels without a device: cycles and bytes for TPUs, code for an H100.

`benchmarks.tpu_static` and `benchmarks.gpu_static` compile the kernels for chips that nobody has at
hand and keep the figures as JSON. The cells here copy the rows they need, so that a paper's tables
hang on its records alone.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.claims import Claim, judge
from experiments.harness import Cell
from experiments.records import Records
from experiments.tables import STATIC, Column, Table, ratio

FOLDER = pathlib.Path(__file__).parents[1] / "results" / "benchmarks"
OURS, STOCK = "tilescan", "jax flash"
_KERNELS = {OURS: {"forward": ("forward",), "backward": ("dq", "dkv")},
            STOCK: {"forward": ("forward",), "backward": ("backward",)}}  # fmt: skip


def cells(folder: pathlib.Path = FOLDER) -> list[Cell]:
    """A cell for each file of static figures that there is; it copies them."""
    made = []
    for name, copy in (("tpu", copy_tpu), ("gpu", copy_gpu)):
        path = folder / f"{name}_static.json"
        if path.exists():
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            measure = lambda settings, seed, scratch, copy=copy, path=path: copy(path)
            settings = {"kind": f"static-{name}", "sha256": sha256}
            made.append(Cell(f"static-{name}", measure, settings))
    return made


def copy_gpu(path: pathlib.Path) -> dict[str, Any]:
    """One row a kernel: registers, spills, shared memory and the instructions of its loop."""
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        job, plain_heads = row["job"], row["job"]["heads"] == row["job"]["kv_heads"]
        # The last of the stock backward's kernels is its forward.
        kernels = row["kernels"][:2] if "backward" in job["kernel"] else row["kernels"]
        for kernel in kernels if plain_heads else ():
            spills = kernel["spill_stores"] + kernel["spill_loads"]
            made = {key: job[key] for key in ("kernel", "mask", "head_dim", "dtype", "length")}
            made |= {key: kernel[key] for key in ("registers", "shared_memory")}
            rows.append({**made, "spills": spills, "loop": kernel["loop"]})
    return {"rows": rows}


def copy_tpu(path: pathlib.Path) -> dict[str, Any]:
    """The profiled rows of both implementations, and the compiler's versions."""
    data = json.loads(path.read_text(encoding="utf-8"))
    keys = ("implementation", "kernel", "mask", "generation", "cycles", "bytes", "mxu_share")
    rows = [
        {key: row.get(key) for key in (*keys, "shape", "vmem")}
        for row in data["rows"]
        if row["implementation"] in _KERNELS and row.get("source") == "static profile"
    ]
    return {"rows": rows, "versions": data["versions"]}


def _total(rows, implementation: str, direction: str, key: str, **where) -> float | None:
    """Sum of `key` over the kernels of one direction, None if one of them is missing."""
    kernels = _KERNELS[implementation][direction]
    found = [
        row[key]
        for row in rows
        if row["implementation"] == implementation
        and row["kernel"] in kernels
        and all(row[name] == value for name, value in where.items())
    ]
    whole = len(found) == len(kernels) and None not in found
    return sum(found) if whole else None


def _rows(records: Records) -> list[Mapping[str, Any]]:
    record = records.one(kind="static-tpu")
    return list(record.result["rows"]) if record else []


def _places(rows) -> list[tuple[str, str]]:
    """(generation, mask) in the order of the file."""
    return list(dict.fromkeys((row["generation"], row["mask"]) for row in rows))


def tables(records: Records) -> list[Table]:
    """Our kernels' cycles beside JAX's own, and the bytes that they move."""
    rows, lines = _rows(records), []
    for generation, mask in _places(rows):
        where = {"generation": generation, "mask": mask}
        for direction in ("forward", "backward"):
            ours, stock = (_total(rows, i, direction, "cycles", **where) for i in _KERNELS)
            moved = _total(rows, OURS, direction, "bytes", **where)
            moved = None if moved is None else moved / 2**20
            lines.append([generation, mask, direction, ours, stock, ratio(stock, ours), moved])
    columns = [
        Column("TPU"),
        Column("mask"),
        Column("direction"),
        Column("cycles, ours", STATIC),
        Column("cycles, JAX's flash attention", STATIC),
        Column("JAX's / ours", STATIC),
        Column("bytes moved, ours", STATIC, "MiB"),
    ]
    shape = ", ".join(f"{k} {v}" for k, v in rows[0]["shape"].items()) if rows else ""
    versions = records.one(kind="static-tpu").result["versions"] if rows else {}
    note = (
        f"No device: libtpu {versions.get('libtpu', '')}'s static profile of the compiled kernels, "
        f"bfloat16, {shape}. It ranks two kernels on one generation; it is no time. JAX's kernel "
        "at its best tiles of a small sweep; – where it lacks the mask or the profiler a model."
    )
    table = Table("static-tpu", "TPU kernels, compiled but not run", columns, lines, note)
    return [table, _gpu_table(records)]


def _gpu_rows(records: Records) -> list[Mapping[str, Any]]:
    record = records.one(kind="static-gpu")
    return list(record.result["rows"]) if record else []


def _gpu_table(records: Records) -> Table:
    lines = [
        [
            str(row["head_dim"]), row["mask"], row["kernel"].replace("_", " "), row["registers"],
            row["spills"], row["shared_memory"] / 2**10, row["loop"]["hgmma"],
            row["loop"]["issue_cycles"],
        ]
        for row in _gpu_rows(records)
    ]  # fmt: skip
    columns = [
        Column("head dim"),
        Column("mask"),
        Column("kernel"),
        Column("registers", STATIC),
        Column("spills", STATIC, "bytes"),
        Column("shared memory", STATIC, "KiB"),
        Column("tensor-core instructions in the loop", STATIC),
        Column("issue cycles in the loop", STATIC),
    ]
    note = (
        "No device: machine code for an H100 by ptxas. Issue cycles are those of one warp for one "
        "pass of the loop over full tiles, without the latencies of tensor cores and memory: they "
        "are no time. Stock kernels are those that JAX installs; theirs has no causal backward."
    )
    return Table("static-gpu", "H100 kernels, compiled but not run", columns, lines, note)


def claims(records: Records) -> list[Claim]:
    """Our TPU kernels against JAX's stock one."""
    rows, gains = _rows(records), []
    for generation, mask in _places(rows):
        for direction in ("forward", "backward"):
            where = {"generation": generation, "mask": mask}
            ours, stock = (_total(rows, i, direction, "cycles", **where) for i in _KERNELS)
            if ours is not None and stock is not None:
                gains.append(stock / ours)
    return [
        judge(
            "TPU kernels, static",
            "FlashAttention-2's order carries over to TPUs (no claim of the paper).",
            "on every generation, mask and direction that both have, our cycles are at most those "
            "of JAX's flash attention by the compiler's static profile",
            min(gains) >= 1 if gains else None,
            f"JAX's / ours from {min(gains):.2f} to {max(gains):.2f}" if gains else "",
        ),
        _no_spills(records),
    ]


def _no_spills(records: Records) -> Claim:
    ours = [row for row in _gpu_rows(records) if not row["kernel"].startswith("stock")]
    spills = max((row["spills"] for row in ours), default=None)
    return judge(
        "H100 kernels, static",
        "Tiles are as large as registers allow, and no larger (section 3.3).",
        "none of our kernels spills a register on an H100",
        None if spills is None else spills == 0,
        "" if spills is None else f"at most {spills} bytes spilled in {len(ours)} kernels",
    )
