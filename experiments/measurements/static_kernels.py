"""What compilers say of the kernels without a device: cycles and bytes for TPUs, code for an H100.

`benchmarks.tpu_static` and `benchmarks.gpu_static` compile the kernels for chips that are not
attached and keep the figures as JSON. The cells here copy the rows they need, so that a paper's
tables depend on its records alone.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tilescan.experiments.harness.cells import Cell
from tilescan.experiments.harness.claims import Claim, Verdict, claim, every
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import ratio
from tilescan.experiments.harness.tables import STATIC, Column, Table, table

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
DIRECTIONS = ("forward", "backward")
Rows = Sequence[Mapping[str, Any]]


def cells(folder: pathlib.Path = FOLDER) -> list[Cell]:
    """Returns a cell for each file of static figures that there is; it copies them."""
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
    """Returns a row a kernel: registers, spills, shared memory and the instructions of its loop."""
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
    """Returns the profiled rows of both implementations at the file's first shape, and versions.

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


def _values(rows: Rows, implementation: str, key: str, direction: str, **where: str) -> list | None:
    """Returns `key` of each kernel of one direction, None if one of them is missing."""
    kernels = _KERNELS[implementation][direction]
    found = [
        row.get(key)
        for row in rows
        if row["implementation"] == implementation
        and row["kernel"] in kernels
        and all(row[name] == value for name, value in where.items())
    ]
    return found if len(found) == len(kernels) and None not in found else None


def _total(rows: Rows, implementation: str, key: str, **where: str) -> float | None:
    """Returns the sum of `key` over the kernels of one direction."""
    found = _values(rows, implementation, key, **where)
    return None if found is None else sum(found)


def _mxu_share(rows: Rows, **where: str) -> float | None:
    """Returns our kernels' share of the MXU's peak, each weighted by its cycles."""
    shares, cycles = (_values(rows, OURS, key, **where) for key in ("mxu_share", "cycles"))
    if None in (shares, cycles):
        return None
    return sum(s * c for s, c in zip(shares, cycles, strict=True)) / sum(cycles)


def visible_scores(mask: str, length: int) -> int:
    """Returns how many scores a mask of the static files leaves: "full", "causal", "window 512"."""
    if mask == "full":
        return length**2
    window = length if mask == "causal" else int(mask.removeprefix("window "))
    return sum(min(i + 1, window) for i in range(length))


def flops(kernel: str, mask: str, batch: int, heads: int, length: int, head_dim: int) -> int:
    """Returns the FLOPs of a kernel's products of matrices, of visible scores alone."""
    return _PRODUCTS[kernel] * 2 * batch * heads * visible_scores(mask, length) * head_dim


def _cases(rows: Rows) -> list[dict[str, str]]:
    """Returns {"generation", "mask", "direction"} of all kernels, in the order of the file."""
    places = dict.fromkeys((row["generation"], row["mask"]) for row in rows)
    return [
        {"generation": generation, "mask": mask, "direction": direction}
        for generation, mask in places
        for direction in DIRECTIONS
    ]


def _gain(rows: Rows, **where: str) -> float | None:
    """Returns the cycles of JAX's kernels over those of ours, None where one is missing."""
    return ratio(*(_total(rows, i, "cycles", **where) for i in (STOCK, OURS)))


def tables(records: Records) -> list[Table]:
    """Returns our kernels' cycles and traffic beside JAX's own, and our machine code."""
    return [_tpu_table(records.one(kind="static-tpu")), _gpu_table(records.one(kind="static-gpu"))]


def _tpu_table(record: Record | None) -> Table:
    """Returns the profiles of TPU kernels; a row has the record and a case."""
    rows = record.result["rows"] if record else []
    versions = record.result["versions"] if record else {}
    shape = rows[0]["shape"] if rows else {}
    count = lambda c: flops(c["direction"], c["mask"], *(shape[key] for key in "BHTD")) / 1e9
    total = lambda *key: lambda row: _total(rows, *key, **row[1])
    megabytes = lambda number: None if number is None else number / 2**20
    moved = lambda case: megabytes(_total(rows, OURS, "bytes", **case))
    vmem = lambda case: megabytes(max(_values(rows, OURS, "vmem", **case) or [], default=None))

    return table(
        "static-tpu",
        "TPU kernels, compiled but not run",
        [(record, case) for case in _cases(rows)],
        [
            Column("TPU", of=lambda row: row[1]["generation"]),
            Column("mask", of=lambda row: row[1]["mask"]),
            Column("direction", of=lambda row: row[1]["direction"]),
            Column("FLOPs", STATIC, "10⁹", of=lambda row: count(row[1])),
            Column("cycles, ours", STATIC, of=total(OURS, "cycles")),
            Column("cycles, JAX's flash attention", STATIC, of=total(STOCK, "cycles")),
            Column("JAX's / ours", STATIC, of=lambda row: _gain(rows, **row[1])),
            Column(
                "ours, share of the MXU's peak", STATIC, of=lambda row: _mxu_share(rows, **row[1])
            ),
            Column("ours, bytes moved", STATIC, "MiB", of=lambda row: moved(row[1])),
            Column("ours, cycles to move them", STATIC, of=total(OURS, "bandwidth_cycles")),
            Column("ours, VMEM", STATIC, "MiB", of=lambda row: vmem(row[1])),
        ],
        f"No device: libtpu {versions.get('libtpu', '')}'s static profile of the compiled kernels, "
        f"bfloat16, {', '.join(f'{k} {v}' for k, v in shape.items())}. It ranks two kernels on one "
        "generation; it is not a time. JAX's kernel at its best tiles of a small sweep; – where it "
        "lacks the mask or the profiler a model. FLOPs by formula, for visible scores alone. "
        "Backward is two kernels, 7 products of matrices; their VMEM is the larger one's.",
    )


def _gpu_table(record: Record | None) -> Table:
    """Returns the machine code of GPU kernels; a row has the record and a row of the file."""
    rows = record.result["rows"] if record else []
    shape = "".join("{dtype}, B {batch}, H {heads}, T {length}".format(**row) for row in rows[:1])
    work = lambda i: lambda row: _gpu_work(row[1])[i]
    return table(
        "static-gpu",
        "H100 kernels, compiled but not run",
        [(record, row) for row in rows],
        [
            Column("head dim", of=lambda row: str(row[1]["head_dim"])),
            Column("mask", of=lambda row: row[1]["mask"]),
            Column("kernel", of=lambda row: row[1]["kernel"].replace("_", " ")),
            Column("FLOPs", STATIC, "10⁹", of=work(0)),
            Column("bytes moved at least", STATIC, "MiB", of=work(1)),
            Column("registers", STATIC, of=lambda row: row[1]["registers"]),
            Column("spills", STATIC, "bytes", of=lambda row: row[1]["spills"]),
            Column("shared memory", STATIC, "KiB", of=lambda row: row[1]["shared_memory"] / 2**10),
            Column(
                "tensor-core instructions in the loop",
                STATIC,
                of=lambda row: row[1]["loop"]["hgmma"],
            ),
            Column(
                "issue cycles in the loop", STATIC, of=lambda row: row[1]["loop"]["issue_cycles"]
            ),
        ],
        f"No device: machine code for an H100 by ptxas, {shape}. FLOPs and bytes by formula: "
        "visible scores alone, every input and output once. Issue cycles are those of one warp for "
        "one pass of the loop over full tiles, without the latencies of tensor cores and memory: "
        "they are not times. Stock kernels are those that JAX installs; theirs has no causal "
        "backward.",
    )


def _gpu_work(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Returns (10⁹ FLOPs, least MiB moved) of one of our kernels by formula."""
    if row["kernel"] not in _TENSORS:
        return None, None
    shape = tuple(row[key] for key in ("batch", "heads", "length", "head_dim"))
    tensors, statistics = _TENSORS[row["kernel"]]
    batch, heads, length, head_dim = shape
    moved = batch * heads * length * (tensors * head_dim * 2 + statistics * 4)
    return flops(row["kernel"], row["mask"], *shape) / 1e9, moved / 2**20


def claims(records: Records) -> list[Claim]:
    """Returns how our TPU kernels compare with JAX's stock one, and whether ours for GPUs spill."""
    return [
        claim(
            "TPU kernels, static",
            "FlashAttention-2's order carries over to TPUs (no claim of the paper).",
            _fewer_cycles(records.one(kind="static-tpu")),
        ),
        claim(
            "H100 kernels, static",
            "Tiles must not be so large that registers spill (section 3.3).",
            _no_spills(records.one(kind="static-gpu")),
        ),
    ]


def _fewer_cycles(record: Record | None) -> Verdict:
    rows = record.result["rows"] if record else []
    gains = [gain for case in _cases(rows) if (gain := _gain(rows, **case)) is not None]
    return Verdict(
        "on every generation, mask and direction that both have, our cycles are at most those of "
        "JAX's flash attention by the compiler's static profile",
        every(gain >= 1 for gain in gains),
        f"JAX's / ours from {min(gains):.2f} to {max(gains):.2f}" if gains else "",
    )


def _no_spills(record: Record | None) -> Verdict:
    rows = record.result["rows"] if record else []
    ours = [row["spills"] for row in rows if not row["kernel"].startswith("stock")]
    return Verdict(
        "none of our kernels spills a register on an H100",
        every(spills == 0 for spills in ours),
        f"at most {max(ours)} bytes spilled in {len(ours)} kernels" if ours else "",
    )
