"""Devices that need not be attached to compile for them.

devices("v5p:4x4x4")    descriptions of 64 TPU chips, from libtpu
devices("h100:64")      of 8 hosts with 8 H100 each, from XLA's CUDA plugin
devices(None)           of this machine
"""

import itertools
import math
import os
import pathlib
import re
from importlib.util import find_spec

ENVIRONMENT = {
    # libtpu compiles without a device when it is not asked to look for one.
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
H100_TARGET = pathlib.Path(__file__).with_name("h100.txtpb")
GPUS_PER_HOST = 8


def generation(topology: str | None) -> str | None:
    """Returns what stands before the colon: a key of `chips.CHIPS`, or a chip without figures."""
    return None if topology is None else topology.partition(":")[0].lower()


def platform(topology: str | None) -> str | None:
    """Returns the compiler's platform: tpu, cuda, or None for this machine."""
    if topology is None:
        return None
    return "cuda" if generation(topology) == "h100" else "tpu"


def devices(topology: str | None) -> list:
    """Returns descriptions of the devices of a TPU slice ("v5e:2x4"), of H100s, or of this machine.

    Raises:
      ImportError: libtpu is not installed.
      ValueError: no such topology.
    """
    if topology is None:
        import jax

        return jax.devices()
    if platform(topology) == "cuda":
        return h100s(h100_shape(topology))
    if find_spec("libtpu") is None:
        raise ImportError(
            f"topology={topology!r} needs the package libtpu (pip install libtpu), or leave "
            "--topology out to plan for this machine"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return tpus(topology)
    except Exception as error:  # the plugin's error type is not part of JAX's interface
        raise ValueError(
            f"topology={topology!r} is unknown; it is a generation and a shape, e.g. v5e:2x4, "
            f"v5p:2x2x2, v6e:4x4 or h100:64 ({error})"
        ) from error


def tpus(topology: str) -> list:
    """Returns libtpu's descriptions of a slice's devices; the environment must be ENVIRONMENT."""
    from jax.experimental import topologies

    # Without it a v4 chip is two devices, which do not make a mesh.
    options = {"chip_config_name": "megacore"} if generation(topology) == "v4" else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def torus_axes(topology: str) -> list[int]:
    """Returns the sizes that a mesh axis can have on a TPU slice, rising: products of its sides."""
    sides = [int(side) for side in re.findall(r"\d+", topology.partition(":")[2])]
    some = itertools.product(*((1, side) for side in sides))
    return sorted({math.prod(chosen) for chosen in some})


def h100_shape(topology: str) -> str:
    """Returns what XLA calls h100:64 or h100:1x8x8: partitions, hosts, GPUs of a host, as in 1x8x8.

    Raises:
      ValueError: another form, or GPUs that don't fill their hosts.
    """
    shape = topology.partition(":")[2]
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", shape):
        return shape
    count = int(shape) if re.fullmatch(r"[1-9]\d*", shape) else 0
    if not count or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
        raise ValueError(
            f"topology={topology!r} is unknown; h100:N has N GPUs, up to {GPUS_PER_HOST} or a "
            f"multiple of it, and h100:1xHxG has H hosts with G GPUs each, e.g. h100:64, h100:1x8x8"
        )
    hosts = max(1, count // GPUS_PER_HOST)
    return f"1x{hosts}x{count // hosts}"


def h100s(shape: str) -> list:
    """Returns descriptions of H100s in XLA's shape, e.g. 1x1x8, from its CUDA plugin."""
    from jax.experimental import topologies

    target = H100_TARGET.read_text(encoding="utf-8")
    return topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=shape
    ).devices
