"""Compiles for TPUs that are not attached and reads libtpu's own static figures.

libtpu compiles for any TPU generation without a device, and while it does so it can simulate the
final instruction bundles of every kernel ("static LLO profile") and dump them. Nothing runs: the
figures are one compiler's opinion, good to rank two versions of one kernel on one generation. They
show no contention for memory, no clock, no dispatch.

The flags are read once per process, and the profiler aborts the process on a kernel that it cannot
model. Hence every compilation happens in a worker process, started here with its environment; when
a worker dies, the job that it was busy with is reported as not modeled and a new worker goes on
with the rest.

A job names a function "module:name" with JSON keyword arguments; called in the worker, it returns
`(function, arguments)` with `jax.ShapeDtypeStruct`s for arguments.
"""

import dataclasses
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tilescan
from tilescan.planning import topologies

# Names of small slices.
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:2x2x1",
}
# The profiler has a model of memory transfers for these; it aborts on v4 and on most of 7x.
PROFILED = ("v5e", "v5p", "v6e")


@dataclasses.dataclass(frozen=True)
class Job:
    """One compilation: `target` is "module:function", `kwargs` its JSON-able arguments."""

    target: str
    kwargs: dict

    def spec(self) -> dict:
        """Returns the job as JSON."""
        return {"target": self.target, "kwargs": self.kwargs}


def available() -> bool:
    """Returns whether libtpu is installed (extra `dev` or `tpu`)."""
    return find_spec("libtpu") is not None


def environment(profile_dir: str | None = None, bundle_dir: str | None = None) -> dict[str, str]:
    """Returns the environment of a worker; the only place that knows libtpu's flags."""
    env = dict(os.environ)
    env.pop("XLA_FLAGS", None)
    flags = []
    if profile_dir:
        flags.append(f"--xla_jf_dump_static_llo_profile_to={profile_dir}")
    if bundle_dir:
        flags += [f"--xla_jf_dump_to={bundle_dir}", "--xla_jf_dump_llo_text=true"]
    return env | topologies.ENVIRONMENT | {"LIBTPU_INIT_ARGS": " ".join(flags)}


def compile_jobs(
    jobs: list[Job],
    generation: str,
    *,
    profile: bool = True,
    bundles: bool = False,
    timeout: float = 1800.0,
) -> list[dict]:
    """Compiles every job for one TPU generation, in order.

    Returns one dict per job: `cycles` {op: estimated cycles}, `vmem` (bytes, largest of the
    kernels), `argument_bytes`, `temp_bytes`, `peak_bytes`, `custom_calls` (names of TPU kernels in
    the HLO), `bytes_accessed` (XLA's count; loops' bodies once, kernels as they say), `trips` {op:
    how often its loop runs, if more than once}, with `bundles` also `bundles` {kernel: {...}}; or
    `{"error": text}` when the compiler refuses, or `{"not_modelled": text}` when the process died
    or took more than `timeout` seconds.
    """
    if generation not in TOPOLOGIES:
        raise ValueError(f"unknown TPU generation {generation!r}; known: {', '.join(TOPOLOGIES)}")
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(results) < len(jobs):
            rest = jobs[len(results) :]
            dirs = [os.path.join(folder, name) for name in ("profile", "bundles")]
            for path in dirs:
                os.makedirs(path, exist_ok=True)
            request = {
                "generation": generation,
                "profile_dir": dirs[0] if profile else None,
                "bundle_dir": dirs[1] if bundles else None,
                "jobs": [job.spec() for job in rest],
            }
            try:
                process = subprocess.run(
                    [sys.executable, "-m", "tilescan.planning.aot_tpu"],
                    input=json.dumps(request),
                    capture_output=True,
                    text=True,
                    timeout=timeout,
                    cwd=Path(tilescan.__file__).parents[1],
                    env=environment(request["profile_dir"], request["bundle_dir"]),
                )
                output, reason = process.stdout, _reason(process)
            except subprocess.TimeoutExpired as error:
                output = (error.stdout or b"").decode()
                reason = f"compilation took more than {timeout:.0f} s"
            lines = [line[7:] for line in output.splitlines() if line.startswith("RESULT ")]
            results += [json.loads(line) for line in lines]
            if len(lines) < len(rest):
                results.append({"not_modelled": reason})
    return results


def _reason(process: subprocess.CompletedProcess) -> str:
    """Says why a worker died."""
    found = re.search(r"Static LLO profiling of (.*?failed: [^\n]{0,160})", process.stderr)
    tail = process.stderr.strip().splitlines()[-1:] or ["no message"]
    return f"worker ended with {process.returncode}: {found[1] if found else tail[0][:300]}"


# What follows runs in the worker.


def _compile(
    function: Callable, arguments: Any, device: Any, profile_dir: str | None, bundle_dir: str | None
) -> dict:
    """Compiles a function for a device; returns what `compile_jobs` tells of a job."""
    import jax

    from tilescan.planning.compiled import memory as program_memory

    for folder in filter(None, (profile_dir, bundle_dir)):
        for path in glob.glob(folder + "/*"):
            os.remove(path)

    # The program, and what its text and its compiler say.
    sharding = jax.sharding.SingleDeviceSharding(device)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    traced = jax.jit(function).trace(*jax.tree.map(place, arguments))
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    text, memory = compiled.as_text(), program_memory(compiled)
    scoped = r'used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
    result = {
        "vmem": max([int(size) for size in re.findall(scoped, text)] or [0]),
        "argument_bytes": memory.arguments,
        "temp_bytes": memory.temporaries,
        "peak_bytes": memory.peak,
        "custom_calls": re.findall(r'%(\S+) = [^\n]*custom_call_target="tpu_custom_call"', text),
    }
    result["bytes_accessed"] = int(compiled.cost_analysis().get("bytes accessed", 0))
    result["trips"] = _trips(text)

    # The files that libtpu leaves.
    if profile_dir:
        result["cycles"] = {}
        for path in glob.glob(profile_dir + "/*_static_llo_profile.textproto"):
            entries = re.findall(
                r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)', Path(path).read_text()
            )
            result["cycles"].update({name: int(cycles) for name, cycles in entries})
    if bundle_dir:
        names = {name.split(".")[0] for name in result["custom_calls"]}
        result["bundles"] = {name: _bundles(bundle_dir, name) for name in sorted(names)}
    return result


def _trips(text: str) -> dict[str, int]:
    """Returns how often HLO ops in loops' bodies run, of loops that count up to one constant."""
    # Lines by computation, then each loop's body, where it stands and how often it runs.
    lines, inside = {}, ""
    for line in text.splitlines():
        if found := re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", line):
            inside = found[1]
        lines.setdefault(inside, []).append(line)
    parents, counts = {}, {}
    for name, body in lines.items():
        for line in body:
            if loop := re.search(r" while\(.*condition=%([^\s,]+), body=%([^\s,]+)", line):
                bounds = re.findall(r"= s32\S* constant\((\d+)\)", "\n".join(lines[loop[1]]))
                parents[loop[2]] = name
                counts[loop[2]] = int(bounds[0]) if len(bounds) == 1 else 1

    def total(name: str) -> int:
        return counts[name] * total(parents[name]) if name in counts else 1

    names = {c: re.findall(r"^\s+(?:ROOT )?%(\S+) = ", "\n".join(lines[c]), re.M) for c in counts}
    return {op: total(c) for c in counts for op in names[c] if total(c) > 1}


def _bundles(folder: str, kernel: str) -> dict:
    """Counts bundles of a kernel and uses of each kind of slot, not weighted by trip counts."""
    counts = {}
    for path in glob.glob(f"{folder}/*-{kernel}*-schedule-analysis_final_bundles.txt"):
        counts["bundles"] = int(
            re.search(r"total scheduled bundles:\s+(\d+)", Path(path).read_text())[1]
        )
    for path in glob.glob(f"{folder}/*-{kernel}*-final_hlo-static-per-bundle-utilization.txt"):
        lines = Path(path).read_text().splitlines()
        columns = [name.strip() for name in lines[1].split(",")]
        rows = [
            list(map(int, line.split()))
            for line in lines[4:]
            if re.match(r"^\s*\d+( +\d+)*\s*$", line)
        ]
        totals = dict(
            zip(columns, (sum(column) for column in zip(*rows, strict=True)), strict=False)
        )
        for name in ("MATMUL", "MATPUSH", "XLU", "VALU", "EUP", "VLOAD:FILL", "VSTORE:SPILL"):
            if name in totals:
                counts[name] = totals[name]
    return counts


def _worker() -> None:
    """Compiles the jobs of the request on stdin and prints a result each."""
    request = json.load(sys.stdin)
    import importlib

    device = topologies.tpus(TOPOLOGIES[request["generation"]])[0]
    for job in request["jobs"]:
        module, name = job["target"].split(":")
        try:
            function, arguments = getattr(importlib.import_module(module), name)(**job["kwargs"])
            result = _compile(
                function, arguments, device, request["profile_dir"], request["bundle_dir"]
            )
        except Exception as error:  # the compiler's refusals come as several types; the text tells
            text = re.sub(r"backend_config=\S+", "", f"{type(error).__name__}: {error}")
            result = {"error": text if len(text) < 2000 else text[:700] + " ... " + text[-1200:]}
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    _worker()
