"""Attention of one device's queries to one device's keys, in the parts that make it up.

A device's tokens are one or two stretches (see `layouts`); each pair of stretches is a call of
`ops.attention`, and their results are merged. Pairs that the mask empties cost nothing.

Letters: B batch, T query time, S key time of a device, H heads, G key-value heads, D head dim,
P value dim.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.ops import masks
from tilescan.ops.decode_attention import merge_partials
from tilescan.ops.mask_placed import Stretch, place, visible, with_segments
from tilescan.ops.sequence_parallel import layouts
from tilescan.ops.sizes import check_sizes

# `ops.attention` is the function.
attention_lib = importlib.import_module("tilescan.ops.attention")


@dataclasses.dataclass(frozen=True)
class Options:
    """Of every call, as in `ops.attention`."""

    scale: float
    logit_cap: float | None
    implementation: str | None


def options(q, scale, logit_cap, implementation) -> Options:
    """The options that `ops.attention` would make of these arguments."""
    known = [name for name in attention_lib.IMPLEMENTATIONS if name != "reference"]
    if implementation not in known:
        raise ValueError(
            f"implementation={implementation!r} is unknown to attention in parts; it must be one "
            "of " + ", ".join(map(repr, known))
        )
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return Options(scale, None if logit_cap is None else float(logit_cap), implementation)


def check(q, k, v, mask, bias, P: int, balance) -> None:
    """Raises ValueError or TypeError unless these are one device's part of one sequence."""
    (B, T, H, D), S = q.shape, k.shape[1]
    of_queries, of_keys = layouts.of_queries_and_keys(balance)
    if T != S and of_queries == of_keys:
        raise ValueError(
            f"q has {T} and k {S} tokens on each device: both must be the same part of the sequence"
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
                f"{mask!r}: Segments under | can't be split over devices; write (a | b) & Segments"
            )
    if bias is not None:
        full = (B, H, T, S * P)
        shape = (1,) * (4 - bias.ndim) + bias.shape
        if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
            raise ValueError(
                f"bias {bias.shape} does not broadcast to [B, H, T, S of all devices] = {full}"
            )


def segments_in_or(mask) -> bool:
    return masks.split_segments(mask)[0].segments() is not None


def segment_ids(mask, T: int, S: int):
    """(ids of the queries, of the keys) of a mask's Segments; (None, None) without."""
    segments = masks.segments_of(mask)
    return (None, None) if segments is None else tuple(map(jnp.asarray, segments.both(T, S)))


def columns(bias, owner, S: int):
    """The bias of the keys of device `owner`."""
    if bias is None or bias.shape[3] == 1:
        return bias
    return jax.lax.dynamic_slice_in_dim(bias, owner * S, S, axis=3)


def add_columns(total, part, owner, S: int):
    """total [..., keys of all devices] plus the part of device `owner`."""
    if total is None or total.shape == part.shape:
        return None if total is None else total + part
    old = jax.lax.dynamic_slice_in_dim(total, owner * S, S, axis=3)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, owner * S, axis=3)


def sees(mask, P: int, T: int, balance, S: int | None = None) -> np.ndarray:
    """bool [P, n, P, m]: whether stretch a of device p's queries may see stretch b of r's keys."""
    return _visible(mask, P, T, balance, S)[0]


def pairs(mask, P: int, T: int, balance, S: int | None = None):
    """For each stretch of queries, those of keys that it sees on any device from any device.

    Neighbours of which every query of every device sees all keys stand together: they are one call.
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
    def all_of(balance, T):
        return [s for p in range(P) for s in layouts.stretches(p, P, T, balance)]

    of_queries, of_keys = layouts.of_queries_and_keys(balance)
    queries, keys = all_of(of_queries, T), all_of(of_keys, T if S is None else S)
    shape = P, len(queries) // P, P, len(keys) // P
    return tuple(x.reshape(shape) for x in visible(mask, queries, keys))


def forward(q, k, v, bias, mask, ids, queries, keys, options: Options, seen=None):
    """(o [B, T, H, P] in the statistics' dtype, lse [B, T, H]) of these keys alone.

    Args:
      bias: [B or 1, H or 1, T or 1, S or 1] or None.
      mask: the whole sequence's.
      ids: (segment ids of q [B, T], of k [B, S]), or (None, None).
      queries, keys: the stretches of q's and k's time.
      seen: of `pairs`; default: every stretch of queries sees every one of keys.
    """
    o, lse = [], []
    for a, those in zip(queries, _seen(queries, keys, seen), strict=True):
        part = None
        for b in those:
            call = _call(q, k, v, bias, mask, ids, a, b)
            new = attention_lib.forward(*call, **dataclasses.asdict(options))
            new = new[0].astype(new[1].dtype), new[1]
            part = new if part is None else merge_partials(*part, *new)
        o.append(part[0])
        lse.append(part[1])
    return jnp.concatenate(o, 1), jnp.concatenate(lse, 1)


def backward(
    q, k, v, bias, mask, ids, queries, keys, options: Options, o, lse, do, dlse, seen=None
):
    """(dq, dk, dv, dbias or None) that these keys add; float32 (float64) sums."""
    dtype = lse.dtype
    dq, dk, dv = (jnp.zeros(x.shape, dtype) for x in (q, k, v))
    dbias = None if bias is None else jnp.zeros(bias.shape, dtype)
    for a, those in zip(queries, _seen(queries, keys, seen), strict=True):
        rows = [_rows(x, a) for x in (o, lse, do, dlse)]
        for b in those:
            call = _call(q, k, v, bias, mask, ids, a, b)
            new = attention_lib.backward(*call, *rows, **dataclasses.asdict(options))
            dq, dk, dv = (
                _add(x, d, (slice(None), _slice(stretch)))
                for x, d, stretch in zip((dq, dk, dv), new[:3], (a, b, b), strict=True)
            )
            if bias is not None:
                dbias = _add(dbias, new[3], _bias_index(bias, a, b))
    return dq, dk, dv, dbias


def _seen(queries, keys, seen):
    if seen is None:
        return [keys] * len(queries)
    return [[_joined([keys[b] for b in group]) for group in those] for those in seen]


def _joined(stretches):
    """Neighbours as one stretch, whose positions don't matter: the mask shows all of them."""
    if len(stretches) == 1:
        return stretches[0]
    return Stretch(None, 1, sum(s.length for s in stretches), stretches[0].row)


def _call(q, k, v, bias, mask, ids, a, b):
    """The positional arguments of `ops.attention`'s passes for one pair of stretches."""
    if ids[0] is not None:
        mask = with_segments(mask, _rows(ids[0], a), _rows(ids[1], b))
    if b.start is None:
        mask, q_offset = masks.split_segments(mask)[1] or masks.Full(), 0
    else:
        mask, q_offset = place(mask, a, b)
    if isinstance(q_offset, jax.Array):
        q_offset = q_offset.astype(jnp.int32)
    if bias is not None:
        bias = bias[_bias_index(bias, a, b)]
    return _rows(q, a), _rows(k, b), _rows(v, b), bias, mask, q_offset


def _slice(stretch):
    return slice(stretch.row, stretch.row + stretch.length)


def _rows(x, stretch):
    return x if x.shape[1] == stretch.length else x[:, _slice(stretch)]


def _bias_index(bias, a, b):
    """Where the bias of a pair of stretches stands; dimensions of length 1 are broadcast."""
    axes = (
        _slice(s) if n > 1 else slice(None) for n, s in zip(bias.shape[2:], (a, b), strict=True)
    )
    return (slice(None), slice(None), *axes)


def _add(x, part, index):
    part = part.astype(x.dtype)
    return x + part if x.shape == part.shape else x.at[index].add(part)
