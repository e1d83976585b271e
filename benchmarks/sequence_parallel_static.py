"""What sequence-parallel ops send and hold on TPU slices that are not attached.

    python -m tilescan.benchmarks.sequence_parallel_static  # all rows, a few minutes
    python -m tilescan.benchmarks.sequence_parallel_static --topologies v5p:2x2x2 --ops ring

Every row is the whole compiled program of an op and its gradients for one device of a slice:
exact counts of bytes sent and held. NOTHING HERE RAN ON A DEVICE, and there is no model of links.
`between` counts the operations that the compiler put between a transfer's start and its end: that
they are there is what can hide the transfer, not that it is hidden.
`ring_kernels` is the ring whose transfers run inside the attention kernels: of it, and of all_scan,
`remote_copies` are the bytes that kernels send.

    python -m tilescan.benchmarks.sequence_parallel_static --cycles

counts the cycles of the attention kernels with a transfer inside beside those of the same kernels
without one, as libtpu's static profile has them. It takes a copy to another chip for one to this
chip's own memory: no links, no neighbor that is late. So the difference is what starting copies
and the grid's order cost a kernel, as far as it exceeds what the compiler's schedule varies by, and
not what a transfer costs or hides.
"""

import argparse
import glob
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tilescan.benchmarks.tpu_static import versions
from tilescan.planning import aot_tpu, topologies
from tilescan.planning.compiled import memory as program_memory

RESULTS = (
    Path(__file__).resolve().parent.parent
    / "results"
    / "benchmarks"
    / "sequence_parallel_tpu_static.json"
)
TOPOLOGIES = ("v5e:2x4", "v5p:2x2x2", "v5p:4x4x4", "v6e:4x4")
ATTENTION = ("ring", "ring_kernels", "ulysses", "usp", "all_gather")
SCANS = ("all_scan", "chain", "all_gather_states", "log_step")
TOKENS = 4096  # of a device
# One device's shard in `--cycles`: all of its keys seen, since the profile knows no values.
CYCLES = {"topologies": ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"), "tokens": 2048, "heads": (4, 2)}
HEADS = ("topology", "devices", "op", "sent_mib", "messages", "between", "temp_mib", "kernels")


def compile_row(topology: str, op: str, tokens: int = TOKENS) -> dict:
    """Compiles an op in this process, in `aot_tpu.environment()`, and returns its row."""
    import functools

    from tilescan.ops import masks
    from tilescan.ops.sequence_parallel import ATTENTION as ATTENDING
    from tilescan.ops.sequence_parallel import scans
    from tilescan.training.collectives import collectives, remote_kernels

    B = 1
    devices = topologies.tpus(topology)
    n = len(devices)
    if op in ATTENTION:
        H, G, D = 32, 8, 128
        kind = op.removesuffix("_kernels")
        op_of_shards = functools.partial(
            ATTENDING[kind],
            mask=masks.Causal(),
            balance="zigzag" if kind == "ring" else "contiguous",
            **({} if kind == op else {"transfers": "kernel"}),
        )
        shapes = [(B, n * tokens, heads, D) for heads in (H, G, G)]
    else:
        H, D = 16, 128
        kind = op.removesuffix("_states")
        op_of_shards = lambda *arrays: scans.gated_linear_attention(*arrays, kind=kind)[0]
        shapes = [(B, n * tokens, H, D)] * 3 + [(B, n * tokens, H)]
    dtypes = ["bfloat16"] * 3 + ["float32"] * (len(shapes) - 3)
    compiled = _gradients(op_of_shards, devices, shapes, dtypes)
    # What it sends: XLA's collectives, and the remote copies of kernels.
    text = compiled.as_text()
    found = collectives(text)
    remote = 2 * B * H * D * D * 4 if op == "all_scan" else 0
    if op == "ring_kernels":
        # A kernel's results are its own and what it receives, which is as much as it sends.
        own = {
            "forward": B * H * tokens * (2 * D + 4),
            "dkv": 2 * B * G * tokens * 2 * D,
            "dq": B * H * tokens * 2 * D,
        }
        sending = remote_kernels(text)
        remote = sum(c.times * (c.operand_bytes - own[_kernel(c.name)]) for c in sending)
    return {
        "topology": topology,
        "devices": n,
        "cores": devices[0].num_cores,
        "op": op,
        "tokens": tokens,
        "sent_bytes": sum(c.sent_bytes or 0 for c in found),
        "remote_copies": remote,
        "unknown_loops": sum(c.times is None for c in found),
        "collectives": [
            {"kind": c.kind, "times": c.times, "operand_bytes": c.operand_bytes} for c in found
        ],
        "between": between(text),
        "temp_bytes": program_memory(compiled).temporaries,
        "kernels": sorted(
            {
                re.sub(r"(\.\d+)+$", "", name)
                for name in re.findall(r'%(\S+) = [^\n]*custom_call_target="tpu_custom_call"', text)
            }
        ),
    }


def _gradients(op_of_shards, devices, shapes, dtypes):
    """Returns the compiled gradients of an op, of arrays sharded along time over devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh, time = jax.sharding.Mesh(np.array(devices), ("sequence",)), P(None, "sequence")
    sharding = NamedSharding(mesh, time)
    arrays = [
        jax.ShapeDtypeStruct(s, d, sharding=sharding) for s, d in zip(shapes, dtypes, strict=True)
    ]
    call = jax.shard_map(op_of_shards, mesh=mesh, in_specs=time, out_specs=time, check_vma=False)

    def gradients(*arrays):
        o, pull = jax.vjp(call, *arrays)
        return pull(jnp.ones_like(o))

    return jax.jit(gradients).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()


def _kernel(name: str) -> str:
    return re.search(r"flash_attention_(forward|dkv|dq)", name)[1]


def cycles_row(topology: str, folder: str) -> dict:
    """Returns {kernel: [cycles without a transfer, with one]}, in a process that profiles into a
    folder.
    """
    devices = topologies.tpus(topology)
    found: dict[str, list[int]] = {kernel: [] for kernel in ("forward", "dkv", "dq")}
    for kernel, sends in itertools.product(found, (False, True)):
        _one_call(kernel, sends, devices)
        for path in map(Path, glob.glob(folder + "/*_static_llo_profile.textproto")):
            entries = re.findall(
                r'hlo_op_name: "flash_attention_[^"]+"\s+estimated_cycles: (\d+)', path.read_text()
            )
            found[kernel] += map(int, entries)
            path.unlink()
    return {"topology": topology, "cores": devices[0].num_cores, "cycles": found}


def _one_call(kernel: str, sends: bool, devices):
    """Compiles a round's call of one kernel alone, with or without the transfer inside."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from tilescan.ops import attention_tpu, masks
    from tilescan.ops.sequence_parallel.ring_attention_tpu import Transfers
    from tilescan.pallas_kernels.tpu import flash_attention as kernels

    mesh = jax.sharding.Mesh(np.array(devices), ("sequence",))
    (H, G), T, D = CYCLES["heads"], CYCLES["tokens"] * len(devices), 128
    wide, row = P(None, None, "sequence"), P(None, None, None, "sequence")
    shapes = dict(
        q=(H, T, D), k=(G, T, D), v=(G, T, D), do=(H, T, D), lse=(H, 1, T), delta=(H, 1, T)
    )
    shapes |= dict(dk=(G, T, D), dv=(G, T, D)) if kernel == "dq" else {}
    if kernel == "forward":
        shapes = {name: shapes[name] for name in "qkv"}
    specs = {name: row if shape[1] == 1 else wide for name, shape in shapes.items()}
    arrays = {
        name: jax.ShapeDtypeStruct(
            (1, *shape),
            jnp.float32 if name in ("lse", "delta", "dk", "dv") else jnp.bfloat16,
            sharding=NamedSharding(mesh, specs[name]),
        )
        for name, shape in shapes.items()
    }

    def kernel_of_shards(arrays):
        q, k, v = (arrays[name] for name in "qkv")
        rest = [arrays[name] for name in ("do", "lse", "delta") if name in arrays]
        sent = [arrays[name] for name in (("dk", "dv") if kernel == "dq" else ("k", "v"))]
        plan = attention_tpu.plan_for(
            kernel, *(x.swapaxes(1, 2) for x in (q, k, v)), masks.Full(), 0
        )
        call = kernels.forward if kernel == "forward" else getattr(kernels, f"backward_{kernel}")
        results = call(
            q, k, v, *rest, plan.schedule, plan.tile, plan.scores(D**-0.5, None),
            carry=Transfers.along("sequence").carry(sent, 1 if sends else 0),
            vmem_limit=attention_tpu.VMEM_LIMIT,
        )  # fmt: skip
        return tuple(results)

    out = {"forward": (wide, row), "dkv": (wide, wide), "dq": (wide,)}[kernel]
    out += (wide, wide) if sends else ()
    call = jax.shard_map(
        kernel_of_shards, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False
    )
    return jax.jit(call).trace(arrays).lower(lowering_platforms=("tpu",)).compile()


def between(text: str) -> list[int]:
    """Counts the operations that compute between each transfer's start and end in a program."""
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


def rows_of(
    jobs: list[tuple[str, str]], write: Callable[[dict], None], tokens: int = TOKENS
) -> None:
    """Compiles each (topology, op) in a process of its own and calls `write` with its row."""
    for topology, op in jobs:
        row = _in_process(f"compile_row({topology!r}, {op!r}, {tokens})", aot_tpu.environment())
        write({"topology": topology, "op": op, **row} if "error" in row else row)


def cycles_of(slices: Iterable[str]) -> list[dict]:
    """Returns rows of `cycles_row`; "error" where the profiler has no model."""
    rows = []
    for topology in slices:
        with tempfile.TemporaryDirectory() as folder:
            call = f"cycles_row({topology!r}, {folder!r})"
            row = _in_process(call, aot_tpu.environment(profile_dir=folder))
        rows.append({"topology": topology, **row})
    return rows


def _in_process(call: str, environment: dict[str, str]) -> dict:
    """Returns what a function of this module returns in a process of its own, or its error."""
    code = (
        "import json\n"
        "import tilescan.benchmarks.sequence_parallel_static as module\n"
        f"print('ROW ' + json.dumps(module.{call}))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
        env=environment,
    )
    found = re.search(r"^ROW (.*)$", child.stdout, re.M)
    if found is not None:
        return json.loads(found[1])
    lines = child.stderr.strip().splitlines() or ["no message"]
    reasons = [line for line in lines if re.match(r"\S*Error: |F\d{4} ", line)]
    return {"error": (reasons or lines)[-1][:500]}


def main() -> None:
    """Compiles the rows that the command line asks for, writes each, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES))
    parser.add_argument("--ops", nargs="+", choices=(*ATTENTION, *SCANS), default=None)
    parser.add_argument("--cycles", action="store_true", help="of kernels that send, alone")
    arguments = parser.parse_args()
    if not aot_tpu.available():
        parser.error('libtpu is not installed; pip install "tilescan[dev]" brings it')
    jobs = [(t, op) for t in arguments.topologies for op in arguments.ops or (*ATTENTION, *SCANS)]
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept, cycles = record.get("rows", []), record.get("cycles", {})

    def save():
        record = {"versions": versions(), "rows": kept, "cycles": cycles}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")

    if arguments.cycles:
        cycles = {
            "what": "[without a transfer, with one], Full, bfloat16, D = 128, static profile",
            "tokens": CYCLES["tokens"],
            "heads": CYCLES["heads"],
            "rows": cycles_of(CYCLES["topologies"]),
        }
        save()
        print(json.dumps(cycles, indent=1))
        return

    def write(row):
        same = lambda old: (old["topology"], old["op"]) == (row["topology"], row["op"])
        kept[:] = [old for old in kept if not same(old)] + [row]
        order = [*TOPOLOGIES, *arguments.topologies], (*ATTENTION, *SCANS)
        kept.sort(key=lambda r: (order[0].index(r["topology"]), order[1].index(r["op"])))
        save()
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
