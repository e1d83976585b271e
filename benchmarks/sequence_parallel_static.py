"""What sequence-parallel ops send and hold on TPU slices that are not here.

    python -m benchmarks.sequence_parallel_static                     # all rows, a few minutes
    python -m benchmarks.sequence_parallel_static --topologies v5p:2x2x2 --ops ring all_scan

Every row is the whole compiled program of an op and its gradients for one device of a slice:
exact counts of bytes sent and held. NOTHING HERE RAN ON A DEVICE, and there is no model of links.
`between` counts the operations that the compiler put between a transfer's start and its end: that
they are there is what can hide the transfer, not that it is hidden.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import aot_tpu
from benchmarks.tpu_static import versions

RESULTS = (
    Path(__file__).resolve().parent.parent
    / "results"
    / "benchmarks"
    / "sequence_parallel_tpu_static.json"
)
TOPOLOGIES = ("v5e:2x4", "v5p:2x2x2", "v5p:4x4x4", "v6e:4x4")
ATTENTION = ("ring", "ulysses", "usp", "all_gather")
SCANS = ("all_scan", "chain", "all_gather_states", "log_step")
TOKENS = 4096  # of a device
HEADS = ("topology", "devices", "op", "sent_mib", "messages", "between", "temp_mib", "kernels")


def compile_row(topology: str, op: str, tokens: int = TOKENS) -> dict:
    """One row, in this process, whose environment is `aot_tpu.environment()`."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from ops import masks
    from ops.sequence_parallel import ATTENTION as ATTENDING
    from ops.sequence_parallel import scans
    from training.collectives import collectives

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    n, B = len(devices), 1
    mesh = jax.sharding.Mesh(np.array(devices), ("sequence",))
    time = P(None, "sequence")
    if op in ATTENTION:
        H, G, D = 32, 8, 128
        part = functools.partial(
            ATTENDING[op], mask=masks.Causal(), balance="zigzag" if op == "ring" else "contiguous"
        )
        shapes = [(B, n * tokens, heads, D) for heads in (H, G, G)]
    else:
        H, D = 16, 128
        kind = op.removesuffix("_states")
        part = lambda *arrays: scans.gated_linear_attention(*arrays, kind=kind)[0]
        shapes = [(B, n * tokens, H, D)] * 3 + [(B, n * tokens, H)]
    where = NamedSharding(mesh, time)
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=where) for s in shapes]
    if op not in ATTENTION:
        arrays[3] = jax.ShapeDtypeStruct(shapes[3], jnp.float32, sharding=where)
    call = jax.shard_map(part, mesh=mesh, in_specs=time, out_specs=time, check_vma=False)

    def gradients(*arrays):
        o, pull = jax.vjp(call, *arrays)
        return pull(jnp.ones_like(o))

    traced = jax.jit(gradients).trace(*arrays)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    found = collectives(text)
    return {
        "topology": topology,
        "devices": n,
        "op": op,
        "tokens": tokens,
        "sent_bytes": sum(c.sent_bytes or 0 for c in found),
        "remote_copies": 2 * B * H * D * D * 4 if op == "all_scan" else 0,
        "unknown_loops": sum(c.times is None for c in found),
        "collectives": [
            {"kind": c.kind, "times": c.times, "operand_bytes": c.operand_bytes} for c in found
        ],
        "between": between(text),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": sorted(
            {
                re.sub(r"(\.\d+)+$", "", name)
                for name in re.findall(r'%(\S+) = [^\n]*custom_call_target="tpu_custom_call"', text)
            }
        ),
    }


def between(text: str) -> list[int]:
    """Operations that compute, between the start and the end of each transfer of a program."""
    counts, open_since, computing = [], {}, 0
    for line in text.splitlines():
        if re.match(r"(ENTRY )?%\S+ \(.*\{$", line):
            open_since, computing = {}, 0
        start = re.search(r"%(\S+) = .* (?:collective-permute|all-gather|async)-start\(", line)
        end = re.search(r"(?:collective-permute|all-gather|async)-done\([^%]*%([\w.\-]+)", line)
        if start:
            open_since[start[1]] = computing
        elif end and end[1] in open_since:
            counts.append(computing - open_since.pop(end[1]))
        elif re.search(r" (fusion|custom-call|convolution|while|conditional|call)\(", line):
            computing += 1
    return counts


def rows_of(jobs: list[tuple[str, str]], write) -> None:
    """Compiles each (topology, op) in a process of its own and hands its row to `write`."""
    for topology, op in jobs:
        code = (
            "import json\n"
            "from benchmarks.sequence_parallel_static import compile_row\n"
            f"print('ROW ' + json.dumps(compile_row({topology!r}, {op!r})))"
        )
        child = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=Path(__file__).resolve().parent.parent,
            env=aot_tpu.environment(),
        )
        found = re.search(r"^ROW (.*)$", child.stdout, re.M)
        if found is None:
            tail = child.stderr.strip().splitlines()[-1:] or ["no message"]
            write({"topology": topology, "op": op, "error": tail[0][:500]})
        else:
            write(json.loads(found[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES))
    parser.add_argument("--ops", nargs="+", choices=(*ATTENTION, *SCANS), default=None)
    arguments = parser.parse_args()
    if not aot_tpu.available():
        parser.error('libtpu is not installed; pip install "tilescan[dev]" brings it')
    jobs = [(t, op) for t in arguments.topologies for op in arguments.ops or (*ATTENTION, *SCANS)]
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []

    def write(row):
        same = lambda old: (old["topology"], old["op"]) == (row["topology"], row["op"])
        kept[:] = [old for old in kept if not same(old)] + [row]
        order = [*TOPOLOGIES, *arguments.topologies], (*ATTENTION, *SCANS)
        kept.sort(key=lambda r: (order[0].index(r["topology"]), order[1].index(r["op"])))
        RESULTS.write_text(json.dumps({"versions": versions(), "rows": kept}, indent=1) + "\n")
        print(row["topology"], row["op"], row.get("error", "compiled"), flush=True)

    rows_of(jobs, write)
    show(kept)


def show(rows: list[dict]) -> None:
    """Prints the table."""
    table = Table(title="Gradients of one layer on TPU slices, per device (compiled, never run)")
    for head in HEADS:
        table.add_column(head)
    for r in rows:
        if "error" in r:
            table.add_row(r["topology"], "", r["op"], r["error"])
            continue
        messages = sum(c["times"] or 0 for c in r["collectives"])
        sent = (r["sent_bytes"] + r["remote_copies"]) / 2**20
        table.add_row(
            r["topology"], str(r["devices"]), r["op"], f"{sent:.1f}",
            str(messages), " ".join(map(str, r["between"])), f"{r['temp_bytes'] / 2**20:.0f}",
            " ".join(r["kernels"]),
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
