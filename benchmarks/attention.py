"""Attention beside its peers: time, compile time and memory, all from one run.

    python -m tilescan.benchmarks.attention  # the shapes of the tables
    python -m tilescan.benchmarks.attention --shapes quick  # a minute
    python -m tilescan.benchmarks.attention --torch-python ~/torch/bin/python --out rows.jsonl

Every peer gets the same inputs. Before anything is timed its results are compared with float64
ones; a peer whose results are wrong is not timed. Then all peers run in turn, so that a busy
machine slows all of them alike: believe the ratios, not the milliseconds. Peak memory is that of
a fresh process which does the case once. On a GPU or TPU rows also have TFLOP/s (as
FlashAttention-2 counts) and the share of the chip's dense bfloat16 peak.

Dimensions: B batch, T time, H heads, D head dim.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
from jaxtyping import Array, Float

from tilescan.benchmarks.attention_cases import (
    LONGEST_DENSE,
    SHAPES,
    WINDOW,
    Case,
    inputs,
    jitted,
)
from tilescan.benchmarks.environment import environment
from tilescan.benchmarks.timing import interleaved, summary
from tilescan.benchmarks.torch_process import Torch, find_torch
from tilescan.files import write_atomically
from tilescan.planning.chips import chip_of
from tilescan.planning.compiled import memory as program_memory


def float64_head(
    case: Case, arrays: Sequence[Float[Array, "B T H D"]], head: int
) -> list[Float[np.ndarray, "T D"]]:
    """Returns the exact results for one head of the first sequence, in float64, 512 rows at a time.

    They are o, or o, dq, dk and dv where `arrays` has a cotangent.
    """
    q, k, v, *do = (np.asarray(x[0, :, head], np.float64) for x in arrays)
    left = case.T if case.mask == "causal" else WINDOW
    outputs = [np.zeros_like(q) for _ in range(4 if do else 1)]
    scale = case.D**-0.5
    for start in range(0, case.T, 512):
        # The weights P of 512 rows, over the keys from the first that any of them sees.
        rows = np.arange(start, min(start + 512, case.T))
        first = max(0, start - left)
        keys = np.arange(first, rows[-1] + 1)
        distance = rows[:, None] - keys
        logits = np.where(
            (distance >= 0) & (distance <= left), scale * q[rows] @ k[keys].T, -np.inf
        )
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        outputs[0][rows] = p @ v[keys]
        # dP = dO V^T, dS = P (dP - rowsum(dO O)), dQ = dS K, dK = dS^T Q, dV = P^T dO.
        if do:
            d = do[0][rows]
            ds = p * (d @ v[keys].T - np.sum(d * outputs[0][rows], -1, keepdims=True))
            outputs[1][rows] = scale * ds @ k[keys]
            outputs[2][keys] += scale * ds.T @ q[rows]
            outputs[3][keys] += p.T @ d
    return outputs


def error_of(
    results: Sequence[Float[Array | np.ndarray, "..."]],
    right: Sequence[Float[np.ndarray, "T D"]],
    head: int | None,
) -> float:
    """Returns the max abs. difference of any result's head, relative to the largest exact entry.

    Args:
      results: all heads of all sequences; or, where `head` is None, the one head alone.
      right: the exact head.
    """
    heads = (x if head is None else x[0, :, head] for x in results)
    pairs = zip((np.asarray(x, np.float64) for x in heads), right, strict=True)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def peers_of(case: Case) -> list[str]:
    """Returns the names of the JAX peers that are installed and can run a case, ours first."""
    names = ["tilescan"]
    if case.T <= LONGEST_DENSE:
        names.append("jax.nn")
        if importable("tokamax"):
            names.append("tokamax")
    if case.mask == "causal" and importable("ringattention"):
        names.append("ringattention")
    return names


def importable(name: str) -> bool:
    """Returns whether a package is installed."""
    return importlib.util.find_spec(name) is not None


def memory_in_fresh_process(peer: str, case: Case) -> float:
    """Returns the peak resident MB of a process that makes the inputs and runs the case once.

    Raises:
      RuntimeError: the process fails; with its standard error.
    """
    command = [sys.executable, "-m", "tilescan.benchmarks.attention_cases", peer]
    case = json.dumps(dataclasses.asdict(case))
    # Loading other platforms' libraries would count: 90 MB for an installed libtpu.
    environ = os.environ | {"JAX_PLATFORMS": jax.default_backend()}
    done = subprocess.run([*command, case], capture_output=True, text=True, env=environ)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]


def measure(case: Case, torch: Torch | None, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the rows of all peers for one case.

    Args:
      torch: a process that runs torch's peer, or None for no such peer.
      arguments: `main`'s.
    """
    arrays = inputs(case)
    head = case.H // 2
    right = float64_head(case, arrays, head)
    tolerance = 1e-5 if case.dtype == "float32" else 3e-2
    rows, functions = {}, {}

    def judge(peer, error, function):
        rows[peer]["relative_error"] = float(f"{error:.1e}")
        if error > tolerance:
            rows[peer]["refused"] = f"error {error:.1e} is above {tolerance:.0e}: not timed"
        else:
            functions[peer] = function

    # Compile each peer and judge its results; torch's come from its own process.
    for peer in peers_of(case):
        start = time.perf_counter()
        compiled = jitted(peer, case).lower(*arrays).compile()
        seconds = time.perf_counter() - start
        error = error_of(jax.block_until_ready(compiled(*arrays)), right, head)
        memory = program_memory(compiled)
        rows[peer] = {"compile_s": round(seconds, 3)}
        rows[peer]["xla_temp_mb"] = round(memory.temporaries / 1e6, 1) if memory else None
        judge(peer, error, lambda c=compiled: jax.block_until_ready(c(*arrays)) and None)
    if torch:
        window = None if case.mask == "causal" else WINDOW
        details = dict(window=window, head=head)
        version, results = torch.prepare("attention", arrays, **details)
        rows["torch"] = {"version": version}
        judge("torch", error_of(results, right, None), lambda: torch.run("attention"))
    # Time those that are accurate, in turn, and add ratios and rates.
    times = interleaved(functions, repeats=max(arguments.repeats, 3), seconds=arguments.seconds)
    mine = times.get("tilescan")
    for peer, spent in times.items():
        rows[peer] |= summary(spent)
        if mine and peer != "tilescan":
            ratio = statistics.median(mine) / statistics.median(spent)
            rows[peer]["tilescan_time_over_this"] = round(ratio, 3)
        if jax.default_backend() != "cpu":
            flops = case.flops / statistics.median(spent)
            chip = chip_of(jax.devices()[0].device_kind)
            rows[peer]["tflops"] = round(flops / 1e12, 2)
            rows[peer]["share_of_bf16_peak"] = round(flops / chip.flops, 3) if chip else None
    # Peak memory, of one fresh process for each peer.
    if not arguments.no_memory and jax.default_backend() == "cpu":
        for peer in functions.keys() - {"torch"}:
            rows[peer]["peak_mb"] = memory_in_fresh_process(peer, case)
    return [
        {"peer": p, "case": case.name, **dataclasses.asdict(case), **r} for p, r in rows.items()
    ]


def table_of(rows: Iterable[Mapping[str, Any]]) -> rich.table.Table:
    """Returns the table of `measure`'s rows."""
    table = rich.table.Table(title="Attention: medians of interleaved runs")
    for name in ("case", "peer", "ms", "ours / its", "compile s", "peak MB", "error", "TFLOP/s"):
        table.add_column(name, justify="left" if name in ("case", "peer") else "right")
    show = lambda x: "" if x is None else f"{x:g}"
    for r in rows:
        share = r.get("share_of_bf16_peak")
        table.add_row(
            r["case"], r["peer"], r.get("refused") or show(r.get("median_ms")),
            show(r.get("tilescan_time_over_this")), show(r.get("compile_s")),
            show(r.get("peak_mb")), show(r.get("relative_error")),
            show(r.get("tflops")) + (f" ({share:.0%} of peak)" if share else ""),
        )  # fmt: skip
    return table


def main() -> None:
    """Measures the cases that the command line asks for, prints a table and writes the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", choices=SHAPES, default="default", help="default: T 1024, 4096, 16384")
    add("--dtype", choices=("float32", "bfloat16"), help="float32 on CPUs, else bfloat16")
    add("--torch-python", metavar="PATH", help="a Python with torch; default: this one, if it has")
    add("--out", type=pathlib.Path, metavar="FILE.jsonl", help="write the rows there")
    add("--repeats", type=int, default=15, help="rounds at most (at least 3)")
    add("--seconds", type=float, default=20.0, help="begin no round of a case after so long")
    add("--no-memory", action="store_true", help="skip the fresh processes for peak memory")
    arguments = parser.parse_args()
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    python = find_torch(arguments.torch_python)
    torch = Torch(python) if python else None
    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    if torch is None:
        console.print("torch is not installed here: pass --torch-python to compare with it")
    where, rows = environment(), []
    for case in SHAPES[arguments.shapes]:
        with console.status(f"{case.name}"):
            rows += measure(dataclasses.replace(case, dtype=dtype), torch, arguments)
    if torch:
        torch.close()
    console.print(table_of(rows))
    if arguments.out:
        write_atomically(arguments.out, "".join(json.dumps(r | where) + "\n" for r in rows))
        console.print(f"{len(rows)} rows written to {arguments.out}")


if __name__ == "__main__":
    main()
