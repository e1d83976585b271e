"""Recurrences and convolutions on a mesh: each device computes its rows, heads and stretch of time.

As in `ops.partitioned`, ops are called inside `jax.shard_map`, whatever implements them. Rows and
heads know nothing of each other; time is cut where the mesh has an axis for it, and the op is then
that of `ops.sequence_parallel`.

Letters: B batch, T time, H heads, G groups of heads, E channels; those of the ops otherwise.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from tilescan.ops.explicit_axes import as_auto, auto_axes, explicit_devices, is_varying, of_rank
from tilescan.ops.partitioned import HEAD_AXIS, TIME_AXIS, batch_axes, sequence_devices
from tilescan.ops.sequence_parallel import convolutions, scans, state_spaces
from tilescan.ops.sequence_parallel.kinds import kinds

__all__ = ["on_mesh", "sequence_parts"]


_PARALLEL = {
    "ssd": scans.ssd,
    "gated_linear_attention": scans.gated_linear_attention,
    "delta_rule": scans.delta_rule,
    "gated_delta_rule": scans.gated_delta_rule,
    "selective_scan": scans.selective_scan,
    "linear_recurrence": scans.linear_recurrence,
    "diagonal_state_space": state_spaces.diagonal_state_space,
    "dplr_state_space": state_spaces.dplr_state_space,
    "short_convolution": convolutions.short_convolution,
    "long_convolution": convolutions.long_convolution,
}


def on_mesh(op: Callable, setting: str, *arrays, **options):
    """op(*arrays, **options), cut for the mesh in use.

    The mesh is that of `jax.set_mesh`; without one, on a single device, where all its axes are
    manual already, and where its axes are Explicit but for a time that is cut, this is the call
    itself, which heeds Explicit axes (`ops.explicit_axes`). Otherwise

      - the batch is cut over those of BATCH_AXES that divide it;
      - heads or channels over HEAD_AXIS, if it divides them and their groups (one group is whole
        on every device);
      - time over TIME_AXIS, but for a single step, and for a short convolution that reads more
        steps back than a device has.

    What is not cut is whole on every device. Where time is cut, a kernel of `long_convolution`
    that is longer than a device's time is cut over TIME_AXIS by channels, if it divides them.

    Args:
      op: a recurrence or convolution of `ops`.
      setting: of `ops.sequence_parallel.kinds`; its scan is used where time is cut.
      *arrays, **options: of `op`. Of the latter, arrays are what the op takes as such.

    Returns:
      What `op` returns: its output, and its last state.

    Raises:
      ValueError: time that TIME_AXIS does not divide, beside what `op` raises.
    """
    if explicit_devices(TIME_AXIS, (arrays, options)) > 1:
        call = functools.partial(on_mesh, op, setting)
        given = dict(zip(op.cut.letters, arrays, strict=False)) | options
        return as_auto(call, arrays, options, lambda *_: op.cut.result_specs(given))
    mesh = jax.sharding.get_abstract_mesh()
    free = auto_axes(mesh)
    if not free or mesh.size == 1:
        return op(*arrays, **options)
    name, (letters, results, prepare) = op.__name__, op.cut
    given = dict(zip(letters, arrays, strict=False)) | {
        key: options.pop(key) for key in letters if key in options
    }
    arrays = prepare({key: x for key, x in given.items() if x is not None})
    letters = {key: of_rank(letters[key], x.ndim) for key, x in arrays.items()}
    sizes = {}
    for key, x in arrays.items():
        if key != "segment_ids":
            for letter, n in zip(letters[key], x.shape, strict=False):
                sizes[letter] = max(n, sizes.get(letter, 1))

    axes = {"B": batch_axes(sizes["B"], free), **_head_axes(sizes, free)}
    P = sequence_parts(sizes["T"])
    if P == 1 and is_varying(arrays):
        return op(**arrays, **options)  # see `ops.explicit_axes`
    if name == "short_convolution" and sizes["T"] // P < sizes["W"] - 1:
        P = 1
    if P > 1:
        axes["T"], op = TIME_AXIS, _PARALLEL[name]
        options["kind"], options["axis_name"] = kinds(setting).scan, TIME_AXIS
        _split_ids(arrays, letters, sizes["T"], options.get("reverse", False))

    def spec(letters, shape):
        pairs = zip(letters, shape, strict=False)
        return PartitionSpec(*(axes.get(letter) if n > 1 else None for letter, n in pairs))

    specs = {key: spec(letters[key], x.shape) for key, x in arrays.items()}
    if P > 1 and name == "long_convolution" and sizes["K"] > sizes["T"] // P + 1:
        inner = (axes["E"],) if axes.get("E") else ()
        parts = P * (free[HEAD_AXIS] if inner else 1)
        if sizes["E"] % parts == 0:
            specs["kernel"] = PartitionSpec(None, (*inner, TIME_AXIS))
    # Without check_vma as in `ops.partitioned`. Compiled, as custom derivatives with symbolic zeros
    # can't be called step by step under shard_map.
    return jax.jit(
        jax.shard_map(
            lambda arrays: op(**arrays, **options),
            in_specs=(specs,),
            out_specs=tuple(spec(r, [sizes.get(letter, 1) for letter in r]) for r in results),
            axis_names=set(free),
            check_vma=False,
        )
    )(arrays)


def sequence_parts(T: int) -> int:
    """Over how many devices `on_mesh` cuts T steps in the mesh in use; 1 for a single step.

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


def _head_axes(sizes, free):
    parts, letters = free.get(HEAD_AXIS, 1), [letter for letter in "HGE" if letter in sizes]
    whole = any(
        sizes[letter] % parts and not (letter == "G" and sizes["G"] == 1) for letter in letters
    )
    return {} if whole or parts == 1 else dict.fromkeys(letters, HEAD_AXIS)


def _split_ids(arrays, letters, T, reverse):
    """segment_ids [B, 1 + T] become segment_before [B] and [B, T], which can be cut."""
    ids = arrays.get("segment_ids")
    if ids is not None and ids.ndim == 2 and ids.shape[1] == T + 1:
        arrays["segment_before"], letters["segment_before"] = ids[:, -1 if reverse else 0], "B"
        arrays["segment_ids"] = ids[:, :-1] if reverse else ids[:, 1:]
