"""Static figures of the GPU scan kernels, beside jax-linear-attention's:
python -m benchmarks.scans_gpu_static

Registers, spills, shared memory and machine code for an H100, with no GPU: see benchmarks/aot_gpu.
The figures are static and nothing ran on a device. Issue cycles are what one warp needs to issue
one pass of the loop with the most matrix instructions, and kernels divide the work differently, so
they say nothing about speed. The interpreter named by --python needs, beside XLA's CUDA plugin,
`pip install --no-deps jax-linear-attention==0.1.0`; without it the peer's rows are errors.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import aot_gpu

OUTPUT = Path(__file__).resolve().parent.parent / "results" / "benchmarks" / "scans_gpu_static.json"
NOTE = (
    "Static figures from ptxas for an H100; nothing ran on a device. Issue cycles: one warp, one "
    "pass of its busiest loop, without latencies of wgmma and memory; kernels divide the work "
    "differently. peer: jax-linear-attention's simple_gla. Decays by head; H = 8, G = 1, T = 4096."
)
SHAPE = {"batch": 1, "length": 4096, "heads": 8, "kv_heads": 1, "dtype": "bfloat16"}
KERNELS = ("ssd_forward", "ssd_states", "ssd_backward", "peer_scan_forward", "peer_scan_backward")
SIZES = ((64, 64), (128, 64), (128, 128))
COLUMNS = ("registers", "spill_stores", "spill_loads", "shared_memory", "hgmma")


def jobs() -> list[dict]:
    return [
        {**SHAPE, "kernel": kernel, "head_dim": D, "value_dim": P}
        for D, P in SIZES
        for kernel in KERNELS
    ]


def main() -> int:
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
    table = Table(title="Chunked scans on an H100, compiled and not run", caption=NOTE)
    for title in ("job", "D", "P", "kernel", *COLUMNS, "loop hgmma", "issue cycles", "warnings"):
        table.add_column(title.replace("_", " "))
    records = []
    for job, report in zip(jobs(), reports, strict=True):
        records.append({"job": job, **report})
        names = [job[c] for c in ("kernel", "head_dim", "value_dim")]
        for kernel in report.get("kernels", []):
            loop = kernel["loop"] or {}
            figures = [kernel["name"], *(kernel[c] for c in COLUMNS)]
            figures += [loop.get("hgmma"), loop.get("issue_cycles"), " ".join(kernel["warnings"])]
            table.add_row(*map(str, names + figures))
        if "error" in report:
            table.add_row(*map(str, names), report["error"][:60])
    console.print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"note": NOTE, "rows": records}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
