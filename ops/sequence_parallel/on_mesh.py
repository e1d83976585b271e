"""Recurrences and convolutions on a mesh: each device computes its shard of rows, heads and time.

As in `ops.partitioned`, ops are called inside `jax.shard_map`, whatever implements them. Rows and
heads are independent; time is sharded where the mesh has an axis for it, and the op is then that of
`ops.sequence_parallel`.

Dimensions: B batch, T time, H heads, G groups of heads, E channels; those of the ops otherwise.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree

from tilescan.ops.delta_rule import delta_rule, gated_delta_rule
from tilescan.ops.dimensions import of_rank, spec_of
from tilescan.ops.explicit_axes import as_auto, auto_axes, explicit_devices, is_varying
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.ops.linear_recurrence import linear_recurrence
from tilescan.ops.long_convolution import long_convolution
from tilescan.ops.mesh_axes import HEAD_AXIS, TIME_AXIS, batch_axes, sequence_parts
from tilescan.ops.selective_scan import selective_scan
from tilescan.ops.sequence_parallel import convolutions, scans, state_spaces
from tilescan.ops.sequence_parallel.kinds import kinds
from tilescan.ops.short_convolution import short_convolution
from tilescan.ops.ssd import ssd
from tilescan.ops.state_space import diagonal_state_space, dplr_state_space

__all__ = ["OverTime", "on_mesh"]


@dataclasses.dataclass(frozen=True)
class OverTime:
    """How an op is computed where devices shard time.

    Attributes:
      op: the op inside `jax.shard_map`, of `ops.sequence_parallel`.
      can_shard: from {letter: size} and the number of devices, whether they can shard time; if not,
        time is replicated.
      also: from the same to {array: letter} of dimensions that TIME_AXIS shards too, if it divides
        them.
    """

    op: Callable
    can_shard: Callable[[dict[str, int], int], bool] = lambda sizes, P: True
    also: Callable[[dict[str, int], int], dict[str, str]] = lambda sizes, P: {}


_OVER_TIME = {
    ssd: OverTime(scans.ssd),
    gated_linear_attention: OverTime(scans.gated_linear_attention),
    delta_rule: OverTime(scans.delta_rule),
    gated_delta_rule: OverTime(scans.gated_delta_rule),
    selective_scan: OverTime(scans.selective_scan),
    linear_recurrence: OverTime(scans.linear_recurrence),
    diagonal_state_space: OverTime(state_spaces.diagonal_state_space),
    dplr_state_space: OverTime(state_spaces.dplr_state_space),
    short_convolution: OverTime(
        convolutions.short_convolution, can_shard=convolutions.reads_one_device_back
    ),
    long_convolution: OverTime(
        convolutions.long_convolution, also=convolutions.long_kernel_by_channels
    ),
}


def on_mesh(op: Callable, setting: str, *arrays: Array | None, **options: Any) -> PyTree:
    """Returns op(*arrays, **options), sharded over the mesh in use.

    The mesh is that of `jax.set_mesh`; without one, on a single device, where all its axes are
    manual already, and where its axes are Explicit and time is not sharded, this is the call
    itself, which heeds Explicit axes (`ops.explicit_axes`). Otherwise

      - the batch is sharded over the axes of BATCH_AXES that divide it;
      - heads or channels over HEAD_AXIS, if it divides them and their groups (a single group is
        replicated);
      - time over TIME_AXIS, but for a single step, and for a short convolution that reads more
        steps back than a device has.

    All else is replicated. Where time is sharded, a kernel of `long_convolution` that is longer
    than a device's time is sharded over TIME_AXIS by channels, if it divides them.

    Args:
      op: a recurrence or convolution of `ops`, whose `partitioning` gives its dimensions.
      setting: of `ops.sequence_parallel.kinds`; its scan is used where time is sharded.
      *arrays, **options: of `op`.

    Returns:
      What `op` returns: its output, and its last state.

    Raises:
      ValueError: time that TIME_AXIS does not divide, or an op that is not computed where devices
        shard time, besides what `op` raises.
    """
    # Under Explicit axes: time is left to Auto axes.
    if explicit_devices(TIME_AXIS, (arrays, options)) > 1:
        call = functools.partial(on_mesh, op, setting)
        given = dict(zip(op.partitioning.dimensions, arrays, strict=False)) | options
        return as_auto(call, arrays, options, lambda *_: op.partitioning.result_specs(given))

    # Where no axis is Auto there is nothing to shard.
    mesh = jax.sharding.get_abstract_mesh()
    free = auto_axes(mesh)
    if not free or mesh.size == 1:
        return op(*arrays, **options)

    # Arrays by name, and the sizes of their dimensions.
    dimensions, results, prepare = op.partitioning
    given = dict(zip(dimensions, arrays, strict=False)) | {
        key: options.pop(key) for key in dimensions if key in options
    }
    arrays = prepare({key: x for key, x in given.items() if x is not None})
    dimensions = {key: of_rank(dimensions[key], x.ndim) for key, x in arrays.items()}
    sizes = {}
    for key, x in arrays.items():
        if key != "segment_ids":
            for letter, n in zip(dimensions[key], x.shape, strict=False):
                sizes[letter] = max(n, sizes.get(letter, 1))

    # Rows and heads, and time by the op of `ops.sequence_parallel`.
    axes = {"B": batch_axes(sizes["B"], free), **_head_axes(sizes, free)}
    P = sequence_parts(sizes["T"])
    if P == 1 and is_varying(arrays):
        return op(**arrays, **options)  # see `ops.explicit_axes`
    over_time = _over_time(op) if P > 1 else None
    if P > 1 and not over_time.can_shard(sizes, P):
        P = 1
    if P > 1:
        axes["T"], op = TIME_AXIS, over_time.op
        options["kind"], options["axis_name"] = kinds(setting).scan, TIME_AXIS
        _split_ids(arrays, dimensions, sizes["T"], options.get("reverse", False))

    # The partition spec of every array and result.
    specs = {key: spec_of(dimensions[key], x.shape, axes) for key, x in arrays.items()}
    for key, letter in over_time.also(sizes, P).items() if P > 1 else ():
        inner = (axes[letter],) if axes.get(letter) else ()
        if sizes[letter] % (P * (free[HEAD_AXIS] if inner else 1)) == 0:
            both = axes | {letter: (*inner, TIME_AXIS)}
            specs[key] = spec_of(dimensions[key], arrays[key].shape, both)
    out = [spec_of(r, [sizes.get(letter, 1) for letter in r], axes) for r in results]
    # Without check_vma as in `ops.partitioned`. Compiled, as custom derivatives with symbolic zeros
    # can't be called step by step under shard_map.
    return jax.jit(
        jax.shard_map(
            lambda arrays: op(**arrays, **options),
            in_specs=(specs,),
            out_specs=tuple(out),
            axis_names=set(free),
            check_vma=False,
        )
    )(arrays)


def _over_time(op: Callable) -> OverTime:
    if op not in _OVER_TIME:
        known = ", ".join(known.__name__ for known in _OVER_TIME)
        raise ValueError(f"op={op!r} is not computed where devices shard time; one of {known} is")
    return _OVER_TIME[op]


def _head_axes(sizes, free):
    """Returns {letter: HEAD_AXIS} of heads, groups and channels; {} where it doesn't divide one."""
    devices, letters = free.get(HEAD_AXIS, 1), [letter for letter in "HGE" if letter in sizes]
    indivisible = any(
        sizes[letter] % devices and not (letter == "G" and sizes["G"] == 1) for letter in letters
    )
    return {} if indivisible or devices == 1 else dict.fromkeys(letters, HEAD_AXIS)


def _split_ids(arrays, dimensions, T, reverse):
    """Splits segment_ids [B, 1 + T] into segment_before [B] and [B, T], which can be sharded."""
    ids = arrays.get("segment_ids")
    if ids is not None and ids.ndim == 2 and ids.shape[1] == T + 1:
        arrays["segment_before"], dimensions["segment_before"] = ids[:, -1 if reverse else 0], "B"
        arrays["segment_ids"] = ids[:, :-1] if reverse else ids[:, 1:]
