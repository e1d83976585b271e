"""Devices for programs that share a sequence: virtual ones where accelerators are too few.

Programs are compiled for as many devices as a cell needs, also where they could not run. A process
can have any number of virtual CPU devices if it says so before it uses the first.
"""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "sequence"
# Virtual devices of a process that has none yet.
MANY = 256


def devices(count: int) -> list[jax.Device]:
    """Returns the first `count` devices, of the CPU if the accelerators are fewer.

    Raises:
      RuntimeError: JAX has started with fewer.
    """
    try:
        if jax.config.jax_num_cpu_devices < MANY:
            jax.config.update("jax_num_cpu_devices", MANY)
    except RuntimeError:
        pass  # JAX has its devices already
    found = jax.devices()
    if len(found) < count:
        found = jax.devices("cpu")
    if len(found) < count:
        raise RuntimeError(
            f"{count} devices are needed and JAX has started with {len(found)}; measure in a new "
            f"process, or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return found[:count]


def mesh_of(count: int, axis: str = AXIS) -> Mesh:
    """Returns a mesh of one axis over the first `count` devices."""
    return jax.make_mesh((count,), (axis,), (AxisType.Auto,), devices=devices(count))


def struct(
    mesh: Mesh, shape: tuple[int, ...], *spec: str | None, dtype: str = "float32"
) -> jax.ShapeDtypeStruct:
    """Returns an argument of a program that is compiled only; `spec` is its partitioning."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, P(*spec)))


def over_time(op: Callable, mesh: Mesh) -> Callable:
    """Returns `op` as a function of whole arrays [B, T, ...]; each device gets its shard of T."""
    time = P(None, AXIS)
    return jax.shard_map(op, mesh=mesh, in_specs=time, out_specs=time, check_vma=False)
