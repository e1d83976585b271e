"""What compilers say of the kernels without a device: cycles and bytes for TPUs.

`benchmarks.tpu_static` compiles the kernels for TPUs that nobody has at hand and keeps the figures
as JSON. The cell here copies the rows it needs, so that a paper's tables hang on its records alone.
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

FILE = pathlib.Path(__file__).parents[1] / "results" / "benchmarks" / "tpu_static.json"
OURS, STOCK = "tilescan", "jax flash"
_KERNELS = {OURS: {"forward": ("forward",), "backward": ("dq", "dkv")},
            STOCK: {"forward": ("forward",), "backward": ("backward",)}}  # fmt: skip


def cells(path: pathlib.Path = FILE) -> list[Cell]:
    """One cell that copies the static figures, none where there are no figures."""
    if not path.exists():
        return []
    settings = {"kind": "static", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return [Cell("static-tpu", lambda settings, seed, folder: copy(path), settings)]


def copy(path: pathlib.Path) -> dict[str, Any]:
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
    record = records.one(kind="static")
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
    versions = records.one(kind="static").result["versions"] if rows else {}
    note = (
        f"No device: libtpu {versions.get('libtpu', '')}'s static profile of the compiled kernels, "
        f"bfloat16, {shape}. It ranks two kernels on one generation; it is no time. JAX's kernel "
        "at its best tiles of a small sweep; – where it lacks the mask or the profiler a model."
    )
    return [Table("static-tpu", "TPU kernels, compiled but not run", columns, lines, note)]


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
        )
    ]
