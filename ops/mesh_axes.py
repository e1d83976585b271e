"""The axes of a mesh by name, and what of a program's arrays each of them cuts."""

import jax

from tilescan.ops.explicit_axes import auto_axes, explicit_devices

# Names of mesh axes; a mesh may lack any of them.
BATCH_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"
TIME_AXIS = "sequence"


def batch_axes(B: int, sizes: dict[str, int]) -> tuple[str, ...] | None:
    """Returns those of BATCH_AXES, the first ones first, whose product divides B.

    Args:
      B: rows.
      sizes: {axis: devices} of a mesh.
    """
    axes, parts = (), 1
    for name in BATCH_AXES:
        if name in sizes and B % (parts * sizes[name]) == 0:
            axes, parts = (*axes, name), parts * sizes[name]
    return axes or None


def sequence_devices() -> int:
    """Returns the devices along TIME_AXIS of the mesh in use; 1 where it has none, or is manual."""
    return auto_axes(jax.sharding.get_abstract_mesh()).get(TIME_AXIS, explicit_devices(TIME_AXIS))


def sequence_parts(T: int) -> int:
    """Returns over how many devices of the mesh in use T steps are cut; 1 for a single step.

    Raises:
      ValueError: a length that they don't divide.
    """
    P = 1 if T == 1 else sequence_devices()
    if T % P:
        raise ValueError(
            f"a sequence of {T} steps can't be cut over mesh.{TIME_AXIS} = {P} devices: its length "
            f"must be a multiple of {P}"
        )
    return P
