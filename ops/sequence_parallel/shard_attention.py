"""Attention of one device's queries to one device's keys.

A device's tokens are one or two ranges of positions (see `layouts`); each pair of ranges is a call
of `ops.attention`, and their results are merged. Pairs that the mask empties cost nothing.

Dimensions: B batch, T query time, S key time of a device, H heads, G key-value heads, D head dim,
P value dim.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from tilescan.ops import masks
from tilescan.ops.decode_attention import merge_partials
from tilescan.ops.mask_placed import Range, place, visible, with_segments
from tilescan.ops.sequence_parallel import layouts
from tilescan.ops.sizes import check_sizes

# `ops.attention` is the function.
attention_lib = importlib.import_module("tilescan.ops.attention")
# Of queries and of keys; None without Segments.
SegmentIds = tuple[Integer[Array, "B T"], Integer[Array, "B S"]] | tuple[None, None]
Balances = layouts.Balance | tuple[layouts.Balance, layouts.Balance]
# Of a device's queries and the keys of all devices.
Bias = (
    Float[Array, "#B #H #T _"]
    | Float[Array, "#H #T _"]
    | Float[Array, "#T _"]
    | Float[Array, "_"]
    | Float[Array, ""]
)
Index = int | np.integer | Integer[Array, ""]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every call, as in `ops.attention`."""

    scale: float
    logit_cap: float | None
    implementation: str | None


def options(
    q: Float[Array, "B T H D"],
    scale: float | np.floating | None,
    logit_cap: float | None,
    implementation: str | None,
) -> Options:
    """Returns these arguments of `ops.attention` with its defaults.

    Raises:
      ValueError: an implementation that is unknown or not for shards.
    """
    known = [name for name in attention_lib.IMPLEMENTATIONS if name != "reference"]
    if implementation not in known:
        raise ValueError(
            f"implementation={implementation!r} is unknown to attention of shards; it must be "
            "one of " + ", ".join(map(repr, known))
        )
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return Options(scale, None if logit_cap is None else float(logit_cap), implementation)


def check(
    q: Array, k: Array, v: Array, mask: masks.Mask, bias: Array | None, P: int, balance: Balances
) -> None:
    """Checks that arrays are one device's shard of one sequence.

    Raises:
      ValueError: shapes, mask, bias or balance that do not fit.
      TypeError: segment ids that are not integers.
    """
    (B, T, H, D), S = q.shape, k.shape[1]
    of_queries, of_keys = layouts.of_queries_and_keys(balance)
    if T != S and of_queries == of_keys:
        raise ValueError(
            f"q has {T} and k {S} tokens on each device: both must be one shard of the sequence"
        )
    check_sizes(q=(q, "B, T, H, D"), k=(k, "B, S, G, D"), v=(v, "B, S, G, P"))
    if k.shape[:3] != v.shape[:3] or (B, D) != (k.shape[0], k.shape[3]) or H % k.shape[2]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} don't fit; attention takes q [B, T, H, D], "
            "k [B, S, G, D] and v [B, S, G, P], with G a divisor of H"
        )
    layouts.check(T * P, P, of_queries)
    layouts.check(S * P, P, of_keys)
    segments = masks.segments_of(mask)
    if segments is not None:
        masks.validate(segments, B, T, S, 0)
        if segments_in_or(mask):
            raise ValueError(
                f"{mask!r}: Segments under | can't be sharded; write (a | b) & Segments"
            )
    if bias is not None:
        full = (B, H, T, S * P)
        shape = (1,) * (4 - bias.ndim) + bias.shape
        if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
            raise ValueError(
                f"bias {bias.shape} does not broadcast to [B, H, T, S of all devices] = {full}"
            )


def segments_in_or(mask: masks.Mask) -> bool:
    """Returns whether a mask has Segments under an `|`."""
    return masks.split_segments(mask)[0].segments() is not None


def segment_ids(mask: masks.Mask, T: int, S: int) -> SegmentIds:
    """Returns ids of T queries and of S keys in a mask's Segments; (None, None) without."""
    segments = masks.segments_of(mask)
    return (None, None) if segments is None else tuple(map(jnp.asarray, segments.both(T, S)))


def columns(
    bias: Float[Array, "#B #H #T _"] | None, owner: Index, S: int
) -> Float[Array, "#B #H #T _"] | None:
    """Returns the bias of the S keys of device `owner`."""
    if bias is None or bias.shape[3] == 1:
        return bias
    return jax.lax.dynamic_slice_in_dim(bias, owner * S, S, axis=3)


def add_columns(
    total: Float[Array, "#B #H #T _"] | None,
    own: Float[Array, "#B #H #T _"] | None,
    owner: Index,
    S: int,
) -> Float[Array, "#B #H #T _"] | None:
    """Returns total [..., keys of all devices] plus `own` of the S keys of device `owner`."""
    if total is None or total.shape == own.shape:
        return None if total is None else total + own
    old = jax.lax.dynamic_slice_in_dim(total, owner * S, S, axis=3)
    return jax.lax.dynamic_update_slice_in_dim(total, old + own, owner * S, axis=3)


def sees(
    mask: masks.Mask, P: int, T: int, balance: Balances, S: int | None = None
) -> Bool[np.ndarray, "{P} n {P} m"]:
    """Returns whether range a of device p's queries may see range b of device r's keys."""
    return _visible(mask, P, T, balance, S)[0]


def pairs(
    mask: masks.Mask, P: int, T: int, balance: Balances, S: int | None = None
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Returns for each range of queries the ranges of keys that any device sees on any device.

    Neighbours of which every query of every device sees all keys are in one group, for one call.
    """
    some, every = _visible(mask, P, T, balance, S)
    some, every = some.any(axis=(0, 2)), every.all(axis=(0, 2))
    found = []
    for a, row in enumerate(some):
        groups: list[list[int]] = []
        for b in map(int, np.flatnonzero(row)):
            joins = groups and groups[-1][-1] == b - 1 and every[a, b - 1] and every[a, b]
            groups[-1:] = [[*groups[-1], b]] if joins else [*groups[-1:], [b]]
        found.append(tuple(map(tuple, groups)) or ((min(a, some.shape[1] - 1),),))
    return tuple(found)


def _visible(mask, P, T, balance, S):
    """Returns `mask_placed.visible` of all devices' ranges as two of bool [P, n, P, m]."""

    def all_of(balance, T):
        return [s for p in range(P) for s in layouts.ranges(p, P, T, balance)]

    of_queries, of_keys = layouts.of_queries_and_keys(balance)
    queries, keys = all_of(of_queries, T), all_of(of_keys, T if S is None else S)
    shape = P, len(queries) // P, P, len(keys) // P
    return tuple(x.reshape(shape) for x in visible(mask, queries, keys))


def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    bias: Float[Array, "#B #H #T #S"] | None,
    mask: masks.Mask,
    ids: SegmentIds,
    queries: tuple[Range, ...],
    keys: tuple[Range, ...],
    options: Options,
    seen: tuple[tuple[tuple[int, ...], ...], ...] | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B T H"]]:
    """Returns (o, lse) of these keys alone, both in the statistics' dtype.

    Args:
      q, k, v: of the two shards.
      bias: [B or 1, H or 1, T or 1, S or 1] or None.
      mask: the whole sequence's.
      ids: (segment ids of q [B, T], of k [B, S]), or (None, None).
      queries, keys: the ranges of q's and k's positions.
      options: of every call.
      seen: of `pairs`; by default every range of queries sees every one of keys.
    """
    o, lse = [], []
    for a, those in zip(queries, _seen(queries, keys, seen), strict=True):
        merged = None
        for b in those:
            call = _call(q, k, v, bias, mask, ids, a, b)
            new = attention_lib.forward(*call, **dataclasses.asdict(options))
            new = new[0].astype(new[1].dtype), new[1]
            merged = new if merged is None else merge_partials(*merged, *new)
        o.append(merged[0])
        lse.append(merged[1])
    return jnp.concatenate(o, 1), jnp.concatenate(lse, 1)


def backward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    bias: Float[Array, "#B #H #T #S"] | None,
    mask: masks.Mask,
    ids: SegmentIds,
    queries: tuple[Range, ...],
    keys: tuple[Range, ...],
    options: Options,
    o: Float[Array, "B T H P"],
    lse: Float[Array, "B T H"],
    do: Float[Array, "B T H P"],
    dlse: Float[Array, "B T H"],
    seen: tuple[tuple[tuple[int, ...], ...], ...] | None = None,
) -> tuple[
    Float[Array, "B T H D"],
    Float[Array, "B S G D"],
    Float[Array, "B S G P"],
    Float[Array, "#B #H #T #S"] | None,
]:
    """Returns the contributions of these keys to (dq, dk, dv, dbias or None), float32 at least.

    o, lse and their cotangents are those of the attention to all keys; otherwise as in `forward`.
    """
    dtype = lse.dtype
    dq, dk, dv = (jnp.zeros(x.shape, dtype) for x in (q, k, v))
    dbias = None if bias is None else jnp.zeros(bias.shape, dtype)
    for a, those in zip(queries, _seen(queries, keys, seen), strict=True):
        rows = [_rows(x, a) for x in (o, lse, do, dlse)]
        for b in those:
            call = _call(q, k, v, bias, mask, ids, a, b)
            new = attention_lib.backward(*call, *rows, **dataclasses.asdict(options))
            dq, dk, dv = (
                _add(x, d, (slice(None), _slice(where)))
                for x, d, where in zip((dq, dk, dv), new[:3], (a, b, b), strict=True)
            )
            if bias is not None:
                dbias = _add(dbias, new[3], _bias_index(bias, a, b))
    return dq, dk, dv, dbias


def _seen(queries, keys, seen):
    if seen is None:
        return [keys] * len(queries)
    return [[_joined([keys[b] for b in group]) for group in those] for those in seen]


def _joined(ranges):
    """Returns neighbours as one range, whose positions don't matter: the mask shows all of them."""
    if len(ranges) == 1:
        return ranges[0]
    return Range(None, 1, sum(r.length for r in ranges), ranges[0].row)


def _call(q, k, v, bias, mask, ids, a, b):
    """Returns the positional arguments of `ops.attention`'s passes for one pair of ranges."""
    if ids[0] is not None:
        mask = with_segments(mask, _rows(ids[0], a), _rows(ids[1], b))
    if b.start is None:
        segments = masks.split_segments(mask)[1]
        mask, q_offset = masks.Full() if segments is None else segments, 0
    else:
        mask, q_offset = place(mask, a, b)
    if isinstance(q_offset, jax.Array):
        q_offset = q_offset.astype(jnp.int32)
    if bias is not None:
        bias = bias[_bias_index(bias, a, b)]
    return _rows(q, a), _rows(k, b), _rows(v, b), bias, mask, q_offset


def _slice(where):
    return slice(where.row, where.row + where.length)


def _rows(x, where):
    return x if x.shape[1] == where.length else x[:, _slice(where)]


def _bias_index(bias, a, b):
    """Returns the index of a pair of ranges in the bias; dimensions of length 1 are broadcast."""
    axes = (
        _slice(s) if n > 1 else slice(None) for n, s in zip(bias.shape[2:], (a, b), strict=True)
    )
    return (slice(None), slice(None), *axes)


def _add(x, update, index):
    update = update.astype(x.dtype)
    return x + update if x.shape == update.shape else x.at[index].add(update)
