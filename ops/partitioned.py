"""Attention on a mesh: every device attends for its own rows of the batch and its own heads.

The compiler partitions XLA's operations over the devices of a mesh by itself, but not a Pallas
kernel. So the op is called inside `jax.shard_map`, where it sees one device's shard, whatever
implements it. Rows and heads are independent: nothing is sent but sums of gradients that devices
share. Where the mesh has an axis for it, time is sharded as well, and devices exchange keys or
heads by one of the strategies of `ops.sequence_parallel`.

Dimensions: B batch, T query time, S key time, H heads, G key-value heads, D head dim, P value dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer, Num, PyTree

from tilescan.ops import masks
from tilescan.ops.arrays import AnyArray
from tilescan.ops.attention import attention, dropout_seeds
from tilescan.ops.cross_entropy import chunked_cross_entropy
from tilescan.ops.dimensions import repeated, repeats, spec_of
from tilescan.ops.explicit_axes import (
    as_auto,
    as_first,
    auto_axes,
    explicit_devices,
    explicit_mesh,
    is_varying,
    partitioned_by_compiler,
    replicated,
    specs_of,
)
from tilescan.ops.mesh_axes import HEAD_AXIS, TIME_AXIS, batch_axes, sequence_devices
from tilescan.ops.sequence_parallel import ATTENTION, kinds, layouts
from tilescan.ops.sequence_parallel.decode import sharded_append, sharded_decode_attention


def partitioned(
    op: Callable,
    q: Float[AnyArray, "B T H D"],
    k: Float[AnyArray, "B S G D"],
    v: Float[AnyArray, "B S G P"],
    *,
    mask: masks.Mask = masks.Full(),  # noqa: B008 (frozen)
    bias: Float[AnyArray, "..."] | None = None,
    q_offset: int | np.integer | Integer[AnyArray, ""] | None = None,
    sequence_parallel: str | None = None,
    balance: str = "contiguous",
    **options: Any,
) -> PyTree:
    """Returns op(q, k, v, mask=mask, bias=bias, q_offset=q_offset, **options) on the mesh in use.

    The mesh is that of `jax.set_mesh`; without one, on a single device, where all its axes are
    manual already, and where its axes are Explicit and time is not sharded, this is the call
    itself, which heeds Explicit axes (`ops.explicit_axes`). Otherwise the batch is sharded over the
    axes of BATCH_AXES that divide it, and the heads over HEAD_AXIS if it divides H; all else is
    replicated. If HEAD_AXIS does not divide G, key-value heads are repeated, as few times as needed
    for each device to hold those that its queries read.

    Args:
      op: `ops.attention.attention` or a function like it.
      q, k, v, mask, bias, q_offset: as there; where `op` is of devices that share time already, the
        bias has the keys of all of them.
      sequence_parallel: a setting of `ops.sequence_parallel.kinds`, by which time is sharded over
        TIME_AXIS; None does not shard time. Only for self-attention of whole sequences (q_offset is
        0 or None), and only with `ops.attention.attention` as op.
      balance: the order of the tokens then, by which devices hold equal work.
      **options: of `op`; no arrays but a dropout_seed, by which devices that shard the batch and
        the heads drop what one device would. There is no dropout where time is sharded.

    Returns:
      What `op` returns: arrays whose first dimensions are B, T and H.

    Raises:
      ValueError: time that the devices of TIME_AXIS don't divide, or dropout or another op than
        `ops.attention.attention` where they shard time.
    """
    given = dict(mask=mask, bias=bias, q_offset=q_offset)
    if options.get("dropout_rate"):
        rate, seed = options["dropout_rate"], options.pop("dropout_seed", None)
        given["dropout_seed"] = dropout_seeds(rate, seed, q)

    # Under Explicit axes: time, and ops that can't shard themselves, are left to Auto axes.
    shards_time = sequence_parallel is not None and explicit_devices(TIME_AXIS, (q, k, v)) > 1
    mesh = explicit_mesh((q, k, v))
    if shards_time or (mesh is not None and mesh.size > 1 and not hasattr(op, "partitioning")):
        time = dict(sequence_parallel=sequence_parallel, balance=balance)
        call = functools.partial(partitioned, op, **time, **options)
        return as_auto(call, (q, k, v), given, as_first(3))

    # Where no axis is Auto there is nothing to shard.
    mesh = jax.sharding.get_abstract_mesh()
    free = auto_axes(mesh)
    if not free or mesh.size == 1:
        return op(q, k, v, **given, **options)
    shards_time = sequence_parallel is not None and free.get(TIME_AXIS, 1) > 1
    if not shards_time and is_varying((q, k, v)):
        return op(q, k, v, **given, **options)  # see `ops.explicit_axes`

    # Rows and heads. Key-value heads that HEAD_AXIS does not divide are repeated.
    batch, heads = batch_axes(q.shape[0], free), None
    devices = free.get(HEAD_AXIS, 1)
    if devices > 1 and q.shape[2] % devices == 0:
        heads = HEAD_AXIS
        times = repeats(q.shape[2], k.shape[2], devices)
        k, v = (repeated(x, 2, times) for x in (k, v))

    # Time, by a strategy of `ops.sequence_parallel`.
    time = None
    if shards_time and "dropout_seed" in given:
        raise ValueError(
            f"dropout_rate={rate}: devices that shard time drop no weights; use dropout_rate=0 or "
            f"mesh.{TIME_AXIS} = 1"
        )
    if shards_time and op is not attention:
        raise ValueError(
            f"attention by {op} can't shard time over {free[TIME_AXIS]} devices, as those of "
            f"`ops.attention` do; use one of them, or mesh.{TIME_AXIS} = 1"
        )
    if shards_time:
        _check_time(q, k, free[TIME_AXIS], balance, q_offset)
        time, q_offset = TIME_AXIS, None
        kind = kinds(sequence_parallel).attention
        op = functools.partial(ATTENTION[kind], axis_name=TIME_AXIS, balance=balance)

    # The partition spec of every array.
    axes = {"B": batch, "T": time, "H": heads}
    arrays = {"q": q, "k": k, "v": v, "mask": mask}
    specs = {name: PartitionSpec(batch, time, heads) for name in ("q", "k", "v")}
    specs["mask"] = jax.tree.map(lambda ids: spec_of("BT", ids.shape, axes), mask)
    if bias is not None:
        arrays["bias"] = bias
        specs["bias"] = spec_of("BHTS"[-bias.ndim :], bias.shape, axes)
    if "dropout_seed" in given:
        arrays["dropout_seed"], specs["dropout_seed"] = (
            given["dropout_seed"], PartitionSpec(batch, heads),
        )  # fmt: skip
    if time is not None:
        pass
    elif q_offset is None or isinstance(q_offset, (int, np.integer)):
        options["q_offset"] = q_offset
    else:
        arrays["q_offset"], specs["q_offset"] = q_offset, PartitionSpec()

    # Without check_vma: loops in Mosaic GPU don't carry the types of manual axes. Gradients of what
    # devices share are summed over them all the same.
    return jax.shard_map(
        lambda arrays: op(**arrays, **options),
        in_specs=(specs,),
        out_specs=PartitionSpec(batch, time, heads),
        axis_names=set(free),
        check_vma=False,
    )(arrays)


@partitioned_by_compiler(
    lambda args, kwargs, out: (as_first(3)(args, kwargs, out[0]), specs_of(args[2]))
)
def partitioned_decode(
    q: Float[AnyArray, "B T H D"],
    new: tuple[Float[AnyArray, "B T G D"], Float[AnyArray, "B T G P"], Integer[AnyArray, "B T"]],
    caches: tuple[Float[AnyArray, "B S G D"], Float[AnyArray, "B S G P"], Integer[AnyArray, "B S"]],
    lengths: Integer[AnyArray, " B"],
    *,
    mask: masks.Mask,
    ids: Integer[AnyArray, "B T"] | None,
    bias: Float[AnyArray, "#B H #T S"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T H P"], tuple[Array, Array, Array]]:
    """Appends to a cache that TIME_AXIS shards and attends to it, each device to its own slots.

    Args:
      q: queries of T new tokens.
      new: their keys [B, T, G, D], values [B, T, G, P] and segment ids [B, T].
      caches: [B, S, ...] of the same, S over all devices.
      lengths: filled slots of each row before the new ones.
      mask: without Segments.
      ids: the queries' segment ids, where they hide other segments' keys.
      bias, **options: of `ops.decode_attention`.

    Returns:
      o [B, T, H, P], and the caches with the new tokens.

    Raises:
      ValueError: the devices along TIME_AXIS don't divide S.
    """
    # Slots must divide; heads are sharded if both kinds do.
    mesh = jax.sharding.get_abstract_mesh()
    free = auto_axes(mesh)
    P, S = free[TIME_AXIS], caches[0].shape[1]
    if S % P:
        raise ValueError(
            f"a cache of max_len={S} can't be sharded over mesh.{TIME_AXIS} = {P} devices; use "
            f"max_len={-(-S // P) * P}"
        )
    batch, devices = batch_axes(q.shape[0], free), free.get(HEAD_AXIS, 1)
    divides = q.shape[2] % devices == 0 and new[0].shape[2] % devices == 0
    heads = HEAD_AXIS if devices > 1 and divides else None
    step_spec, cache_spec = (PartitionSpec(batch, time, heads) for time in (None, TIME_AXIS))
    rows = PartitionSpec(batch)
    bias_spec = None
    if bias is not None:
        bias_spec = PartitionSpec(batch if bias.shape[0] > 1 else None, heads, None, TIME_AXIS)

    # Each device appends the new tokens in its slots, and attends to its slots.
    def step(q, new, caches, lengths, ids, bias):
        k, v, kv_ids = (
            sharded_append(c, x, lengths, TIME_AXIS) for c, x in zip(caches, new, strict=True)
        )
        seen = mask if ids is None else mask & masks.Segments(ids, kv_ids)
        o = sharded_decode_attention(
            q, k, v, lengths=lengths + q.shape[1], mask=seen, bias=bias, axis_name=TIME_AXIS,
            **options,
        )  # fmt: skip
        return o, (k, v, kv_ids)

    caches_spec = (cache_spec, cache_spec, PartitionSpec(batch, TIME_AXIS))
    return jax.shard_map(
        step,
        in_specs=(step_spec, (step_spec, step_spec, rows), caches_spec, rows, rows, bias_spec),
        out_specs=(step_spec, caches_spec),
        axis_names=set(free),
        check_vma=False,
    )(q, new, caches, lengths, ids, bias)


@partitioned_by_compiler(replicated)
def partitioned_cross_entropy(
    hidden: Float[AnyArray, "B T E"],
    head: Float[AnyArray, "E V"] | Float[AnyArray, "V E"],
    targets: Integer[AnyArray, "B T"],
    weights: Num[AnyArray, "B T"],
    **options: Any,
) -> dict[str, Float[Array, ""]]:
    """Returns `ops.cross_entropy.chunked_cross_entropy`, each device computing its shard of time.

    The batch and the head are partitioned by the compiler; arguments as there.
    """
    if sequence_devices() == 1:
        return chunked_cross_entropy(hidden, head, targets, weights, **options)
    time, everywhere = PartitionSpec(None, TIME_AXIS), PartitionSpec()
    return jax.shard_map(
        functools.partial(chunked_cross_entropy, axis_name=TIME_AXIS, **options),
        in_specs=(time, everywhere, time, time),
        out_specs=everywhere,
        axis_names={TIME_AXIS},
    )(hidden, head, targets, weights)


def _check_time(q, k, P: int, balance: str, q_offset) -> None:
    layouts.check(q.shape[1], P, balance)
    if q.shape[1] != k.shape[1] or not (q_offset is None or isinstance(q_offset, int)) or q_offset:
        raise ValueError(
            f"time is sharded over {P} devices only for self-attention from position 0, not for "
            f"{q.shape[1]} queries and {k.shape[1]} keys with q_offset={q_offset}"
        )
