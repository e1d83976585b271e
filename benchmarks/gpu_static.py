"""Static figures of the GPU attention kernels, beside JAX's own.

    python -m tilescan.benchmarks.gpu_static

Registers, spills, shared memory and machine code for an H100, with no GPU: see planning/aot_gpu.
The figures are static and nothing ran on a device. Issue cycles are what one warp needs to issue
one pass of the loop over full tiles; tensor cores, memory and the other warps are not in them, so
they rank two versions of one kernel and say nothing about speed.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tilescan.planning import aot_gpu

OUTPUT = Path(__file__).resolve().parent.parent / "results" / "benchmarks" / "gpu_static.json"
NOTE = (
    "Static figures from ptxas for an H100; nothing ran on a device. Issue cycles: one warp, one "
    "pass of the loop over full tiles; without latencies of wgmma and memory."
)
SHAPE = {"batch": 1, "length": 4096, "heads": 8, "kv_heads": 8}
STOCK = {"block_q": 64, "block_kv": 128, "max_concurrent_steps": 2}
STOCK_BACKWARD = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
COLUMNS = ("registers", "spill_stores", "spill_loads", "shared_memory", "hgmma")


def jobs() -> list[dict]:
    """Returns the table's rows: ours in f16 and bf16, the stock kernels (f16; no causal backward).

    Heads of 256 are ours alone; their dK and dV are two kernels.
    """
    rows = []
    for dim in (64, 128):
        for mask in ("full", "causal"):
            case = {**SHAPE, "head_dim": dim, "mask": mask, "dtype": "float16"}
            rows += [{**case, "kernel": name} for name in ("forward", "dkv", "dq")]
            rows.append({**case, "kernel": "stock_forward", "blocks": STOCK})
            if mask == "full":
                blocks = STOCK | STOCK_BACKWARD
                rows.append({**case, "kernel": "stock_backward", "blocks": blocks})
        case = {**SHAPE, "kv_heads": 2, "head_dim": dim, "mask": "causal", "dtype": "bfloat16"}
        rows += [{**case, "kernel": name} for name in ("forward", "dkv", "dq")]
    for mask in ("full", "causal"):
        case = {**SHAPE, "head_dim": 256, "mask": mask, "dtype": "float16"}
        rows += [{**case, "kernel": name} for name in ("forward", "dk", "dv", "dq")]
    return rows


def main() -> int:
    """Compiles all kernels, prints their table and writes the record; returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="an interpreter that has XLA's CUDA plugin")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    console = Console()
    console.width = max(console.width, 132)
    try:
        reports = aot_gpu.compile_jobs(jobs(), options.python)
    except RuntimeError as error:
        console.print(str(error), markup=False)
        return 1
    table = Table(title="Attention on an H100, compiled and not run", caption=NOTE)
    for title in ("kernel", "D", "mask", "dtype", "G", *COLUMNS, "loop hgmma", "issue cycles"):
        table.add_column(title.replace("_", " "))
    records = []
    for job, report in zip(jobs(), reports, strict=True):
        records.append({"job": job, **report})
        for kernel in report.get("kernels", []):
            loop = kernel["loop"] or {}
            figures = [kernel[c] for c in COLUMNS]
            figures += [loop.get("hgmma"), loop.get("issue_cycles")]
            names = [job[c] for c in ("kernel", "head_dim", "mask", "dtype", "kv_heads")]
            table.add_row(*map(str, names + figures))
        if "error" in report:
            table.add_row(job["kernel"], str(job["head_dim"]), job["mask"], report["error"][:60])
    console.print(table)
    for warning in {
        r["versions"]["warning"] for r in reports if "warning" in r.get("versions", ())
    }:
        console.print(f"warning: {warning}", markup=False)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"note": NOTE, "rows": records}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
