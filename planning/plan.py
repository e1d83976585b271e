"""Compiles a training step for devices that need not be attached, and tells what it needs.

    plan(config, "v5p:8x8x8")                      one compilation, as a Plan
    longest.longest(config, "v5p:8x8x8")           the longest sequence that fits, by compiling
    print(text.text(plan(config)))

The step is the one that `training.train` runs, with its shardings, the batch's among them. Nothing
runs and no parameter is allocated.
"""

import math

from tilescan.planning import child, topologies
from tilescan.planning.report import Plan, report
from tilescan.training.config import Config


def plan(config: Config, topology: str | None = None, *, memory: float | None = None) -> Plan:
    """Compiles the training step of `config` without allocating or running anything.

    For GPUs another process does it: the interpreter that has XLA's CUDA plugin.

    Args:
      config: of `training.config.default_config()`, or what `training.config.as_dict` gives.
      topology: a TPU slice ("v5e:2x4") or H100s ("h100:64"); None takes this machine's devices.
      memory: bytes of a device, instead of the vendor's figure.

    Raises:
      ValueError, ImportError: an unknown topology, libtpu missing; a batch, a length or a mesh that
        does not fit the devices; a memory that is not a number above 0.
      RuntimeError: no interpreter with XLA's CUDA plugin, or its process died.
    """
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"memory={memory} must be a number of bytes above 0")
    if topologies.platform(topology) == "cuda":
        return Plan(**child.ask(config, topology, memory))
    return report(config, topology, memory)
