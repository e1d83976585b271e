"""Ulysses: all tokens of some heads instead of some tokens of all heads (arXiv 2309.14509).

An all-to-all before attention gives each device the whole sequence in H / P heads, one behind it
gives the tokens back. Any attention fits between. With a ring between (USP, arXiv 2405.07719), only
groups of devices exchange heads, and the groups' sequences meet in a ring: so P may exceed the
number of key-value heads.

Letters: B batch, T query time, S key time of one device, H heads, G key-value heads, D head dim,
P devices along the axis, U devices of a group, R groups.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tilescan.ops import masks
from tilescan.ops.attention import attention
from tilescan.ops.mask_placed import Stretch, place, with_segments
from tilescan.ops.sequence_parallel import layouts, parts
from tilescan.ops.sequence_parallel.ring_attention import Ring, ring_attention


def ulysses_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    *,
    mask: masks.Mask = masks.Full(),  # noqa: B008 (frozen)
    bias: Float[Array, "#B #H #T #PS"] | None = None,
    scale: float | None = None,
    logit_cap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    axis_name: str = "sequence",
    balance: str = "contiguous",
):
    """`ops.attention` of a sequence that a mesh axis splits; called inside `jax.shard_map`.

    Arguments, results and errors are those of `ring_attention`. Each device sends
    (P - 1) / P of its q, k, v and o once forward and once backward. P that does not divide G
    repeats key-value heads, as few times as needed; P that does not divide H adds heads of zeros,
    which cost as much as real ones: at most P - 1 of them.
    """
    P = jax.lax.axis_size(axis_name)
    groups = Groups(axis_name, (tuple(range(P)),))
    options = dict(scale=scale, logit_cap=logit_cap, implementation=implementation)

    def inner(q, k, v, *, mask, **rest):
        q_offset, start = map(layouts.first, layouts.of_queries_and_keys(balance))
        part = isinstance(balance, tuple) and masks.split_segments(mask)[0].band() is None
        if start or part:  # a layout of blocks is for all keys
            queries, keys = Stretch(q_offset, 1, q.shape[1]), Stretch(start, 1, k.shape[1])
            mask, q_offset = place(mask, queries, keys)
        return attention(q, k, v, mask=mask, q_offset=q_offset, **options, **rest)

    return _between(groups, balance, q, k, v, mask, bias, return_lse, inner)


def usp_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    *,
    mask: masks.Mask = masks.Full(),  # noqa: B008 (frozen)
    bias: Float[Array, "#B #H #T #PS"] | None = None,
    scale: float | None = None,
    logit_cap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    axis_name: str = "sequence",
    balance: str = "contiguous",
    group_size: int | None = None,
):
    """Ulysses among `group_size` devices, a ring among the groups; otherwise as `ring_attention`.

    Args:
      group_size: U, a divisor of P; default: the largest that divides P and G, so that no
        key-value head is repeated.

    Raises:
      ValueError: as `ring_attention`; a group_size that does not divide P.
    """
    P = jax.lax.axis_size(axis_name)
    U = math.gcd(P, k.shape[2]) if group_size is None else group_size
    if U < 1 or P % U:
        raise ValueError(f"group_size={U} must divide the {P} devices of axis {axis_name!r}")
    groups = Groups.of(axis_name, P, U, balance)
    ring = Ring(axis_name, tuple(zip(*groups.members, strict=True)))
    options = dict(scale=scale, logit_cap=logit_cap, implementation=implementation)
    inner = functools.partial(
        ring_attention, axis_name=axis_name, balance=balance, ring=ring, **options
    )
    return _between(groups, balance, q, k, v, mask, bias, return_lse, inner)


class Groups:
    """The devices of an axis in groups, which trade heads for time.

    members[r] are the axis indices of group r, in the order in which their tokens are joined.
    """

    def __init__(self, axis_name: str, members: tuple[tuple[int, ...], ...]):
        self.axis_name, self.members = axis_name, members
        self.size = len(members[0])
        self.options = dict(axis_name=axis_name, tiled=True)
        if len(members) > 1:
            self.options["axis_index_groups"] = [list(group) for group in members]

    @classmethod
    def of(cls, axis_name: str, P: int, U: int, balance) -> "Groups":
        """Groups whose joined tokens lie as one device's of a mesh of P / U devices do."""
        R = P // U
        if balance == "striped":
            return cls(axis_name, tuple(tuple(range(r, P, R)) for r in range(R)))
        return cls(axis_name, tuple(tuple(range(r * U, r * U + U)) for r in range(R)))

    def index(self):
        """This device's place in its group."""
        places = {device: i for group in self.members for i, device in enumerate(group)}
        table = jnp.asarray([places[d] for d in range(len(places))], jnp.int32)
        return table[jax.lax.axis_index(self.axis_name)]

    def to_heads(self, x):
        """[B, T, H, D] -> [B, U T, H / U, D]"""
        return jax.lax.all_to_all(x, split_axis=2, concat_axis=1, **self.options)

    def to_time(self, x):
        """[B, U T, H / U, D] -> [B, T, H, D]"""
        return jax.lax.all_to_all(x, split_axis=1, concat_axis=2, **self.options)

    def gather(self, x, axis: int):
        return jax.lax.all_gather(x, axis=axis, **self.options)

    def joined(self, T: int, balance: layouts.Balance) -> np.ndarray:
        """int [U T]: which row of the joined devices stands where in their group's order."""
        U, rows = self.size, np.arange(self.size * T)
        if isinstance(balance, layouts.Runs):
            runs = layouts.stretches(0, U * len(self.members), T, balance)
            rows = rows.reshape(U, T)
            return np.concatenate([rows[:, r.row : r.row + r.length].reshape(-1) for r in runs])
        if len(self.members) == 1:
            return layouts.restore(U * T, U, balance)
        if balance == "striped":
            return rows.reshape(U, T).T.reshape(-1)
        if balance == "zigzag":
            runs = rows.reshape(U, 2, T // 2)
            return np.concatenate([runs[:, 0].reshape(-1), runs[::-1, 1].reshape(-1)])
        return rows


def _between(groups, balance, q, k, v, mask, bias, return_lse, inner):
    """inner(q, k, v, mask=, bias=, return_lse=) between the two all-to-alls."""
    (_, T, H, _), S, U = q.shape, k.shape[1], groups.size
    P = U * len(groups.members)
    parts.check(q, k, v, mask, bias, P, balance)
    ids = parts.segment_ids(mask, T, S)
    of_queries, of_keys = layouts.of_queries_and_keys(balance)
    order, k_order = groups.joined(T, of_queries), groups.joined(S, of_keys)
    arrange = lambda x, order, axis=1: x if _plain(order) else jnp.take(x, order, axis=axis)
    back = lambda x: arrange(x, np.argsort(order))

    H_all = -(-H // U) * U
    k, v = (_spread_heads(x, H, H_all, U) for x in (k, v))
    q = arrange(groups.to_heads(_pad_heads(q, H_all)), order)
    k, v = (arrange(groups.to_heads(x), k_order) for x in (k, v))
    if ids[0] is not None:
        pairs = zip(ids, (order, k_order), strict=True)
        mask = with_segments(mask, *(arrange(groups.gather(x, 1), o) for x, o in pairs))
    if bias is not None:
        rows = lambda x: arrange(x, order, 2)
        bias = _group_bias(bias, groups, k_order, H_all, rows)
    o, lse = inner(q, k, v, mask=mask, bias=bias, return_lse=True)
    o = groups.to_time(back(o))[:, :, :H]
    if not return_lse:
        return o
    return o, groups.to_time(back(lse)[..., None])[:, :, :H, 0]


def _pad_heads(x, H: int):
    return jnp.pad(x, ((0, 0), (0, 0), (0, H - x.shape[2]), (0, 0)))


def _spread_heads(x, H: int, H_all: int, U: int):
    """Key-value heads such that U parts of them serve the U parts of H_all query heads."""
    G = x.shape[2]
    if H == H_all:
        R = H // G
        r = next(r for r in range(1, R + 1) if R % r == 0 and G * r % U == 0)
        return x if r == 1 else jnp.repeat(x, r, axis=2)
    return _pad_heads(jnp.repeat(x, H // G, axis=2), H_all)


def _plain(order) -> bool:
    return np.array_equal(order, np.arange(len(order)))


def _group_bias(bias, groups, k_order, H_all, arrange_rows):
    """The bias of this device's heads, all the group's queries and the keys of all devices."""
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    U = groups.size
    rows = bias.shape[2] > 1
    if bias.shape[1] > 1:
        bias = jnp.pad(bias, ((0, 0), (0, H_all - bias.shape[1]), (0, 0), (0, 0)))
        if rows:
            bias = jax.lax.all_to_all(bias, split_axis=1, concat_axis=2, **groups.options)
        else:
            n = H_all // U
            bias = jax.lax.dynamic_slice_in_dim(bias, groups.index() * n, n, axis=1)
    elif rows:
        bias = groups.gather(bias, 2)
    if rows:
        bias = arrange_rows(bias)
    if bias.shape[3] > 1:
        # The ring's order of keys: group after group, each arranged as its keys are.
        S = len(k_order) // U
        columns = [np.concatenate([np.arange(d * S, d * S + S) for d in g]) for g in groups.members]
        bias = jnp.take(bias, np.concatenate([c[k_order] for c in columns]), axis=3)
    return bias
