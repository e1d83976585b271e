"""Attention of one or a few new queries to a long cache, split over the keys (flash-decoding)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from tilescan.ops import masks
from tilescan.ops.arrays import AnyArray, check_number
from tilescan.ops.attention_operands import Bias
from tilescan.ops.attention_xla import varying
from tilescan.ops.explicit_axes import partitioned_by_dimensions
from tilescan.ops.sizes import check_sizes


def merge_partials(
    o1: Float[AnyArray, "*S P"],
    lse1: Float[AnyArray, "*S"],
    o2: Float[AnyArray, "*S P"],
    lse2: Float[AnyArray, "*S"],
) -> tuple[Float[Array, "*S P"], Float[Array, "*S"]]:
    """Returns the attention over two disjoint sets of keys, from the attention over each.

    Associative and commutative; (0, -inf), a set without visible keys, is its identity. This is
    the combination that ring attention, split-key decoding and attention sinks share.

    Args:
      o1, o2: outputs [..., P], normalised over their own keys.
      lse1, lse2: natural log of each row's sum of exponentials [...], -inf for none.

    Returns:
      o [..., P] in o1's dtype, and lse [...].

    Raises:
      ValueError: shapes that do not fit each other.
    """
    shapes = [jnp.shape(x) for x in (o1, lse1, o2, lse2)]
    if shapes[:2] != shapes[2:] or shapes[0][:-1] != shapes[1] or not shapes[0]:
        raise ValueError(
            "o1 {}, lse1 {}, o2 {} and lse2 {} do not fit; merge_partials takes o [..., P] and lse "
            "[...] of one shape each".format(*shapes)
        )
    lse = jnp.logaddexp(lse1, lse2)
    # Two empty sets: -inf - -inf would be NaN, and a NaN there would poison the gradient too.
    finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
    w1, w2 = jnp.exp(lse1 - finite)[..., None], jnp.exp(lse2 - finite)[..., None]
    # Their sum is 1, but for the last bits of lse, which are large numbers where lse is.
    total = w1 + w2
    o = (w1 * o1.astype(lse.dtype) + w2 * o2.astype(lse.dtype)) / jnp.where(total == 0, 1.0, total)
    return o.astype(o1.dtype), lse


@partitioned_by_dimensions(
    "BTH",
    q="BTHD",
    k_cache="BSGD",
    v_cache="BSGP",
    lengths="B",
    mask="BT",
    bias=("BHTS", "HTS", "TS", "S"),
)
def decode_attention(
    q: Float[AnyArray, "B T H D"],
    k_cache: Float[AnyArray, "B S G D"],
    v_cache: Float[AnyArray, "B S G P"],
    *,
    lengths: Integer[AnyArray, " B"],
    mask: masks.Mask = masks.Causal(),  # noqa: B008 (frozen)
    bias: Bias | None = None,
    scale: float | np.floating | Float[AnyArray, ""] | None = None,
    logit_cap: float | None = None,
    return_lse: bool = False,
    split: int = 1024,
) -> Float[Array, "B T H P"] | tuple[Float[Array, "B T H P"], Float[Array, "B T H"]]:
    """Computes attention of the last T tokens of each sequence to a cache that is partly filled.

    Returns what `ops.attention` does for each row with its own q_offset, lengths[b] - T. Keys are
    read `split` at a time; splits that no query of the batch sees are not computed, so a step costs
    the longest live length (or the window), not the size of the cache. The contents of slots from
    lengths[b] on, and of keys and values that the mask hides, change nothing, NaN and inf included;
    a key or value that is not finite makes NaN of the rows that see it.

    Args:
      q: the T newest queries [B, T, H, D]; query t of row b is at position lengths[b] - T + t.
      k_cache, v_cache: [B, S, G, D] and [B, S, G, P]; slots from lengths[b] on are not seen.
      lengths: int [B], filled slots of each row, the T newest included.
      mask: as in `ops.attention`; its Segments hold ids [B, T] and [B, S].
      bias, scale, logit_cap, return_lse: as in `ops.attention`.
      split: keys per partial result.

    Returns:
      o [B, T, H, P] in q's dtype; with return_lse also lse [B, T, H].

    Raises:
      ValueError: shapes or mask that do not fit, a scale or logit_cap that is not finite.
      TypeError: lists instead of arrays, a scale or logit_cap that is not a number.
    """
    # Arguments.
    check_number("scale", scale)
    check_number("logit_cap", logit_cap)
    (B, T, H, D), (S, G) = q.shape, v_cache.shape[1:3]
    if k_cache.shape != (B, S, G, D) or v_cache.shape[0] != B:
        raise ValueError(
            f"q {q.shape}, k_cache {k_cache.shape} and v_cache {v_cache.shape} do not fit; "
            "decode_attention takes q [B, T, H, D], k_cache [B, S, G, D], v_cache [B, S, G, P]"
        )
    caches = dict(k_cache=(k_cache, "B, S, G, D"), v_cache=(v_cache, "B, S, G, P"))
    check_sizes(q=(q, "B, T, H, D"), **caches)
    if H % G:
        raise ValueError(f"q has {H} heads, which k_cache's {G} heads do not divide")
    lengths = jnp.asarray(lengths)
    if lengths.shape != (B,):
        raise ValueError(f"lengths has shape {lengths.shape}; it must be [B] = [{B}]")
    if split < 1:
        raise ValueError(f"split={split} must be at least 1")
    # Rows differ in their offset; at 0 a layout is checked against the whole cache.
    masks.validate(mask, B, T, S, 0)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)

    # A traced scale is applied to the queries.
    scale = D**-0.5 if scale is None else scale
    if isinstance(scale, jax.Array):
        q, scale = q * scale.astype(q.dtype), 1.0
    options = _Options(scale, logit_cap, min(split, S))
    o, lse = _decode(q, k_cache, v_cache, lengths, mask, bias, options)
    return (o, lse) if return_lse else o


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    logit_cap: float | None
    split: int


@functools.partial(jax.custom_jvp, nondiff_argnums=(6,))
def _decode(q, k_cache, v_cache, lengths, mask, bias, options):
    """Returns (o [B, T, H, P] in q's dtype, lse [B, T, H]).

    A weight of 0 times NaN is NaN. To find one in the result costs nothing; to exclude it needs a
    copy of the cache, which is made only if the result shows it, or for a derivative.
    """
    attend = functools.partial(_attend, q, k_cache, v_cache, lengths, mask, bias, options)
    o, lse = attend()
    return jax.lax.cond(jnp.all(jnp.isfinite(o)), lambda: (o, lse), lambda: attend(careful=True))


@_decode.defjvp
def _decode_jvp(options, primals, tangents):
    return jax.jvp(lambda *x: _attend(*x, options, careful=True), primals, tangents)


def _attend(q, k_cache, v_cache, lengths, mask, bias, options, careful=False):
    """Computes `_decode`; hidden slots may hold values that are not finite only if careful."""
    # Scaled queries [B, G, R, T, D] and their positions.
    (B, T, H, D), (S, G, P) = q.shape, v_cache.shape[1:]
    out_dtype, dtype = q.dtype, jnp.promote_types(q.dtype, jnp.float32)
    R, J, logit_cap = H // G, options.split, options.logit_cap
    q = q.reshape(B, T, G, R, D).transpose(0, 2, 3, 1, 4).astype(dtype) * options.scale
    positions = lengths[:, None] - T + jnp.arange(T)[None]
    segments = masks.segments_of(mask)
    ids = None if segments is None else tuple(map(jnp.asarray, segments.both(T, S)))
    if careful:
        q, q_finite = _only_finite(q)

    def partial(start, first):
        """Returns attention to the keys first <= j < start + J, from the slice at start."""
        # Logits: scale, cap and bias.
        take = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, J, axis)
        k, v = (take(x, 1).astype(dtype) for x in (k_cache, v_cache))
        if careful:
            (k, k_finite), (v, v_finite) = _only_finite(k), _only_finite(v)
        s = jnp.einsum("bgrtd,bjgd->bgrtj", q, k)
        if logit_cap is not None:
            s = logit_cap * jnp.tanh(s / logit_cap)
        if bias is not None:
            tile = take(bias, 3) if bias.shape[3] > 1 else bias
            heads = (G, R) if tile.shape[1] > 1 else (1, 1)
            s += tile.reshape(tile.shape[0], *heads, *tile.shape[2:]).astype(dtype)
        # NaN where an operand is not finite; then the mask.
        if careful:
            finite = (k_finite & v_finite).swapaxes(1, 2)[:, :, None, None]
            s = jnp.where(q_finite[..., None] & finite, s, jnp.nan)
        keys = start + jnp.arange(J)[None, None]
        pair = () if ids is None else (ids[0][:, :, None], take(ids[1], 1)[:, None])
        seen = mask.visible(positions[:, :, None], keys, *pair)
        seen = (seen & (keys < lengths[:, None, None]) & (keys >= first))[:, None, None]
        s = jnp.where(seen, s, -jnp.inf)
        # Softmax. The peak is at least the logit below which a key is hidden; the result doesn't
        # depend on it.
        peak = jnp.maximum(jnp.max(s, axis=-1, keepdims=True), -1e30)
        peak = jax.lax.stop_gradient(peak)
        p = jnp.exp(s - peak)
        p = jnp.where(seen, p, 0.0) if careful else p
        total = jnp.sum(p, axis=-1, keepdims=True)
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        o = jnp.einsum("bgrtj,bjgp->bgrtp", p, v) / total
        return o, jnp.where(empty, -jnp.inf, peak + jnp.log(total))[..., 0]

    def live(first, stop):
        """Returns whether any query of the batch sees a key in first <= j < stop."""
        stop = jnp.minimum(stop, lengths)
        bounds = ()
        if ids is not None:
            slots = jnp.arange(S)[None]
            inside = (slots >= first) & (slots < stop[:, None])
            extreme = jnp.iinfo(ids[1].dtype)
            bounds = (
                (jnp.min(ids[0], 1), jnp.max(ids[0], 1)),
                (
                    jnp.min(jnp.where(inside, ids[1], extreme.max), 1),
                    jnp.max(jnp.where(inside, ids[1], extreme.min), 1),
                ),
            )
        seen, _ = mask.tile_summary(positions[:, 0], positions[:, -1], first, stop - 1, *bounds)
        return jnp.any(seen & (first < stop))

    def step(carry, first):
        start = jnp.minimum(first, S - J)
        merged = lambda: merge_partials(*carry, *partial(start, first))
        return jax.lax.cond(live(first, first + J), merged, lambda: carry), None

    # All keys at once, or split by split.
    if J == S:
        o, lse = partial(0, 0)
    else:
        empty = jnp.zeros((B, G, R, T, P), dtype), jnp.full((B, G, R, T), -jnp.inf, dtype)
        empty = varying(empty, (q, k_cache, v_cache, lengths, bias, mask))
        (o, lse), _ = jax.lax.scan(step, empty, jnp.arange(0, S, J))
    o = o.transpose(0, 3, 1, 2, 4).reshape(B, T, H, P).astype(out_dtype)
    return o, lse.transpose(0, 3, 1, 2).reshape(B, T, H)


def _only_finite(x):
    """Returns x [..., D] with 0 for rows that are not finite, and which rows are finite."""
    finite = jnp.all(jnp.isfinite(x), axis=-1)
    return jnp.where(finite[..., None], x, 0.0), finite
