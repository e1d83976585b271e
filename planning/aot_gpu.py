"""Compiles Mosaic GPU kernels for an H100 that is not attached, and reads the compiler's figures.

XLA's CUDA plugin compiles for a described device; no GPU and no driver are needed. Registers,
spills and warnings come from ptxas, shared memory from the kernel's launch, and the rest is counted
in the machine code. All of it is static: it says that a kernel builds and what it occupies, not how
long it runs, and nothing here runs on a device.

The compile happens in a child process, since the environment has to be set before JAX is imported,
and since kernels are cached by their code, not by the device they were compiled for. The child is
`python -m tilescan.planning.aot_gpu`: it reads one JSON job a line and answers with one JSON
report a line. The interpreter may be another one than the caller's: set TILESCAN_CUDA_PYTHON to one
that has the plugin where the current one has not.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tilescan
from tilescan.planning import topologies

Built = tuple[Callable, tuple]  # a function and the shapes of its arguments
ROOT = Path(tilescan.__file__).parents[1]  # what a child process must find
INSTALL = (
    "pip install jax==0.12.0.1 jax-cuda13-plugin==0.12.0.1 jax-cuda13-pjrt==0.12.0.1 "
    "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm absl-py jaxtyping"
)
NEEDS = (
    "compiling for CUDA needs an interpreter with XLA's CUDA plugin, and without nvidia-nvjitlink "
    f"(with it ptxas ignores setmaxnreg and kernels spill). In a fresh environment: {INSTALL}\n"
    "then name its python by the environment variable TILESCAN_CUDA_PYTHON"
)


def cuda_python(python: str | None = None) -> str | None:
    """Returns the interpreter that can compile for CUDA, None if there is none.

    It is `python`, or else TILESCAN_CUDA_PYTHON, or else this one.
    """
    python = python or os.environ.get("TILESCAN_CUDA_PYTHON") or sys.executable
    probe = (
        "import importlib.util as u, sys;"
        "sys.exit(not (u.find_spec('jax_cuda13_plugin') and u.find_spec('nvidia.cu13')))"
    )
    try:
        found = subprocess.run([python, "-c", probe], capture_output=True, timeout=60)
    except OSError:
        return None
    return python if found.returncode == 0 else None


def compile_jobs(jobs: list[dict], python: str | None = None, timeout: float = 600) -> list[dict]:
    """Compiles each job for an H100; returns one report a job, in order.

    A job is {"kernel": "forward" | "dkv" | "dk" | "dv" | "dq" | "stock_forward" |
    "stock_backward", "batch", "length", "heads", "kv_heads", "head_dim", "dtype", "mask": "full" |
    "causal", "blocks": {...} or absent}; or {"kernel": "op", ...} for all the kernels that
    `ops.attention_gpu` picks, with "mask" a name of `masks_of` and, where wanted, "value_dim",
    "logit_cap" and "bias" (its shape; it is float32); or {"kernel": "ssd_forward" | "ssd_states" |
    "ssd_backward" | "gla_scores" | "gla_forward" | "gla_states" | "gla_back" | "gla_gradients" |
    "peer_scan_forward" | "peer_scan_backward" | "peer_gla_forward" | "peer_gla_backward", ...} with
    "value_dim" and without "mask"; the peer's are kernels of the package jax-linear-attention,
    which the interpreter has to have. A report is {"kernels": [...], "versions": {...}} or
    {"error": text}.

    Raises:
        RuntimeError: no interpreter with the plugin (the text says how to get one), or the child
            died.
    """
    found = cuda_python(python)
    if found is None:
        raise RuntimeError(NEEDS)
    reports: list[dict] = []
    while len(reports) < len(jobs):  # a child ends at its first error, which spoils its dump folder
        reports += _run_child(found, jobs[len(reports) :], timeout)
    return reports


def _run_child(python: str, jobs: list[dict], timeout: float) -> list[dict]:
    """Returns reports of the first jobs, up to and with the first error."""
    with tempfile.TemporaryDirectory(prefix="aot_gpu") as dump:
        env = dict(os.environ, JAX_PLATFORMS="cpu", MOSAIC_GPU_DUMP_TO=dump, PYTHONPATH=str(ROOT))
        for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
            env.pop(name, None)
        child = subprocess.run(
            [python, "-m", "tilescan.planning.aot_gpu"],
            input="\n".join(map(json.dumps, jobs)),
            capture_output=True,
            text=True,
            env=env,
            cwd=ROOT,
            timeout=timeout,
        )
    reports = [json.loads(line[1:]) for line in child.stdout.splitlines() if line[:1] == "@"]
    if not reports or (len(reports) < len(jobs) and "error" not in reports[-1]):
        raise RuntimeError(
            f"the compiler process ended after {len(reports)} of {len(jobs)} jobs with code "
            f"{child.returncode}: {child.stderr[-2000:]}"
        )
    return reports


def main_loop(listing: str) -> dict | None:
    """Returns figures of the innermost loop with most matrix instructions in the fewest steps.

    That is the loop over full tiles: the one over partial tiles has its masking on top.

    Args:
        listing: disassembly whose lines start with the control codes, "a:b:c:d:STALL /*addr*/
            instr".

    Returns:
        hgmma, instructions, issue_cycles (the sum of the stall counts on one warp's path through
        the body and nothing else: latencies of memory and of wgmma are not in it), mufu
        (exponentials and the like), local_memory (loads and stores of spilled values); None without
        such a loop.
    """
    blocks, edges = _basic_blocks(listing)
    loops = _natural_loops(edges)

    def matrix(members: set[int]) -> int:
        return sum("HGMMA" in text for b in members for _, text in blocks[b])

    busy = {head: members for head, members in loops.items() if matrix(members)}
    idle = [members for head, members in loops.items() if head not in busy]
    best = None
    for members in busy.values():
        if any(other < members for other in busy.values()):
            continue  # a loop around another one
        # Loops that wait for a barrier are not on the path of a warp that finds it open.
        path = members - set().union(*(m for m in idle if m < members))
        body = [entry for b in path for entry in blocks[b]]
        figures = {
            "hgmma": sum("HGMMA" in t for _, t in body),
            "instructions": len(body),
            "issue_cycles": sum(stall for stall, _ in body),
            "mufu": sum("MUFU" in t for _, t in body),
            "local_memory": sum(bool(re.search(r"\b(STL|LDL)", t)) for _, t in body),
        }
        rank = (figures["hgmma"], -len(body))
        if best is None or rank > best[0]:
            best = rank, figures
    return best and best[1]


def _basic_blocks(listing: str) -> tuple[list[list[tuple[int, str]]], list[list[int]]]:
    """Returns (instructions with stall counts, successors) of each basic block; 0 is the entry."""
    # Blocks begin at labels and end at branches.
    blocks: list[list[tuple[int, str]]] = [[]]
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif found := re.match(r"\s*\S+:\S+:\S+:\S+:(\d+)\s+/\*[0-9a-f]+\*/\s+(.*)", line):
            blocks[-1].append((int(found[1]), found[2]))
            if re.search(r"\b(BRA|EXIT|RET)\b", found[2]):
                blocks.append([])

    # Successors: targets of the last branch, and the next block where that may fall through.
    edges = []
    for i, block in enumerate(blocks):
        last = block[-1][1] if block else ""
        targets = re.findall(r"\bBRA\b.*?(\.L_x_\d+)", last)
        after = [labels[t] for t in targets if t in labels]
        # "BRA.DIV" and branches with a condition go on to the next block as well.
        conditional = re.match(r"@|BRA\.DIV", last) or re.search(r"BRA\S*\s+!?U?P\d", last)
        stops = re.search(r"\b(BRA|EXIT|RET)\b", last) and not conditional
        if not stops and i + 1 < len(blocks):
            after.append(i + 1)
        edges.append(after)
    return blocks, edges


def _natural_loops(edges: list[list[int]]) -> dict[int, set[int]]:
    """Returns members of each natural loop by its head.

    Back edges are those whose target dominates them.
    """
    # Dominators of each block, by iteration to the fixed point.
    n = len(edges)
    before: list[list[int]] = [[] for _ in range(n)]
    for i, targets in enumerate(edges):
        for t in targets:
            before[t].append(i)
    everything = set(range(n))
    dominators = [{0}] + [everything] * (n - 1)
    changed = True
    while changed:
        changed = False
        for i in range(1, n):
            known = [dominators[p] for p in before[i]]
            new = {i} | (set.intersection(*known) if known else everything)
            if new != dominators[i]:
                dominators[i], changed = new, True

    # From each back edge's source backward to the head.
    loops: dict[int, set[int]] = {}
    for i, targets in enumerate(edges):
        for head in targets:
            if head not in dominators[i]:
                continue
            members, todo = loops.setdefault(head, {head}), [i]
            while todo:
                b = todo.pop()
                if b not in members:
                    members.add(b)
                    todo += before[b]
    return loops


def read_dump(dump: str) -> list[dict]:
    """Reads one report a kernel from the files that Mosaic GPU leaves in its dump folder."""
    kernels = []
    for path in sorted(glob.glob(f"{dump}/*.ptxas")):
        log = Path(path).read_text(errors="ignore")
        name = re.sub(r"_\d+$", "", Path(path).stem)
        # Several kernels are compiled in another order than the one their launches are numbered by.
        launches = glob.glob(f"{dump}/{name}_*.resources.txt")
        same_number = path.replace(".ptxas", ".resources.txt")
        resources = Path(launches[0] if len(launches) == 1 else same_number).read_text()
        listing = Path(path.replace(".ptxas", ".sass_ctrl")).read_text(errors="ignore")
        spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        kernels.append(
            {
                "name": name,
                "registers": int(re.search(r"Used (\d+) registers", log)[1]),
                "spill_stores": int(spill[1]),
                "spill_loads": int(spill[2]),
                "shared_memory": int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1]),
                "warnings": sorted(set(re.findall(r"\((C7\d\d\d)\)", log))),
                "hgmma": len(re.findall(r"\bHGMMA", listing)),
                "loop": main_loop(listing),
            }
        )
    return kernels


def _build(job: dict[str, Any]) -> Built:
    """Returns (function, argument shapes) of a job."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.dtype(job["dtype"])
    batch, length, heads, dim = (job[n] for n in ("batch", "length", "heads", "head_dim"))
    shape = jax.ShapeDtypeStruct
    q = shape((batch, length, heads, dim), dtype)
    kv = shape((batch, length, job["kv_heads"], dim), dtype)
    if job["kernel"].startswith("stock"):
        return _build_stock(job, q, kv)
    if job["kernel"] == "op":
        return _build_op(job, q, kv)
    if job["kernel"].startswith("ssd"):
        return _build_ssd(job, q, kv)
    if job["kernel"].startswith("gla"):
        return _build_gla(job, q, kv)
    if job["kernel"].startswith("peer_scan"):
        return _build_peer_scan(job, q, kv)
    if job["kernel"].startswith("peer_gla"):
        return _build_peer_gla(job, q, kv)

    # Our attention's kernels one by one, with the mask and blocks of the job.
    from tilescan.pallas_kernels import gpu

    causal = job["mask"] == "causal"
    blocks = gpu.BlockSizes(**job["blocks"]) if job.get("blocks") else None
    cap = job.get("logit_cap")

    def seen(q_index, k_index, q_ids, k_ids):
        return k_index <= q_index

    def options(kind: str, table: Any) -> dict[str, Any]:
        transposed = kind in ("dkv", "dk", "dv")
        schedule = gpu.attention_schedule(
            length, length, table, before=None, after=0 if causal else None, transposed=transposed
        )
        return {
            "schedule": schedule,
            "visible": seen if causal else None,
            "q_offset": 0,
            "scale": dim**-0.5,
            "logit_cap": cap,
            "blocks": table,
        }

    kind = job["kernel"]
    table = blocks or gpu.default_blocks(kind, dim, dim)
    if kind == "forward":
        return lambda *a: gpu.flash_attention_forward(*a, **options(kind, table)), (q, kv, kv)
    rows = shape((batch, heads, length), jnp.float32)
    kernel = gpu.flash_attention_dq
    if kind != "dq":
        wanted = {"want_dk": "k" in kind, "want_dv": "v" in kind}
        kernel = functools.partial(gpu.flash_attention_dkv, **wanted)
    return lambda *a: kernel(*a, **options(kind, table)), (q, kv, kv, q, rows, rows)


def masks_of(length: int, ids: Any) -> dict[str, Any]:
    """Returns masks by name, one for each kind that kernels tell apart.

    Args:
        length: T, of queries and keys.
        ids: of packed segments, int32 [B, T].
    """
    import numpy as np

    from tilescan.ops import masks

    layout = np.tri(-(-length // 128), dtype=bool)
    layout[2:, 0] = False
    return {
        "full": masks.Full(),
        "causal": masks.Causal(),
        "window": masks.SlidingWindow(200, 70),
        "prefix": masks.Causal() | masks.Prefix(150),
        "lambda": masks.Lambda(30, 200),
        "packed": masks.Causal() & masks.Segments(ids),
        "packed_window": masks.SlidingWindow(200, 70) & masks.Segments(ids),
        "sparse": masks.Causal() & masks.BlockSparse(layout, 128),
    }


def _build_op(job: dict[str, Any], q: Any, kv: Any) -> Built:
    """Builds forward and backward as the op calls them; the last query's position is traced."""
    import jax
    import jax.numpy as jnp

    from tilescan.ops import attention_gpu

    shape = jax.ShapeDtypeStruct
    value_dim = job.get("value_dim", job["head_dim"])
    v, o = shape((*kv.shape[:3], value_dim), q.dtype), shape((*q.shape[:3], value_dim), q.dtype)
    row = shape(q.shape[:3], jnp.float32)
    bias = shape(tuple(job["bias"]), jnp.float32) if job.get("bias") else None
    ids_and_offset = shape(q.shape[:2], jnp.int32), shape((), jnp.int32)
    options = {"scale": 0.1, "logit_cap": job.get("logit_cap")}

    def run(q, k, v, o, lse, do, bias, ids, offset):
        mask = masks_of(q.shape[1], ids)[job["mask"]]
        arguments = q, k, v, bias, mask, 0 if job["mask"] == "sparse" else offset
        reason = attention_gpu.unsupported(*arguments)
        if reason is not None:
            raise ValueError(reason)
        forward = attention_gpu.forward(*arguments, **options)
        return forward, attention_gpu.backward(*arguments, o, lse, do, lse, **options)

    return run, (q, kv, v, o, row, o, bias, *ids_and_offset)


def _build_ssd(job: dict[str, Any], q: Any, kv: Any) -> Built:
    """Builds a kernel of the scan whose key dims share a decay."""
    import jax
    import jax.numpy as jnp

    from tilescan.pallas_kernels.gpu import ssd

    shape, (B, T, H, D), P = jax.ShapeDtypeStruct, q.shape, job["value_dim"]
    v = shape((B, T, H, P), q.dtype)
    lines = shape((B, H, 4, T), jnp.float32)
    state = shape((B, H, P, D), jnp.float32)
    if job["kernel"] == "ssd_forward":
        return ssd.forward, (q, kv, v, lines, state)
    if job["kernel"] == "ssd_states":
        return lambda *a: ssd.forward(None, *a, want_states=True), (kv, v, lines, state)
    states = shape((B, H, T // ssd.CHUNK, P, D), q.dtype)
    return ssd.backward, (q, kv, v, lines, states, v, state)


def _build_gla(job: dict[str, Any], q: Any, kv: Any) -> Built:
    """Builds a kernel of the scan whose key dims have decays of their own."""
    import jax
    import jax.numpy as jnp

    from tilescan.pallas_kernels.gpu import gla

    shape, (B, T, H, D), P = jax.ShapeDtypeStruct, q.shape, job["value_dim"]
    N, v = T // gla.CHUNK, shape((B, T, H, P), q.dtype)
    A = shape((B, H, N, gla.CHUNK, gla.CHUNK), q.dtype)
    whole, state = shape((B, H, N, D), jnp.float32), shape((B, H, P, D), jnp.float32)
    states = shape((B, H, N, P, D), q.dtype)

    def walk(reader, A, *rest):
        reverse, want_states = job["kernel"] == "gla_back", job["kernel"] != "gla_forward"
        writer, values, whole, state = rest
        options = {"want_states": want_states, "reverse": reverse}
        return gla.walk(reader, writer, values, A, whole, state, **options)

    if job["kernel"] == "gla_scores":
        return lambda *a: gla.scores(*a, H), (q, kv, q, q)
    if job["kernel"] == "gla_gradients":
        return gla.gradients, (q, kv, v, q, q, v, whole, states, states)
    if job["kernel"] == "gla_states":
        return lambda *a: walk(None, None, *a), (q, v, whole, state)
    return walk, (q, A, q, v, whole, state)


def _build_peer_scan(job: dict[str, Any], q: Any, kv: Any) -> Built:
    """Builds jax-linear-attention's scan; its q has k's heads, its gradients have their own."""
    import jax
    import jax.numpy as jnp
    from jla.ops.mosaic_gpu import scalar_gate

    (B, T, H, _), P = q.shape, job["value_dim"]

    def forward(q, k, v, g, state):
        # Called past the check of the attached GPU: there is none.
        return scalar_gate.run(
            q, k, v, g, None, delta=False, scale=1.0, initial_state=state, output_final_state=True
        )

    decay = jax.ShapeDtypeStruct((B, T, H), jnp.float32)
    return _peer(job, forward, kv, decay, jax.ShapeDtypeStruct((B, T, H, P), q.dtype))


def _build_peer_gla(job: dict[str, Any], q: Any, kv: Any) -> Built:
    """Builds the scan with decays by key dim of jax-linear-attention; its k has q's heads."""
    import jax
    import jax.numpy as jnp
    from jla.ops.mosaic_gpu import gla_kernels

    def forward(q, k, v, g, state):
        return gla_kernels.chunked_gla(q, k, v, g, scale=1.0, initial_state=state, segment_ids=None)

    decay = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    v = jax.ShapeDtypeStruct((*q.shape[:3], job["value_dim"]), q.dtype)
    return _peer(job, forward, q, decay, v)


def _peer(job: dict[str, Any], forward: Callable, q: Any, decay: Any, v: Any) -> Built:
    """Builds one direction of a peer's scan forward(q, k, v, log_decay, state)."""
    import jax
    import jax.numpy as jnp

    state = jax.ShapeDtypeStruct((v.shape[0], v.shape[2], q.shape[3], v.shape[3]), jnp.float32)
    arguments = q, q, v, decay, state
    if job["kernel"].endswith("_forward"):
        return forward, arguments
    return lambda do, dS, *a: jax.vjp(forward, *a)[1]((do, dS)), (v, state, *arguments)


def _build_stock(job: dict[str, Any], q: Any, kv: Any) -> Built:
    """Builds JAX's own Hopper attention kernel, for comparison; it takes float16 only."""
    import jax
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(causal=job["mask"] == "causal", **job["blocks"])

    def forward(*args):
        return attention_mgpu.attention(*args, config)

    if job["kernel"] == "stock_forward":
        return forward, (q, kv, kv)
    return lambda do, *args: jax.vjp(forward, *args)[1](do), (q, q, kv, kv)


def _child() -> None:
    """Compiles the jobs on stdin and prints a report each, up to the first error."""
    dump = os.environ["MOSAIC_GPU_DUMP_TO"]
    import warnings

    warnings.filterwarnings("ignore")
    import importlib.metadata as metadata

    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    from tilescan.training.environment import compiler_warning

    device = topologies.h100s("1x1x1")[0]
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=132, platform="gpu")
    sharding = SingleDeviceSharding(device)

    def on_device(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    versions = {
        name: metadata.version(name)
        for name in ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvvm")
    }
    if warning := compiler_warning("cuda"):
        versions["warning"] = warning
    for line in sys.stdin:
        for path in glob.glob(f"{dump}/*"):
            os.remove(path)
        try:
            function, shapes = _build(json.loads(line))
            args = jax.tree.map(on_device, shapes)
            with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
                lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
            lowered.compile()
            report = {"kernels": read_dump(dump), "versions": versions}
        except Exception as error:  # the report carries it; the caller decides
            report = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print("@" + json.dumps(report), flush=True)
        if "error" in report:
            return


if __name__ == "__main__":
    _child()
