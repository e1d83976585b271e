"""The axes of a mesh by name, and which dimensions of a program's arrays each of them shards."""

import jax

from tilescan.ops.explicit_axes import auto_axes, explicit_devices

# Names of mesh axes; a mesh may lack any of them.
BATCH_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"
TIME_AXIS = "sequence"


def batch_axes(B: int, sizes: dict[str, int]) -> tuple[str, ...] | None:
    """Returns the axes of BATCH_AXES, taken in order, whose product divides B.

    Args:
      B: number of sequences.
      sizes: {axis: devices} of a mesh.
    """
    axes, devices = (), 1
    for name in BATCH_AXES:
        if name in sizes and B % (devices * sizes[name]) == 0:
            axes, devices = (*axes, name), devices * sizes[name]
    return axes or None


def sequence_devices() -> int:
    """Returns the devices along TIME_AXIS of the mesh in use; 1 where it has none, or is manual."""
    return auto_axes(jax.sharding.get_abstract_mesh()).get(TIME_AXIS, explicit_devices(TIME_AXIS))


def sequence_parts(T: int) -> int:
    """Returns over how many devices of the mesh in use T steps are sharded; 1 for a single step.

    Raises:
      ValueError: those devices don't divide T.
    """
    P = 1 if T == 1 else sequence_devices()
    if T % P:
        raise ValueError(
            f"a sequence of {T} steps can't be sharded over mesh.{TIME_AXIS} = {P} devices: its "
            f"length must be a multiple of {P}"
        )
    return P
