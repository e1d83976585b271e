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

from tilescan.experiments.harness.cells import Cell
from tilescan.experiments.harness.claims import Claim, judge
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import ratio
from tilescan.experiments.harness.tables import STATIC, Column, Table

# Rows of a static file that a record keeps; a change of them copies the file again.
_TPU_KEYS = ("implementation", "kernel", "mask", "generation", "cycles", "bytes",
             "bandwidth_cycles", "mxu_share", "vmem", "shape")  # fmt: skip
_GPU_KEYS = ("kernel", "mask", "batch", "heads", "head_dim", "dtype", "length")
# Products of matrices; "backward" is dq and dkv.
_PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "dk": 3, "dv": 2, "backward": 7}
# Tensors [B, T, H, D] that a kernel reads or writes at least once, and rows [B, T, H] in float32.
_TENSORS = {"forward": (4, 1), "dq": (5, 2), "dkv": (6, 2), "dk": (5, 2), "dv": (4, 1)}
FOLDER = pathlib.Path(__file__).resolve().parents[2] / "results" / "benchmarks"
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
            measure = lambda settings, seed, copy=copy, path=path: copy(path)
            settings = {"kind": f"static-{name}", "sha256": sha256}
            settings["keys"] = {"tpu": _TPU_KEYS, "gpu": _GPU_KEYS}[name]
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
            made = {key: job[key] for key in _GPU_KEYS}
            made |= {key: kernel[key] for key in ("registers", "shared_memory")}
            rows.append({**made, "spills": spills, "loop": kernel["loop"]})
    return {"rows": rows}


def copy_tpu(path: pathlib.Path) -> dict[str, Any]:
    """The profiled rows of both implementations at the file's first shape, and the versions.

    The file has rows of another shape where the profiler compares nothing at the first; the tables
    are of one shape.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    shape = next((row.get("shape") for row in data["rows"]), None)
    rows = [
        {key: row.get(key) for key in _TPU_KEYS}
        for row in data["rows"]
        if row["implementation"] in _KERNELS
        and row.get("source") == "static profile"
        and row.get("shape") == shape
    ]
    return {"rows": rows, "versions": data["versions"]}


def _values(rows, implementation: str, direction: str, key: str, **where) -> list | None:
    """`key` of each kernel of one direction, None if one of them is missing."""
    kernels = _KERNELS[implementation][direction]
    found = [
        row.get(key)
        for row in rows
        if row["implementation"] == implementation
        and row["kernel"] in kernels
        and all(row[name] == value for name, value in where.items())
    ]
    return found if len(found) == len(kernels) and None not in found else None


def _total(rows, implementation: str, direction: str, key: str, **where) -> float | None:
    """Their sum."""
    found = _values(rows, implementation, direction, key, **where)
    return None if found is None else sum(found)


def _mxu_share(rows, direction: str, **where) -> float | None:
    """Our kernels' share of the MXU's peak, each weighted by its cycles."""
    shares, cycles = (_values(rows, OURS, direction, k, **where) for k in ("mxu_share", "cycles"))
    if None in (shares, cycles):
        return None
    return sum(s * c for s, c in zip(shares, cycles, strict=True)) / sum(cycles)


def visible_scores(mask: str, length: int) -> int:
    """Scores that a mask of the static files leaves: "full", "causal" or "window 512"."""
    if mask == "full":
        return length**2
    window = length if mask == "causal" else int(mask.removeprefix("window "))
    return sum(min(i + 1, window) for i in range(length))


def operations(kernel: str, mask: str, batch: int, heads: int, length: int, head_dim: int) -> int:
    """Multiplications and additions of a kernel's products of matrices, visible scores alone."""
    return _PRODUCTS[kernel] * 2 * batch * heads * visible_scores(mask, length) * head_dim


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
            vmem = _values(rows, OURS, direction, "vmem", **where)
            shape = (rows[0]["shape"][key] for key in "BHTD")
            flops = operations(direction, mask, *shape) / 1e9
            lines.append([
                generation, mask, direction, flops, ours, stock, ratio(stock, ours),
                _mxu_share(rows, direction, **where), None if moved is None else moved / 2**20,
                _total(rows, OURS, direction, "bandwidth_cycles", **where),
                None if vmem is None else max(vmem) / 2**20,
            ])  # fmt: skip
    columns = [
        Column("TPU"),
        Column("mask"),
        Column("direction"),
        Column("operations", STATIC, "10⁹"),
        Column("cycles, ours", STATIC),
        Column("cycles, JAX's flash attention", STATIC),
        Column("JAX's / ours", STATIC),
        Column("ours, share of the MXU's peak", STATIC),
        Column("ours, bytes moved", STATIC, "MiB"),
        Column("ours, cycles to move them", STATIC),
        Column("ours, VMEM", STATIC, "MiB"),
    ]
    shape = ", ".join(f"{k} {v}" for k, v in rows[0]["shape"].items()) if rows else ""
    versions = records.one(kind="static-tpu").result["versions"] if rows else {}
    note = (
        f"No device: libtpu {versions.get('libtpu', '')}'s static profile of the compiled kernels, "
        f"bfloat16, {shape}. It ranks two kernels on one generation; it is no time. JAX's kernel "
        "at its best tiles of a small sweep; – where it lacks the mask or the profiler a model. "
        "Operations by formula, for visible scores alone. Backward is two kernels, 7 products of "
        "matrices; their VMEM is the larger one's."
    )
    table = Table("static-tpu", "TPU kernels, compiled but not run", columns, lines, note)
    return [table, _gpu_table(records)]


def _gpu_rows(records: Records) -> list[Mapping[str, Any]]:
    record = records.one(kind="static-gpu")
    return list(record.result["rows"]) if record else []


def _gpu_table(records: Records) -> Table:
    lines = [
        [
            str(row["head_dim"]), row["mask"], row["kernel"].replace("_", " "), *_gpu_work(row),
            row["registers"], row["spills"], row["shared_memory"] / 2**10, row["loop"]["hgmma"],
            row["loop"]["issue_cycles"],
        ]
        for row in _gpu_rows(records)
    ]  # fmt: skip
    columns = [
        Column("head dim"),
        Column("mask"),
        Column("kernel"),
        Column("operations", STATIC, "10⁹"),
        Column("bytes moved at least", STATIC, "MiB"),
        Column("registers", STATIC),
        Column("spills", STATIC, "bytes"),
        Column("shared memory", STATIC, "KiB"),
        Column("tensor-core instructions in the loop", STATIC),
        Column("issue cycles in the loop", STATIC),
    ]
    shape = ""
    for row in _gpu_rows(records)[:1]:
        shape = f"{row['dtype']}, B {row['batch']}, H {row['heads']}, T {row['length']}"
    note = (
        f"No device: machine code for an H100 by ptxas, {shape}. Operations and bytes by formula: "
        "visible scores alone, every input and output once. Issue cycles are those of one warp for "
        "one pass of the loop over full tiles, without the latencies of tensor cores and memory: "
        "they are no time. Stock kernels are those that JAX installs; theirs has no causal "
        "backward."
    )
    return Table("static-gpu", "H100 kernels, compiled but not run", columns, lines, note)


def _gpu_work(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """(10⁹ operations, least MiB moved) of one of our kernels by formula."""
    if row["kernel"] not in _TENSORS:
        return None, None
    shape = tuple(row[key] for key in ("batch", "heads", "length", "head_dim"))
    tensors, statistics = _TENSORS[row["kernel"]]
    batch, heads, length, head_dim = shape
    moved = batch * heads * length * (tensors * head_dim * 2 + statistics * 4)
    return operations(row["kernel"], row["mask"], *shape) / 1e9, moved / 2**20


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
        "Tiles must not be so large that registers spill (section 3.3).",
        "none of our kernels spills a register on an H100",
        None if spills is None else spills == 0,
        "" if spills is None else f"at most {spills} bytes spilled in {len(ours)} kernels",
    )
