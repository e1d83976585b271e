"""Plans for GPUs, made by another interpreter: the one that has XLA's CUDA plugin.

The process is of its own also because kernels are cached by their code, not by the device.
"""

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig

from tilescan.planning import machines

_CHILD = "TILESCAN_PLAN_CHILD"


def inside() -> bool:
    """Whether this process is the child."""
    return bool(os.environ.get(_CHILD))


def ask(config, topology: str, memory: float | None) -> dict:
    """The fields of the plan, made by the interpreter that has XLA's CUDA plugin.

    Raises:
      RuntimeError: there is none (the text says how to get one), or its process died.
      ValueError: as `experiments.plan.plan`.
    """
    from tilescan.planning import aot_gpu
    from tilescan.training import config as config_lib

    machines.h100_shape(topology)  # a wrong one is told at once
    python = aot_gpu.cuda_python()
    if python is None:
        raise RuntimeError(f"topology={topology!r}: {aot_gpu.NEEDS}")
    request = [config_lib.as_dict(config_lib.settings(config)), topology, memory]
    # What the other interpreter lacks, Flax and Optax for example, it takes from this one.
    start = (
        f"import sys; sys.path += {[str(aot_gpu.ROOT), *_packages()]!r}; "
        "from tilescan.experiments import plan_child; plan_child.answer()"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    child = subprocess.run(
        [python, "-c", start],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=env | {"JAX_PLATFORMS": "cpu", _CHILD: "1"},
    )
    lines = [line[1:] for line in child.stdout.splitlines() if line[:1] == "@"]
    if not lines:
        raise RuntimeError(f"{python} ended with {child.returncode}: {child.stderr[-3000:]}")
    answer = json.loads(lines[0])
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def _packages() -> list[str]:
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def answer() -> None:
    """What the child does: a request of `ask` on stdin, a line of JSON to stdout."""
    from tilescan.planning.plan import plan

    config, topology, memory = json.load(sys.stdin)
    try:
        made = dataclasses.asdict(plan(config, topology, memory=memory))
    except ValueError as error:
        made = {"error": str(error)}
    print("@" + json.dumps(made), flush=True)
