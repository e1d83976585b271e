"""Static figures of the GPU scan kernels, beside jax-linear-attention's:
python -m tilescan.benchmarks.scans_gpu_static

Registers, spills, shared memory and machine code for an H100, with no GPU: see planning/aot_gpu.
The figures are static and nothing ran on a device. Issue cycles are what one warp needs to issue
one pass of the loop with the most matrix instructions, and kernels divide the work differently, so
they say nothing about speed. The interpreter named by --python needs XLA's CUDA plugin. The peer
asks for JAX 0.11.2, with which its kernels of decays by key dim compile: the one named by
--peer-python needs that JAX, its CUDA plugin and
`pip install --no-deps jax-linear-attention==0.1.0`; without it the peer's rows are errors.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tilescan.planning import aot_gpu

OUTPUT = Path(__file__).resolve().parent.parent / "results" / "benchmarks" / "scans_gpu_static.json"
NOTE = (
    "Static figures from ptxas for an H100; nothing ran on a device. Issue cycles: one warp, one "
    "pass of its busiest loop, without latencies of wgmma and memory; kernels divide the work "
    "differently. ssd: decays by head, G = 1; gla: by key dim, G = H; H = 8, T = 4096. The loop of "
    "gla_scores and gla_gradients is over the 6 halves of one tile of a chunk. peer: "
    "jax-linear-attention's simple_gla and gla, by its own JAX; its gla is several kernels."
)
SHAPE = {"batch": 1, "length": 4096, "heads": 8, "dtype": "bfloat16"}
KERNELS = {
    "ssd_forward": 1,
    "ssd_states": 1,
    "ssd_backward": 1,
    "peer_scan_forward": 1,
    "peer_scan_backward": 1,
    "gla_scores": 8,
    "gla_forward": 8,
    "gla_states": 8,
    "gla_back": 8,
    "gla_gradients": 8,
    "peer_gla_forward": 8,
    "peer_gla_backward": 8,
}  # and key-value heads
SIZES = ((64, 64), (128, 64), (128, 128))
COLUMNS = ("registers", "spill_stores", "spill_loads", "shared_memory", "hgmma")


def jobs(D: int, P: int, peer: bool) -> list[dict]:
    """Returns the jobs of one pair of head dims, of this project's kernels or the peer's."""
    sizes = {**SHAPE, "head_dim": D, "value_dim": P}
    chosen = {name: G for name, G in KERNELS.items() if name.startswith("peer") == peer}
    return [{**sizes, "kernel": name, "kv_heads": G} for name, G in chosen.items()]


def main() -> int:
    """Compiles all kernels, prints their table and writes the record; returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="an interpreter that has XLA's CUDA plugin")
    parser.add_argument("--peer-python", help="one that has the peer too; --python by default")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    console = Console()
    console.width = max(console.width, 132)
    pairs = []
    try:
        for size in SIZES:
            for peer, python in ((False, options.python), (True, options.peer_python)):
                some = jobs(*size, peer)
                # Processes of their own: a kernel that two jobs share is compiled once in each.
                reports = aot_gpu.compile_jobs(some, python or options.python)
                pairs += zip(some, reports, strict=True)
    except RuntimeError as error:
        console.print(str(error), markup=False)
        return 1
    table = Table(title="Chunked scans on an H100, compiled and not run", caption=NOTE)
    for title in ("job", "D", "P", "kernel", *COLUMNS, "loop hgmma", "issue cycles", "warnings"):
        table.add_column(title.replace("_", " "))
    records = []
    for job, report in pairs:
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
