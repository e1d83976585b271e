"""Recurrences and long convolutions beside their peers: time, compile time, memory, from one run.

    python -m tilescan.benchmarks.scans  # every table
    python -m tilescan.benchmarks.scans --only ssd long_convolution  # some of the ops
    python -m tilescan.benchmarks.scans --only crossover  # against tiled attention
    python -m tilescan.benchmarks.scans --torch-python ~/torch/bin/python --out rows.jsonl

Every peer gets the same inputs. Before anything is timed its results, values and gradients, are
compared for one head or channel with float64 ones, which plain steps give; a peer whose results
are wrong is not timed. Then all peers run in turn, so that a busy machine slows all of them alike:
believe the ratios ("ours / its", below 1 where ours is faster), not the milliseconds. Temporary
memory is what XLA says that the program needs besides its arguments and results; peak memory is
that of a fresh process which does the case once. Peers that are not installed are left out:
jax-linear-attention (`pip install jax-linear-attention`) and torch (`--torch-python`).

"crossover" times causal tiled attention, ssd and gated linear attention at the same heads and
dimensions, 256 to 16384 steps, and gives the length from which a scan is faster.

Figures of the TPU and GPU kernels that were computed without a device are printed too, where
results/benchmarks has them.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from jaxtyping import Array, Float

from tilescan.benchmarks import scans_cases
from tilescan.benchmarks.environment import environment
from tilescan.benchmarks.scans_cases import (
    BY_STEPS,
    CASES,
    CROSSOVER,
    LETTERS,
    TORCH_PEERS,
    Case,
)
from tilescan.benchmarks.timing import interleaved, summary
from tilescan.benchmarks.torch_process import Torch, find_torch
from tilescan.files import write_atomically
from tilescan.planning.compiled import memory as program_memory

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "results/benchmarks"
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


class Judge:
    """Compares results with float64 ones for one head, or one channel where there are no heads."""

    def __init__(self, case: Case, arrays: Mapping[str, Float[Array, "..."]]):
        output, letters = LETTERS[case.op]
        self.letter = "H" if "H" in output else "D"
        self.index = getattr(case, self.letter) // 2
        gradients = letters.values() if "dy" in arrays else ()
        self.letters = output, *gradients
        with jax.enable_x64(True):
            all_letters = letters | {"dy": output}
            exact = {
                name: jnp.asarray(self.part(np.asarray(x, np.float64), all_letters[name]))
                for name, x in arrays.items()
            }
            definition = jax.jit(scans_cases.with_gradients(BY_STEPS[case.op], case))
            self.right = [np.asarray(x) for x in definition(*exact.values())]

    def part(self, x: Float[np.ndarray, "..."], letters: str) -> Float[np.ndarray, "..."]:
        """Returns the head or channel of an array of such dimensions; all of it without them."""
        if self.letter not in letters:
            return x
        return np.take(x, [self.index], letters.index(self.letter))

    def error(self, results: Sequence[Float[Array | np.ndarray, "..."]]) -> float:
        """Returns the max abs. difference relative to the largest exact entry; sums over heads do
        not count.
        """
        worst = 0.0
        for x, y, letters in zip(results, self.right, self.letters, strict=True):
            if self.letter in letters:
                difference = np.abs(self.part(np.asarray(x, np.float64), letters) - y).max()
                worst = max(worst, float(difference / np.abs(y).max()))
        return worst


def memory_in_fresh_process(peer: str, case: Case) -> float:
    """Returns the peak resident MB of a process that makes the inputs and runs the case once.

    Raises:
      RuntimeError: the process fails; with its standard error.
    """
    command = [sys.executable, "-m", "tilescan.benchmarks.scans_cases", peer]
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
      torch: a process that runs torch's peers, or None for no such peers.
      arguments: `main`'s.
    """
    arrays = scans_cases.inputs(case)
    judge = Judge(case, arrays) if case.op in BY_STEPS else None
    rows, functions = {}, {}

    def accept(peer, results, function):
        error = judge.error(results) if judge else 0.0
        if judge:
            rows[peer]["relative_error"] = float(f"{error:.1e}")
        if not error <= TOLERANCE[case.dtype]:
            rows[peer]["refused"] = f"error {error:.1e}: not timed"
        else:
            functions[peer] = function

    # Compile each peer and judge its results; torch's come from its own process.
    for peer in scans_cases.peers_of(case):
        start = time.perf_counter()
        compiled = scans_cases.jitted(peer, case).lower(*arrays.values()).compile()
        rows[peer] = {"compile_s": round(time.perf_counter() - start, 3)}
        memory = program_memory(compiled)
        rows[peer]["xla_temp_mb"] = round(memory.temporaries / 1e6, 1) if memory else None
        call = lambda c=compiled: jax.block_until_ready(c(*arrays.values()))
        accept(peer, call(), lambda call=call: call() and None)
    for peer, (function, details) in TORCH_PEERS.get(case.op, {}).items() if torch else ():
        version, results = torch.prepare(function, arrays.values(), **details)
        rows[peer] = {"version": version}
        accept(peer, results, lambda f=function: torch.run(f))
    # Time those that are accurate, in turn, and add ratios; then peak memory in fresh processes.
    times = interleaved(functions, repeats=max(arguments.repeats, 3), seconds=arguments.seconds)
    ours, *_ = rows
    for peer, spent in times.items():
        rows[peer] |= summary(spent)
        if ours in times and peer != ours:
            ratio = statistics.median(times[ours]) / statistics.median(spent)
            rows[peer][f"{ours}_time_over_this"] = round(ratio, 3)
    if not arguments.no_memory and jax.default_backend() == "cpu" and judge:
        for peer in functions.keys() & scans_cases.PEERS[case.op].keys():
            rows[peer]["peak_mb"] = memory_in_fresh_process(peer, case)
    return [
        {"peer": p, "case": case.name, **dataclasses.asdict(case), **r} for p, r in rows.items()
    ]


def show(x: float | None) -> str:
    """Returns a cell of a table, empty for None."""
    return "" if x is None else f"{x:g}"


def table_of(rows: Sequence[Mapping[str, Any]]) -> rich.table.Table:
    """Returns the table of `measure`'s rows, a section for each case."""
    columns = "case", "peer", "ms", "ours / its", "compile s", "temp MB", "peak MB", "error"
    table = rich.table.Table(title="Scans: medians of interleaved runs")
    for name in columns:
        table.add_column(name, justify="left" if name in ("case", "peer") else "right")
    last = None
    for r in rows:
        if r["case"] != last:
            table.add_section()
        table.add_row(
            r["case"] if r["case"] != last else "", r["peer"],
            r.get("refused") or show(r.get("median_ms")), show(r.get("tilescan_time_over_this")),
            *(show(r.get(k)) for k in ("compile_s", "xla_temp_mb", "peak_mb", "relative_error")),
        )  # fmt: skip
        last = r["case"]
    return table


def crossover_table(rows: Sequence[Mapping[str, Any]]) -> tuple[rich.table.Table, list[str]]:
    """Returns milliseconds by length, and lines with the length from which each scan is faster."""
    scans = [peer for peer in scans_cases.PEERS["crossover"] if peer != "attention"]
    table = rich.table.Table(title="Causal attention and scans, same heads and dimensions: ms")
    for name in ("direction", "T", "attention", *scans, *(f"attention / {s}" for s in scans)):
        table.add_column(name, justify="right")
    lines = []
    for direction in dict.fromkeys(r["direction"] for r in rows):
        ms = {}
        for r in rows:
            if r["direction"] == direction:
                ms.setdefault(r["T"], {})[r["peer"]] = r["median_ms"]
        table.add_section()
        for T, times in ms.items():
            ratios = [times["attention"] / times[s] for s in scans]
            cells = [times["attention"], *(times[s] for s in scans)]
            table.add_row(direction, str(T), *map(show, cells), *(f"{r:.2f}" for r in ratios))
        for s in scans:
            slower = [T for T, times in ms.items() if times[s] >= times["attention"]]
            longer = [T for T in ms if T > max(slower, default=0)]
            where = f"from {min(longer)} steps on" if longer else f"not up to {max(ms)} steps"
            lines.append(f"{direction}: {s} is faster than attention {where}")
    return table, lines


def static_tables() -> Iterator[rich.table.Table]:
    """Yields tables of compilers' figures of kernels, without a device, in results/benchmarks."""
    for path in sorted(RESULTS.glob("*scan*_static.json")):
        document = json.loads(path.read_text())
        rows = [r for row in document.get("rows", []) for r in flat_rows(row)]
        names = list(dict.fromkeys(n for r in rows for n in r if n not in ("versions", "source")))
        table = rich.table.Table(title=f"{path.name}: {document.get('note', '')}")
        for name in names:
            table.add_column(name)
        for r in rows:
            table.add_row(*(r.get(n, "") for n in names))
        yield table


def flat_rows(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns a row for each of its kernels, where it lists some; cells of text."""
    several = row.get("kernels")
    rest = {name: text(x) for name, x in row.items() if name != "kernels"}
    return [rest | {n: text(x) for n, x in k.items()} for k in several] if several else [rest]


def text(x: Any) -> str:
    """Returns a JSON value as a cell of text."""
    if isinstance(x, dict):
        return " ".join(f"{name}={text(y)}" for name, y in x.items())
    if isinstance(x, list):
        return " ".join(map(text, x))
    return f"{x:g}" if isinstance(x, float) else "" if x is None else str(x)


def main() -> None:
    """Measures the cases that the command line asks for, prints tables and writes the rows."""
    names = [*scans_cases.SIZES, "crossover", "static"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=names, default=names, metavar="OP", help=", ".join(names))
    add("--direction", choices=("fwd", "fwd+bwd"), help="one of the two; default: both")
    add("--dtype", choices=("float32", "bfloat16"), help="float32 on CPUs, else bfloat16")
    add("--torch-python", metavar="PATH", help="a Python with torch; default: this one, if it has")
    add("--out", type=pathlib.Path, metavar="FILE.jsonl", help="write the rows there")
    add("--repeats", type=int, default=15, help="rounds at most (at least 3)")
    add("--seconds", type=float, default=8.0, help="begin no round of a case after so long")
    add("--no-memory", action="store_true", help="skip the fresh processes for peak memory")
    arguments = parser.parse_args()
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    python = find_torch(arguments.torch_python)
    torch = Torch(python) if python else None
    console = rich.console.Console(width=None if sys.stdout.isatty() else 140)
    if torch is None:
        console.print("torch is not installed here: pass --torch-python to compare with it")
    where, rows = environment(), []
    for case in CASES + CROSSOVER:
        if case.op in arguments.only and arguments.direction in (None, case.direction):
            start = time.perf_counter()
            rows += measure(dataclasses.replace(case, dtype=dtype), torch, arguments)
            console.print(f"{case.name}: {time.perf_counter() - start:.0f} s")
    if torch:
        torch.close()
    crossing = [r for r in rows if r["op"] == "crossover"]
    if len(crossing) < len(rows):
        console.print(table_of([r for r in rows if r["op"] != "crossover"]))
    if crossing:
        table, lines = crossover_table(crossing)
        console.print(table, *lines, sep="\n")
    if "static" in arguments.only:
        console.print(*static_tables(), sep="\n")
    if arguments.out:
        write_atomically(arguments.out, "".join(json.dumps(r | where) + "\n" for r in rows))
        console.print(f"{len(rows)} rows written to {arguments.out}")


if __name__ == "__main__":
    main()
