"""Plans for GPUs, made by another interpreter: the one that has XLA's CUDA plugin.

The process is of its own also because kernels are cached by their code, not by the device.
"""

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
from typing import Any

from tilescan.planning import aot_gpu, topologies
from tilescan.planning.report import report
from tilescan.training import config as config_lib


def ask(config: config_lib.Config, topology: str, memory: float | None) -> dict[str, Any]:
    """Returns the fields of the plan, made by the interpreter that has XLA's CUDA plugin.

    Raises:
      RuntimeError: there is none (the text says how to get one), or its process died.
      ValueError: as `plan.plan`.
    """
    topologies.h100_shape(topology)  # a wrong one is told at once
    python = aot_gpu.cuda_python()
    if python is None:
        raise RuntimeError(f"topology={topology!r}: {aot_gpu.NEEDS}")
    return run(python, [config_lib.as_dict(config_lib.settings(config)), topology, memory])


def run(python: str, request: list[Any]) -> dict[str, Any]:
    """Returns what an interpreter answers to a request: [config as a dict, topology, memory].

    Raises:
      RuntimeError: its process died.
      ValueError: what `report` raised there.
    """
    # What the other interpreter lacks, Flax and Optax for example, it takes from this one.
    packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    start = (
        f"import sys; sys.path += {[str(aot_gpu.ROOT), *packages]!r}; "
        f"from {__name__} import answer; answer()"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    child = subprocess.run(
        [python, "-c", start],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=env | {"JAX_PLATFORMS": "cpu"},
    )
    lines = [line[1:] for line in child.stdout.splitlines() if line[:1] == "@"]
    if not lines:
        raise RuntimeError(f"{python} ended with {child.returncode}: {child.stderr[-3000:]}")
    answered = json.loads(lines[0])
    if "error" in answered:
        raise ValueError(answered["error"])
    return answered


def answer() -> None:
    """Reads a request of `run` on stdin, and writes the plan's fields to stdout, a line of JSON."""
    config, topology, memory = json.load(sys.stdin)
    try:
        made = dataclasses.asdict(report(config, topology, memory))
    except ValueError as error:
        made = {"error": str(error)}
    print("@" + json.dumps(made), flush=True)
