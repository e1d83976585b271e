"""Tiled attention in plain XLA: the implementation of laptops, tests and every other platform.

Forward: for each tile of queries, a loop over its live tiles of keys carries the running maximum,
sum and unnormalised output (FlashAttention-2's order). Backward: for each tile of keys, a loop
over its live tiles of queries recomputes the weights from the saved log-sum-exp and accumulates
dk, dv, and dq in place. Tiles that the mask empties are in no list; tiles that it fills go
through a loop without masking.

Query heads that share a key-value head are rows of one tile, so keys and values are never
repeated.

Dimensions: B batch, T query time, S key time, H heads, G key-value heads, R = H / G, D head dim,
P value dim; I and J queries and keys of a tile, m and n number of tiles, M = R * I rows of a tile.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from tilescan.ops import masks
from tilescan.ops.attention_operands import (
    Offset,
    finite,
    hides,
    only,
    only_keys,
    usable_rows,
)
from tilescan.ops.lowering import choose_when_lowered
from tilescan.ops.tile_sizes import LARGE, tile_sizes
from tilescan.pallas_kernels.dropout import Dropout, kept, row_hash

LOG2_E = math.log2(math.e)
# Logits below it, in units of log 2 that of `ops.attention`, are hidden keys'.
FLOOR = -1e30 * LOG2_E


def unsupported(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    bias: Float[Array, "#B #H #T #S"] | None,
    mask: masks.Mask,
    q_offset: Offset,
) -> None:
    """Returns None: this implementation takes every shape, dtype and mask."""
    return None


def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    bias: Float[Array, "#B #H #T #S"] | None,
    mask: masks.Mask,
    q_offset: Offset,
    *,
    scale: float,
    logit_cap: float | None,
    exact: bool = False,
    dropout: Dropout | None = None,
    tile: tuple[int, int] | None = None,
) -> (
    tuple[Float[Array, "B T H P"], Float[Array, "B T H"]]
    | tuple[Float[Array, "B T H P"], Float[Array, "B T H"], list[Float[Array, "B T H"]]]
):
    """Returns (o in q's dtype, lse); arguments as in `ops.attention`.

    With `exact` also [peak, total]: lse = (peak + log2 total) ln 2. From them `backward` recomputes
    the same weights. A rounded lse of large logits gives weights that don't add up to 1, an error
    that the sums over queries in dk and dv accumulate.
    tile: (queries, keys) of a tile, by default those of `tile_sizes`.
    """
    B, T, H, D = q.shape
    S, G, P = v.shape[1:]
    # Live tiles of each row of tiles: full ones first, which need no mask.
    tiles = _Tiles.of(q, k, mask, q_offset, tile, backward=False)
    logits = _Logits(logit_cap, tiles, H // G, mask)
    order, n_full, n_live = tiles.walk(mask)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    I, J, R = tiles.I, tiles.J, H // G

    def one(_, x):
        q, k, v, usable, bias, ids, order, n_full, n_live, seeds = x
        keep = _keep(dropout, seeds, G, I, J)

        def row(i):
            q_i = _heads_first(_slice(q, i, I), G).astype(dtype) * (scale * logits.units)

            # m' = max(m, max_j s_j), p_j = 2^(s_j - m'), l' = 2^(m - m') l + sum_j p_j,
            # acc' = 2^(m - m') acc + p V; at the end o = acc / l and lse = (m + log2 l) ln 2.
            def step(masked, n, carry):
                peak, total, acc = carry
                j = _at(order, i, n)
                k_j, v_j = (_slice(a, j, J).astype(dtype) for a in (k, v))
                if usable is not None:
                    k_j, v_j = only_keys(_slice(usable, j, J), k_j, v_j)
                s = jnp.einsum("gmd,jgd->gmj", q_i, k_j)
                s, _, visible = logits(s, bias, ids, i, j, masked)
                s = s if visible is None else jnp.where(visible, s, -jnp.inf)
                new = jnp.maximum(peak, jnp.max(s, axis=-1))
                p = exp2(s - new[..., None])
                shrink = exp2(peak - new)
                total = shrink * total + jnp.sum(p, axis=-1)
                p = keep(p, i, j)
                acc = shrink[..., None] * acc + jnp.einsum("gmj,jgp->gmp", p, v_j)
                return new, total, acc

            M = R * I
            carry = varying(
                (
                    # Not -inf, which a row without keys would subtract from itself.
                    jnp.full((G, M), FLOOR, dtype),
                    jnp.zeros((G, M), dtype),
                    jnp.zeros((G, M, P), dtype),
                ),
                x,
            )
            # Full tiles, then partial ones.
            carry = _loop(0, _at(n_full, i), functools.partial(step, False), carry)
            carry = _loop(_at(n_full, i), _at(n_live, i), functools.partial(step, True), carry)
            peak, total, acc = carry
            # `exp2` may lose a NaN, which the maximum keeps.
            total = jnp.where(jnp.isnan(peak), jnp.nan, total)
            o = acc / jnp.where(total == 0, 1.0, total)[..., None]
            o = o if dropout is None else o * dropout.scale
            lse = (peak + jnp.log2(total)) * math.log(2)
            rows = (lse, peak, total) if exact else (lse,)
            return _time_first(o, R).astype(q.dtype), [_time_first(x, R) for x in rows]

        o, rows = _map(row, tiles.m)
        return None, (o.reshape(-1, H, P)[:T], [x.reshape(-1, H)[:T] for x in rows])

    # Keys that a mask may hide though they are not finite: see `attention_operands`.
    usable = tiles.pad_k(finite(k) & finite(v)) if hides(mask, bias) else None
    xs = (
        *(tiles.pad_q(q), tiles.pad_k(k), tiles.pad_k(v), usable, tiles.pad_bias(bias)),
        tiles.ids(mask),
        order,
        n_full,
        n_live,
        None if dropout is None else dropout.seeds,
    )
    o, (lse, *both) = _over_batch(one, None, xs, B, H * I * J)[1]
    return (o, lse, both) if exact else (o, lse)


def backward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    bias: Float[Array, "#B #H #T #S"] | None,
    mask: masks.Mask,
    q_offset: Offset,
    o: Float[Array, "B T H P"],
    lse: Float[Array, "B T H"],
    do: Float[Array, "B T H P"],
    dlse: Float[Array, "B T H"],
    *,
    scale: float,
    logit_cap: float | None,
    exact: list[Float[Array, "B T H"]] | None = None,
    dropout: Dropout | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[
    Float[Array, "B T H D"],
    Float[Array, "B S G D"],
    Float[Array, "B S G P"],
    Float[Array, "#B #H #T #S"] | None,
]:
    """Returns (dq, dk, dv, dbias or None) in the dtypes of (q, k, v, bias).

    exact: as `forward` returns it, or None; tile as there.
    """
    B, T, H, D = q.shape
    S, G, P = v.shape[1:]
    # Rows of 0 where a mask may hide what is not finite: see `attention_operands`.
    usable = None
    if hides(mask, bias):
        usable, lse, dlse = usable_rows(q, o, lse, do, dlse)
    rows_of = lambda x, usable: x if usable is None else only(usable, x)
    tiles = _Tiles.of(q, k, mask, q_offset, tile, backward=True)
    logits = _Logits(logit_cap, tiles, H // G, mask)
    order, n_full, n_live = tiles.walk(mask)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    I, J, R = tiles.I, tiles.J, H // G

    # dS = P (dO V^T - delta) with delta_i = sum_p dO_ip O_ip - dlse_i.
    products = rows_of(o, usable).astype(dtype) * rows_of(do, usable).astype(dtype)
    delta = jnp.sum(products, axis=-1) - dlse
    # A row without visible keys: exp(logits - inf) = 0 for all of them.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse) * LOG2_E
    factor = None
    if exact is not None:
        # Weights are 2^(logit - peak) / total; what comes after is linear in do and delta.
        peak, total = exact
        factor = jnp.where(total > 0, 1 / total, 0.0)
        lse = jnp.where(jnp.isfinite(lse), peak, lse)
        delta = delta * factor

    def one(dbias, x):
        q, k, v, do, lse, delta, usable, factor, bias, ids, order, n_full, n_live, seeds = x
        keep = _keep(dropout, seeds, G, I, J, transposed=True)

        def column(carry, j):
            k_j, v_j = (jnp.swapaxes(_slice(a, j, J), 0, 1).astype(dtype) for a in (k, v))
            if usable is not None:
                k_j, v_j = (only(finite(x), x) for x in (k_j, v_j))
            k_t = jnp.swapaxes(k_j, 1, 2)

            # Scores are transposed, [G, J, M]: then no large matrix has to be.
            def step(masked, n, carry):
                dq, dk, dv, dbias = carry
                i = _at(order, j, n)
                of_tile = lambda a: None if a is None else _heads_first(_slice(a, i, I), G)
                q_i, do_i, lse_i, delta_i = (of_tile(a).astype(dtype) for a in (q, do, lse, delta))
                q_i, do_i = (rows_of(x, of_tile(usable)) for x in (q_i, do_i))
                do_i = do_i if factor is None else do_i * of_tile(factor)[..., None]
                # Scaled as forward does, for logits of the same bits: a row's weights then add
                # up to 1, whatever the rounding of large logits.
                q_i = q_i * (scale * logits.units)
                s = jnp.einsum("gjd,gmd->gjm", k_j, q_i)
                s, slope, visible = logits(s, bias, ids, i, j, masked, transposed=True)
                # The recomputed logit may differ from the saved sum's in its last bits, which
                # at extreme values are large numbers; a weight is at most 1.
                s = jnp.minimum(s - lse_i[:, None], 0.0)
                # Masked only now, as a row's log-sum-exp may be NaN.
                p = exp2(s if visible is None else jnp.where(visible, s, -jnp.inf))
                # dV = P^T dO and dS = P (dP - delta), with dP = dO V^T.
                do_i = do_i if dropout is None else do_i * dropout.scale
                dv += jnp.einsum("gjm,gmp->gjp", keep(p, i, j), do_i)
                dp = keep(jnp.einsum("gjp,gmp->gjm", v_j, do_i), i, j)
                ds = p * (dp - delta_i[:, None])
                if bias is not None:
                    dbias = _add_bias_tile(dbias, ds, i, j, tiles, R)
                # Then dK = dS^T Q and dQ = dS K, through the cap.
                if slope is not None:
                    ds *= slope
                dk += jnp.einsum("gjm,gmd->gjd", ds, q_i)
                dq_i = jnp.einsum("gdj,gjm->gdm", k_t, ds)
                dq = jax.lax.dynamic_update_index_in_dim(dq, dq[i] + dq_i, i, 0)
                return dq, dk, dv, dbias

            dq, dbias = carry
            zeros = varying((jnp.zeros((G, J, D), dtype), jnp.zeros((G, J, P), dtype)), x)
            # Full tiles, then partial ones.
            carry = dq, *zeros, dbias
            carry = _loop(0, _at(n_full, j), functools.partial(step, False), carry)
            carry = _loop(_at(n_full, j), _at(n_live, j), functools.partial(step, True), carry)
            dq, dk, dv, dbias = carry
            dk = (jnp.swapaxes(dk, 0, 1) / logits.units).astype(k.dtype)
            return (dq, dbias), (dk, jnp.swapaxes(dv, 0, 1).astype(v.dtype))

        dq = varying(jnp.zeros((tiles.m, G, D, R * I), dtype), x)
        (dq, dbias), (dk, dv) = _scan(column, (dq, dbias), tiles.n)
        dq = dq.reshape(tiles.m, G, D, R, I).transpose(0, 4, 1, 3, 2).reshape(-1, H, D)
        dq = (dq[:T] * scale).astype(q.dtype)
        return dbias, (dq, dk.reshape(-1, G, D)[:S], dv.reshape(-1, G, P)[:S])

    padded_bias, dbias = tiles.pad_bias(bias), None
    if bias is not None:
        dbias = varying(jnp.zeros(padded_bias.shape, dtype), (q, k, v, bias, do, dlse))
    xs = (
        tiles.pad_q(q), tiles.pad_k(k), tiles.pad_k(v), tiles.pad_q(do),
        tiles.pad_q(lse, jnp.inf), tiles.pad_q(delta),
        *(None if x is None else tiles.pad_q(x) for x in (usable, factor)),
        padded_bias, tiles.ids(mask), order, n_full, n_live,
        None if dropout is None else dropout.seeds,
    )  # fmt: skip
    dbias, (dq, dk, dv) = _over_batch(one, dbias, xs, B, H * I * J)
    if bias is not None:
        dbias = dbias[:, :, : bias.shape[2], : bias.shape[3]].astype(bias.dtype)
    return dq, dk, dv, dbias


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The T x S scores in m x n tiles of I queries and J keys."""

    T: int
    S: int
    I: int
    J: int
    q_offset: int | jax.Array
    backward: bool

    @classmethod
    def of(cls, q, k, mask, q_offset, tile, backward):
        T, S = q.shape[1], k.shape[1]
        I, J = tile or tile_sizes(T, S, q.shape[2], mask, q_offset, backward)
        return cls(T, S, I, J, q_offset, backward)

    @property
    def m(self):
        return -(-self.T // self.I)

    @property
    def n(self):
        return -(-self.S // self.J)

    def walk(self, mask):
        """Returns the live tiles of each row of tiles (of each column, backward), full ones first.

        As (order [1 or B, m, <= n], n_full [1 or B, m], n_live), NumPy's if nothing is traced.
        """
        kinds = masks.tile_kinds(mask, self.T, self.S, self.I, self.J, self.q_offset)
        xp = np if isinstance(kinds, np.ndarray) else jnp
        if self.backward:
            kinds = kinds.swapaxes(1, 2)
        n_live = (kinds != masks.EMPTY).sum(-1)
        order = xp.argsort(-kinds, axis=-1, stable=True).astype(np.int32)
        if xp is np:
            order = order[:, :, : n_live.max(initial=1)]
        return order, (kinds == masks.FULL).sum(-1), n_live

    def ids(self, mask):
        """Returns the segment ids of the padded queries and keys, or None."""
        segments = masks.segments_of(mask)
        if segments is None:
            return None
        q_ids, kv_ids = segments.both(self.T, self.S)
        return self.pad_q(jnp.asarray(q_ids)), self.pad_k(jnp.asarray(kv_ids))

    def pad_q(self, x, value=0, axis=1):
        return _pad(x, axis, self.m * self.I, value)

    def pad_k(self, x, value=0, axis=1):
        return _pad(x, axis, self.n * self.J, value)

    def pad_bias(self, bias):
        """Pads the axes of time that are not broadcast."""
        if bias is not None and bias.shape[2] > 1:
            bias = self.pad_q(bias, axis=2)
        if bias is not None and bias.shape[3] > 1:
            bias = self.pad_k(bias, axis=3)
        return bias


@dataclasses.dataclass(frozen=True)
class _Logits:
    """Turns a tile of scores into logits in units of log 2: cap, then bias; and evaluates the mask.

    Powers of two are cheaper than those of e, so scores come scaled by `units`.
    """

    logit_cap: float | None
    tiles: _Tiles
    R: int
    mask: masks.Mask

    @property
    def units(self):
        return LOG2_E if self.logit_cap is None else 1.0

    def __call__(self, s, bias, ids, i, j, masked, transposed=False):
        """Returns (logits, d logits / d scores or None without cap, visible) of tile i, j.

        s is [G, M, J], or [G, J, M] if transposed; visible is bool [1, M, J] or transposed, None
        if not masked.
        """
        slope = visible = None
        if self.logit_cap is not None:
            t = jnp.tanh(s / self.logit_cap)
            s, slope = (self.logit_cap * LOG2_E) * t, 1.0 - t * t
        G, I, J, R = s.shape[0], self.tiles.I, self.tiles.J, self.R
        if bias is not None:
            tile = self._bias_tile(bias, i, j).astype(s.dtype) * LOG2_E
            heads = (G, R) if tile.shape[0] > 1 else (1, 1)
            tile = tile.reshape(heads + tile.shape[1:])
            tile = tile.transpose(0, 3, 1, 2) if transposed else tile
            shape = (G, J, R, I) if transposed else (G, R, I, J)
            s = (s.reshape(shape) + tile).reshape(s.shape)
        if masked:
            visible = jnp.broadcast_to(self._visible(ids, i, j), (R, I, J)).reshape(R * I, J)
            visible = (visible.T if transposed else visible)[None]
        return s, slope, visible

    def _bias_tile(self, bias, i, j):
        for axis, index, size in ((1, i, self.tiles.I), (2, j, self.tiles.J)):
            if bias.shape[axis] > 1:
                bias = jax.lax.dynamic_slice_in_dim(bias, index * size, size, axis)
        return bias

    def _visible(self, ids, i, j):
        """Returns whether queries see keys, bool [1, I, J]."""
        tiles = self.tiles
        rows = (tiles.q_offset + i * tiles.I + jnp.arange(tiles.I))[:, None]
        keys = (j * tiles.J + jnp.arange(tiles.J))[None, :]
        segments = ()
        if ids is not None:
            segments = _slice(ids[0], i, tiles.I)[:, None], _slice(ids[1], j, tiles.J)[None, :]
        visible = self.mask.visible(rows, keys, *segments)
        if tiles.S % tiles.J:
            visible = visible & (keys < tiles.S)
        return jnp.broadcast_to(visible, (tiles.I, tiles.J))[None]


def _keep(dropout, seeds, G, I, J, transposed=False):
    """Returns (x, i, j) -> x [G, M, J] (or [G, J, M]) of tile i, j with 0 for dropped weights."""
    if dropout is None:
        return lambda x, i, j: x
    heads = seeds.reshape(G, -1, 1)

    def keep(x, i, j):
        # With 64-bit types, loops count in int64.
        index = lambda n, size: jnp.asarray(n * size, jnp.int32) + jnp.arange(size, dtype=jnp.int32)
        rows = row_hash(heads, index(i, I)[None, None])
        rows, keys = rows.reshape(G, -1), index(j, J)
        if transposed:
            rows, keys = rows[:, None], keys[None, :, None]
        else:
            rows, keys = rows[:, :, None], keys[None, None]
        return jnp.where(kept(rows, keys, dropout.rate), x, 0.0)

    return keep


def _add_bias_tile(dbias, ds, i, j, tiles, R):
    """Returns dbias [H or 1, T or 1, S or 1] plus ds [G, J, M], summed over broadcast axes."""
    G, J, I = ds.shape[0], tiles.J, tiles.I
    tile = ds.reshape(G, J, R, I).transpose(0, 2, 3, 1).reshape(G * R, I, J)
    for axis in range(3):
        if dbias.shape[axis] == 1:
            tile = jnp.sum(tile, axis=axis, keepdims=True)
    # With 64-bit types, loops count in int64 and tables hold int32.
    start = (0, i * I if dbias.shape[1] > 1 else 0, j * J if dbias.shape[2] > 1 else 0)
    start = [jnp.asarray(x, jnp.int32) for x in start]
    old = jax.lax.dynamic_slice(dbias, start, tile.shape)
    return jax.lax.dynamic_update_slice(dbias, old + tile, start)


def _over_batch(one, dbias, xs, B, size):
    """Returns one(dbias, x) of each sequence of a batch, vectorized if a tile of `size` is small.

    A leading axis of length 1 in xs or dbias is shared by the batch: such dbias is summed.
    """
    leaves, tree = jax.tree.flatten((dbias, xs))
    if B == 1:
        d, ys = one(*tree.unflatten([a[0] for a in leaves]))
        return jax.tree.map(lambda a: a[None], (d, ys))
    each = [a.shape[0] == B for a in leaves]
    shared_dbias = dbias is not None and dbias.shape[0] == 1

    def call(dbias, own):
        own = iter(own)
        full = [next(own) if e else a[0] for e, a in zip(each, leaves, strict=True)]
        own_dbias, x = tree.unflatten(full)
        return one(own_dbias if dbias is None else dbias, x)

    own = [a for e, a in zip(each, leaves, strict=True) if e]
    if B * size <= LARGE:
        d, ys = jax.vmap(lambda own: call(None, own))(own)
        if shared_dbias:
            d = jnp.sum(d, axis=0, keepdims=True)
    elif shared_dbias:
        d, ys = jax.lax.scan(call, dbias[0], own)
        d = d[None]
    else:
        _, (d, ys) = jax.lax.scan(lambda _, own: (None, call(None, own)), None, own)
    return d, ys


def exp2(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Returns 2^x for x <= 0, exactly 0 at -inf and below 2^-126, to two units in the last place.

    XLA's own takes four times as long on CPUs, a sixth of the forward pass.
    """
    if x.dtype != jnp.float32:
        return jnp.exp2(x)
    return choose_when_lowered(
        lambda platform: None if platform == "cpu" else jnp.exp2, _exp2_polynomial, x
    )


# 2^f for |f| <= 1/2, with an error of 1e-7; the first coefficient is 1, so that 2^0 is.
_EXP2 = np.polynomial.Chebyshev.interpolate(np.exp2, 5, domain=[-0.5, 0.5])
# As Python numbers, since NumPy's would promote float32 to float64 where JAX has that enabled.
_EXP2 = [1.0, *_EXP2.convert(kind=np.polynomial.Polynomial).coef[1:].tolist()]
# Added to a float32, rounds it to an integer, which then is in the lowest bits.
_ROUND = np.float32(1.5 * 2**23)


def _exp2_polynomial(x):
    shifted = x + _ROUND
    f = x - (shifted - _ROUND)
    power = jnp.full_like(x, _EXP2[5])
    for coefficient in _EXP2[4::-1]:
        power = power * f + coefficient
    # Multiplies by 2^n in the exponent's bits; at x < -126 they overflow, and so are not used.
    bits = jax.lax.bitcast_convert_type(shifted, jnp.int32) << 23
    bits += jax.lax.bitcast_convert_type(power, jnp.int32)
    return jnp.where(x < -126.0, 0.0, jax.lax.bitcast_convert_type(bits, jnp.float32))


def _at(table, *index):
    """Returns an entry of a table, a Python number if nothing is traced."""
    if isinstance(table, np.ndarray):
        if all(isinstance(i, int) for i in index):
            return int(table[index])
        table = jnp.asarray(table)
    return table[index]


def _loop(start, stop, step, carry):
    """Runs carry = step(n, carry) for start <= n < stop; up to two static steps without a loop."""
    if isinstance(start, int) and isinstance(stop, int) and stop - start <= 2:
        for n in range(start, stop):
            carry = step(n, carry)
        return carry
    return jax.lax.fori_loop(start, stop, step, carry)


def _scan(step, carry, length):
    if length == 1:
        carry, y = step(carry, 0)
        return carry, jax.tree.map(lambda a: a[None], y)
    return jax.lax.scan(step, carry, jnp.arange(length))


def _map(f, length):
    return _scan(lambda _, i: (None, f(i)), None, length)[1]


def _slice(x, i, size):
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=0)


def _pad(x, axis, length, value):
    extra = length - x.shape[axis]
    if extra == 0:
        return x
    return jnp.pad(
        x, [(0, extra if a == axis else 0) for a in range(x.ndim)], constant_values=value
    )


def _heads_first(x, G):
    """Returns [I, H, ...] as [G, R * I, ...]."""
    I, H, *rest = x.shape
    x = jnp.moveaxis(x.reshape(I, G, H // G, *rest), 0, 2)
    return x.reshape(G, H // G * I, *rest)


def _time_first(x, R):
    """Returns [G, R * I, ...] as [I, H, ...]."""
    G, M, *rest = x.shape
    x = jnp.moveaxis(x.reshape(G, R, M // R, *rest), 2, 0)
    return x.reshape(M // R, G * R, *rest)


def varying(tree: PyTree, like: Any) -> PyTree:
    """Returns a tree varying over the manual axes of `like`, as carries in shard_map have to."""
    varying = lambda a: jax.typeof(a).manual_axis_type.varying
    axes = frozenset().union(*map(varying, jax.tree.leaves(like)))
    return jax.tree.map(lambda a: jax.lax.pcast(a, tuple(axes - varying(a)), to="varying"), tree)
