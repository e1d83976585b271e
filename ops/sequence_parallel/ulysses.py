"""Ulysses: all tokens of some heads instead of some tokens of all heads (arXiv 2309.14509).

An all-to-all before attention gives each device the whole sequence in H / P heads, one after it
returns the tokens. Any attention fits between. With a ring between (USP, arXiv 2405.07719), only
groups of devices exchange heads, and the groups' sequences meet in a ring: so P may exceed the
number of key-value heads.

Dimensions: B batch, T query time, S key time of one device, H heads, G key-value heads, D head dim,
P devices along the axis, U devices of a group, R groups.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from tilescan.ops import masks
from tilescan.ops.attention import attention
from tilescan.ops.mask_placed import Range, place, with_segments
from tilescan.ops.sequence_parallel import layouts, shard_attention
from tilescan.ops.sequence_parallel.ring_attention import Ring, ring_attention


def ulysses_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    *,
    mask: masks.Mask = masks.Full(),  # noqa: B008 (frozen)
    bias: shard_attention.Bias | None = None,
    scale: float | None = None,
    logit_cap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    axis_name: str = "sequence",
    balance: shard_attention.Balances = "contiguous",
) -> Float[Array, "B T H P"] | tuple[Float[Array, "B T H P"], Float[Array, "B T H"]]:
    """Computes `ops.attention` of a sequence sharded over a mesh axis, inside `jax.shard_map`.

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
        # A chunk's queries have an offset; a layout of blocks is for all keys.
        blocks = isinstance(balance, tuple) and masks.split_segments(mask)[0].band() is None
        if start or blocks:
            queries, keys = Range(q_offset, 1, q.shape[1]), Range(start, 1, k.shape[1])
            mask, q_offset = place(mask, queries, keys)
        return attention(q, k, v, mask=mask, q_offset=q_offset, **options, **rest)

    return _between(groups, balance, q, k, v, mask, bias, return_lse, inner)


def usp_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    *,
    mask: masks.Mask = masks.Full(),  # noqa: B008 (frozen)
    bias: shard_attention.Bias | None = None,
    scale: float | None = None,
    logit_cap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    axis_name: str = "sequence",
    balance: shard_attention.Balances = "contiguous",
    group_size: int | None = None,
) -> Float[Array, "B T H P"] | tuple[Float[Array, "B T H P"], Float[Array, "B T H"]]:
    """Computes Ulysses among `group_size` devices, a ring among the groups.

    Otherwise arguments, results and errors are those of `ring_attention`.

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
    """The devices of an axis in groups, which exchange heads for time.

    Attributes:
      axis_name: of the mesh.
      members: members[r] are the axis indices of group r, in the order in which their tokens are
        concatenated.
      size: devices of a group.
      options: of the collectives among them.
    """

    def __init__(self, axis_name: str, members: tuple[tuple[int, ...], ...]):
        self.axis_name, self.members = axis_name, members
        self.size = len(members[0])
        self.options = dict(axis_name=axis_name, tiled=True)
        if len(members) > 1:
            self.options["axis_index_groups"] = [list(group) for group in members]

    @classmethod
    def of(cls, axis_name: str, P: int, U: int, balance: shard_attention.Balances) -> "Groups":
        """Returns groups whose tokens are those of one of P / U devices in the same order."""
        R = P // U
        if balance == "striped":
            return cls(axis_name, tuple(tuple(range(r, P, R)) for r in range(R)))
        return cls(axis_name, tuple(tuple(range(r * U, r * U + U)) for r in range(R)))

    def index(self) -> Int32[Array, ""]:
        """Returns this device's index in its group."""
        places = {device: i for group in self.members for i, device in enumerate(group)}
        table = jnp.asarray([places[d] for d in range(len(places))], jnp.int32)
        return table[jax.lax.axis_index(self.axis_name)]

    def to_heads(self, x: Float[Array, "B T H D"]) -> Float[Array, "B _ _ D"]:
        """Returns the group's tokens of this device's heads, [B, U T, H / U, D]."""
        return jax.lax.all_to_all(x, split_axis=2, concat_axis=1, **self.options)

    def to_time(self, x: Float[Array, "B _ _ D"]) -> Float[Array, "B _ _ D"]:
        """Returns this device's tokens of all heads, the inverse of `to_heads`."""
        return jax.lax.all_to_all(x, split_axis=1, concat_axis=2, **self.options)

    def gather(self, x: Array, axis: int) -> Array:
        """Returns x of all devices of the group, concatenated along an axis."""
        return jax.lax.all_gather(x, axis=axis, **self.options)

    def joined(self, T: int, balance: layouts.Balance) -> Int[np.ndarray, " n"]:
        """Returns the permutation of the group's concatenated U T tokens into its own order."""
        U, rows = self.size, np.arange(self.size * T)
        if isinstance(balance, layouts.Runs):
            runs = layouts.ranges(0, U * len(self.members), T, balance)
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
    """Computes inner(q, k, v, mask=, bias=, return_lse=) between the two all-to-alls."""
    (_, T, H, _), S, U = q.shape, k.shape[1], groups.size
    P = U * len(groups.members)
    shard_attention.check(q, k, v, mask, bias, P, balance)
    ids = shard_attention.segment_ids(mask, T, S)
    of_queries, of_keys = layouts.of_queries_and_keys(balance)
    order, k_order = groups.joined(T, of_queries), groups.joined(S, of_keys)
    arrange = lambda x, order, axis=1: x if _plain(order) else jnp.take(x, order, axis=axis)
    back = lambda x: arrange(x, np.argsort(order))

    # To heads: q, k and v by all-to-all, segment ids and bias gathered.
    H_all = -(-H // U) * U
    k, v = (_repeat_heads(x, H, H_all, U) for x in (k, v))
    q = arrange(groups.to_heads(_pad_heads(q, H_all)), order)
    k, v = (arrange(groups.to_heads(x), k_order) for x in (k, v))
    if ids[0] is not None:
        pairs = zip(ids, (order, k_order), strict=True)
        mask = with_segments(mask, *(arrange(groups.gather(x, 1), o) for x, o in pairs))
    if bias is not None:
        rows = lambda x: arrange(x, order, 2)
        bias = _group_bias(bias, groups, k_order, H_all, rows)
    # Attention, and back to time.
    o, lse = inner(q, k, v, mask=mask, bias=bias, return_lse=True)
    o = groups.to_time(back(o))[:, :, :H]
    if not return_lse:
        return o
    return o, groups.to_time(back(lse)[..., None])[:, :, :H, 0]


def _pad_heads(x, H: int):
    return jnp.pad(x, ((0, 0), (0, 0), (0, H - x.shape[2]), (0, 0)))


def _repeat_heads(x, H: int, H_all: int, U: int):
    """Repeats key-value heads so that each of U devices has those of its H_all / U query heads."""
    G = x.shape[2]
    if H == H_all:
        R = H // G
        r = next(r for r in range(1, R + 1) if R % r == 0 and G * r % U == 0)
        return x if r == 1 else jnp.repeat(x, r, axis=2)
    return _pad_heads(jnp.repeat(x, H // G, axis=2), H_all)


def _plain(order) -> bool:
    return np.array_equal(order, np.arange(len(order)))


def _group_bias(bias, groups, k_order, H_all, arrange_rows):
    """Returns the bias of this device's heads, the group's queries and all devices' keys."""
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
        # The ring's order of keys: group by group, each in the order of its keys.
        S = len(k_order) // U
        columns = [np.concatenate([np.arange(d * S, d * S + S) for d in g]) for g in groups.members]
        bias = jnp.take(bias, np.concatenate([c[k_order] for c in columns]), axis=3)
    return bias
