"""Softmax attention: one function for every mask, head layout, length and platform.

Forward and backward are tiled (FlashAttention, arXiv 2205.14135; FlashAttention-2, 2307.08691):
memory is linear in the lengths, and tiles of the score matrix that the mask empties cost nothing.

Dimensions: B batch, T query time, S key time, H heads, G key-value heads (H is a multiple of G),
D head dim, P value dim.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Integer

from tilescan.ops import attention_xla, masks, reference
from tilescan.ops.arrays import AnyArray, check_number
from tilescan.ops.attention_operands import Bias, Offset
from tilescan.ops.decode_attention import decode_attention, merge_partials
from tilescan.ops.explicit_axes import partitioned_by_dimensions
from tilescan.ops.lowering import choose_when_lowered, note, other_platform
from tilescan.ops.mask_placed import is_placed
from tilescan.ops.reverse_mode import written_vjp
from tilescan.ops.sizes import check_sizes
from tilescan.pallas_kernels import dropout

__all__ = ["attention", "decode_attention", "merge_partials"]

IMPLEMENTATIONS = ("xla", "pallas", "reference", None)
_PLACED = (
    "a mask whose keys are not counted from 0 (Prefix, Lambda, BlockSparse, or a window in "
    'stripes, in a shard of a sequence) has no kernel; implementation="xla" or None takes it'
)
_KERNELS = {"tpu": "tilescan.ops.attention_tpu", "cuda": "tilescan.ops.attention_gpu"}
# A number that may be traced.
Scalar = float | np.floating | Float[AnyArray, ""]


def _with_seeds[F: Callable](op: F) -> F:
    """Returns `op`, given a dropout seed of each sequence and head before arrays are sharded."""

    @functools.wraps(op)
    def call(q, *args, dropout_rate=0.0, dropout_seed=None, **kwargs):
        seeds = dropout_seeds(dropout_rate, dropout_seed, q)
        if seeds is not None:
            kwargs |= dict(dropout_rate=dropout_rate, dropout_seed=seeds)
        return op(q, *args, **kwargs)

    return call


@_with_seeds
@partitioned_by_dimensions(
    "BTH", q="BTHD", k="BSGD", v="BSGP", mask="BT", bias=("BHTS", "HTS", "TS", "S"), q_offset="",
    dropout_seed="BH",
)  # fmt: skip
def attention(
    q: Float[AnyArray, "B T H D"],
    k: Float[AnyArray, "B S G D"],
    v: Float[AnyArray, "B S G P"],
    *,
    mask: masks.Mask = masks.Full(),  # noqa: B008 (frozen)
    bias: Bias | None = None,
    scale: Scalar | None = None,
    logit_cap: float | None = None,
    q_offset: int | np.integer | Integer[AnyArray, ""] | None = None,
    return_lse: bool = False,
    dropout_rate: float = 0.0,
    dropout_seed: Int32[AnyArray, "B H"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H P"] | tuple[Float[Array, "B T H P"], Float[Array, "B T H"]]:
    """Computes softmax(mask(cap(scale q k^T) + bias)) v in tiles.

    Args:
      q, k, v: queries [B, T, H, D], keys [B, S, G, D], values [B, S, G, P], all of one floating
        dtype. Query head h reads key-value head h // (H // G): G = H is multi-head, G = 1
        multi-query attention.
      mask: a mask of `ops.masks`; masks compose with & and |. What it hides changes nothing,
        whatever it holds: NaN or inf in a key, value or bias never reaches the row of a query
        that doesn't see it (nor that query's gradient), nor does NaN or inf in a query or its
        cotangents reach the gradient of a key that the query doesn't see. A row that does see a
        key or value which is not finite is NaN.
      bias: added to the logits after scale and cap; broadcastable to [B, H, T, S]. Its gradient
        is summed over the dimensions that were broadcast. A logit below -1e30 hides its key as
        the mask does, but for what is not finite in it. So a bias of -inf or of float32's or
        bfloat16's finfo.min hides, also whole rows; one of -1e9 or of float16's finfo.min is a
        number: a row of nothing else is the average of its values.
      scale: factor of the logits, D**-0.5 when None.
      logit_cap: when given, logits become logit_cap * tanh(logits / logit_cap).
      q_offset: position of the first query among the keys; S - T when None, so that the last
        query is at the last key's position. May be a traced integer.
      return_lse: also return the log of each row's sum of exponentials.
      dropout_rate: fraction of the weights that are replaced by 0, in [0, 1); the others are
        divided by 1 - dropout_rate. lse is that of all weights.
      dropout_seed: with a rate, an integer or an integer scalar, which may be traced. Which weights
        are dropped depends on it and on the indices of sequence, head, query and key in these
        arrays, and on nothing else: all backends and tilings, and devices that shard the batch and
        the heads, drop the same. Under `jax.vmap` and inside `jax.shard_map` give each its own
        seed; or integers [B, H], a seed for each sequence and head.
      implementation: "xla", "pallas" (TPUs and Hopper GPUs), or None, which takes
        the Pallas kernel where the platform the program is lowered for has one for these shapes,
        and "xla" elsewhere. Dropout has no kernel on GPUs. "reference" is the definition of
        `ops.reference` by the whole matrix of logits: O(T S) memory, for tests and comparisons.

    Returns:
      o [B, T, H, P] in q's dtype; with return_lse also lse [B, T, H], float32. Statistics are
      float32 whatever the inputs are (float64 for float64). A query that sees no key, be they
      hidden by the mask or by the bias, gets o = 0, lse = -inf and no gradient.

    Raises:
      ValueError: shapes, mask, bias, dropout or implementation that do not fit, a scale or
        logit_cap that is not finite, or, when the program is lowered, "pallas" on a platform
        without a kernel for it.
      TypeError: lists instead of arrays, dtypes that are not floating or differ, a q_offset that is
        not an integer, a scale or logit_cap that is not a number.
    """
    # Arguments, and their static parts.
    check_number("scale", scale)
    check_number("logit_cap", logit_cap)
    _validate(q, k, v, bias, logit_cap, implementation)
    B, T, H, D = q.shape
    S = k.shape[1]
    _validate_mask(mask, q, k, q_offset)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    scale = D**-0.5 if scale is None else scale
    if not isinstance(scale, (int, float)):  # a traced scale: the kernels take Python numbers
        q, scale = q * jnp.asarray(scale, q.dtype), 1.0

    # An offset that is known becomes static; one that is not stays an int32 scalar.
    static_offset = None
    if q_offset is None:
        static_offset = S - T
    elif isinstance(q_offset, (int, np.integer)):
        static_offset, q_offset = int(q_offset), None
    else:
        q_offset = jnp.asarray(q_offset)
        if not jnp.issubdtype(q_offset.dtype, jnp.integer):
            raise TypeError(f"q_offset must be an integer, got {q_offset.dtype}")
        if q_offset.ndim:
            raise ValueError(f"q_offset must be a scalar, got shape {q_offset.shape}")
        q_offset = q_offset.astype(jnp.int32)

    # The definition.
    if implementation == "reference":
        offset = static_offset if q_offset is None else q_offset
        o, lse = reference.attention(
            q, k, v, mask=mask, bias=bias, scale=scale, logit_cap=logit_cap, q_offset=offset,
            return_lse=True, dropout_rate=dropout_rate, dropout_seed=dropout_seed,
        )  # fmt: skip
        return (o.astype(q.dtype), lse) if return_lse else o.astype(q.dtype)

    # The tiled implementations.
    options = _Options(
        scale=float(scale),
        logit_cap=None if logit_cap is None else float(logit_cap),
        q_offset=static_offset,
        implementation=implementation,
    )
    drop = None if dropout_seed is None else dropout.Dropout(dropout_seed, float(dropout_rate))
    # Inside shard_map, replicated arrays must be varying before their gradients can differ.
    arrays = (q, k, v, bias)
    q, k, v, bias = attention_xla.varying(arrays, (arrays, mask, q_offset, drop))
    o, lse = _attention(q, k, v, bias, mask, (q_offset, drop), options)
    return (o, lse) if return_lse else o


def dropout_seeds(rate: Any, seed: Any, q: AnyArray) -> Int32[Array, "B H"] | None:
    """Returns int32 seeds of each sequence and head of q [B, T, H, D]; None for rate 0.

    rate and seed are `attention`'s arguments.

    Raises:
      ValueError: a rate outside [0, 1), or a seed that is missing, or is neither an integer nor
        integers [B, H].
    """
    if not isinstance(rate, (int, float, np.integer, np.floating)) or not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be a number in [0, 1), got {rate!r}")
    if rate == 0 or q.ndim != 4:  # such a q is refused later
        return None
    if seed is None:
        raise ValueError(f"dropout_rate={rate} needs dropout_seed, an integer")
    if isinstance(seed, (int, np.integer)):
        seed = np.uint32(int(seed) % 2**32)
    B, H = q.shape[0], q.shape[2]
    if (
        not isinstance(seed, (jax.Array, np.ndarray, np.generic))
        or not jnp.issubdtype(seed.dtype, jnp.integer)
        or seed.shape not in ((), (B, H))
    ):
        raise ValueError(
            f"dropout_seed must be an integer or integers [B, H] = [{B}, {H}], got {seed!r}; of a "
            'key, jax.random.bits(key, dtype="uint32") makes one'
        )
    seed = jax.lax.bitcast_convert_type(jnp.asarray(seed).astype(jnp.uint32), jnp.int32)
    return seed if seed.ndim else dropout.seeds(seed, B, H)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is known when the program is traced; q_offset is None when it is an array."""

    scale: float
    logit_cap: float | None
    q_offset: int | None
    implementation: str | None


@functools.partial(jax.jit, static_argnums=6)
@functools.partial(written_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, bias, mask, offset_and_dropout, options):
    return _dispatch("forward", options, q, k, v, bias, mask, offset_and_dropout)


def _attention_fwd(q, k, v, bias, mask, offset_and_dropout, options):
    # Narrower types are rounded more than a float32 log-sum-exp.
    exact = q.dtype in (jnp.float32, jnp.float64)
    arrays = q, k, v, bias, mask, offset_and_dropout
    o, lse, *exact = _dispatch("forward", options, *arrays, exact=exact)
    return (o, lse), (*arrays, o, lse, *exact)


def _attention_bwd(options, residuals, cotangents):
    residuals, exact = residuals[:8], residuals[8:]
    arrays = *residuals, *cotangents, *exact
    dq, dk, dv, dbias = _dispatch("backward", options, *arrays)
    # Masks and offsets hold integers: None is their (zero) cotangent.
    return dq, dk, dv, dbias, None, None


_attention.__wrapped__.defvjp(_attention_fwd, _attention_bwd)


def forward(
    q: Float[AnyArray, "B T H D"],
    k: Float[AnyArray, "B S G D"],
    v: Float[AnyArray, "B S G P"],
    bias: Float[AnyArray, "#B #H #T #S"] | None,
    mask: masks.Mask,
    q_offset: Offset,
    *,
    scale: float,
    logit_cap: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B T H"]]:
    """Returns (o, lse) of `attention`, for callers with a derivative of their own, such as a ring.

    Arguments are not checked.
    """
    options, q_offset = _passes(q_offset, scale, logit_cap, implementation)
    return _dispatch("forward", options, q, k, v, bias, mask, (q_offset, None))


def backward(
    q: Float[AnyArray, "B T H D"],
    k: Float[AnyArray, "B S G D"],
    v: Float[AnyArray, "B S G P"],
    bias: Float[AnyArray, "#B #H #T #S"] | None,
    mask: masks.Mask,
    q_offset: Offset,
    o: Float[AnyArray, "B T H P"],
    lse: Float[AnyArray, "B T H"],
    do: Float[AnyArray, "B T H P"],
    dlse: Float[AnyArray, "B T H"],
    *,
    scale: float,
    logit_cap: float | None = None,
    implementation: str | None = None,
) -> tuple[
    Float[Array, "B T H D"],
    Float[Array, "B S G D"],
    Float[Array, "B S G P"],
    Float[Array, "#B #H #T #S"] | None,
]:
    """Returns the contributions of these keys to (dq, dk, dv, dbias) of attention to more keys.

    o, lse and their cotangents are those of the attention to all keys, of which k and v may be
    some: weights are exp(logits - lse).
    """
    options, q_offset = _passes(q_offset, scale, logit_cap, implementation)
    arrays = q, k, v, bias, mask, (q_offset, None), o, lse, do, dlse
    return _dispatch("backward", options, *arrays)


def _passes(q_offset, scale, logit_cap, implementation):
    static = isinstance(q_offset, (int, np.integer))
    options = _Options(float(scale), logit_cap, int(q_offset) if static else None, implementation)
    return options, None if static else q_offset


def _dispatch(direction, options, *arrays, exact=False):
    """Calls `direction` of one implementation, or leaves the choice to the lowering.

    exact: whether forward also returns `attention_xla`'s (peak, total), which backward takes last.
    """

    def call(module, q, k, v, bias, mask, offset_and_dropout, *rest):
        # A module that can't take these arguments gives way to XLA, or says why.
        q_offset, drop = offset_and_dropout
        q_offset = options.q_offset if q_offset is None else q_offset
        if module is not attention_xla:
            reason = _PLACED if is_placed(mask) else None
            if drop is not None:
                reason = reason or module.no_dropout(drop)
            reason = reason or module.unsupported(q, k, v, bias, mask, q_offset)
            if reason is not None and options.implementation == "pallas":
                raise ValueError(f'implementation="pallas": {reason}')
            note("attention", reason)
            module = attention_xla if reason else module

        # `exact` is XLA's alone; of kernels it is made from their lse.
        constants = dict(scale=options.scale, logit_cap=options.logit_cap)
        constants |= {} if drop is None else dict(dropout=drop)
        run = functools.partial(getattr(module, direction), **constants)
        arrays = q, k, v, bias, mask, q_offset
        if direction == "backward":
            *rest, both = rest if len(rest) == 5 else (*rest, None)
            return run(*arrays, *rest, **(dict(exact=both) if module is attention_xla else {}))
        if not exact or module is attention_xla:
            return run(*arrays, **(dict(exact=exact) if module is attention_xla else {}))
        o, lse = run(*arrays)
        return o, lse, [lse * attention_xla.LOG2_E, jnp.ones_like(lse)]

    def pick(platform):
        if platform in _KERNELS:
            return functools.partial(call, importlib.import_module(_KERNELS[platform]))
        if options.implementation == "pallas":
            raise ValueError(
                'implementation="pallas" has kernels for TPUs and Hopper GPUs, and this program is '
                f'lowered for {platform}; implementation="xla" or None runs anywhere'
            )
        note("attention", other_platform("TPUs and Hopper GPUs", platform))
        return None

    xla = functools.partial(call, attention_xla)
    if options.implementation == "xla":
        return xla(*arrays)
    return choose_when_lowered(pick, xla, *arrays)


def _validate(q, k, v, bias, logit_cap, implementation):
    # Each argument by itself.
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown; it must be one of "
            + ", ".join(map(repr, IMPLEMENTATIONS))
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {x.dtype}")
        if x.ndim != 4:
            letters = "[B, T, H, D]" if name == "q" else "[B, S, G, D]"
            raise ValueError(f"{name} must be {letters}, got shape {x.shape}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast first"
        )
    if logit_cap is not None and not logit_cap > 0:
        raise ValueError(f"logit_cap must be positive or None, got {logit_cap}")
    # Shapes that must agree.
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    expected = "attention takes q [B, T, H, D], k [B, S, G, D] and v [B, S, G, P]"
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {k.shape} and v {v.shape} differ in batch, time or heads; {expected}")
    if B != k.shape[0]:
        raise ValueError(f"q has batch {B}, k and v have {k.shape[0]}; {expected}")
    if D != k.shape[3]:
        raise ValueError(f"q has head dim {D}, k has {k.shape[3]}; {expected}")
    check_sizes(q=(q, "B, T, H, D"), k=(k, "B, S, G, D"), v=(v, "B, S, G, P"))
    if H % G:
        hint = _swapped(q, k, expected)
        raise ValueError(f"q has {H} heads, which k's {G} heads do not divide; {hint}")
    if bias is not None:
        _validate_bias(bias, (B, H, T, S))


def _validate_mask(mask, q, k, q_offset):
    B, T, H, _ = q.shape
    try:
        masks.validate(mask, B, T, k.shape[1], q_offset)
    except ValueError as error:
        segments = masks.segments_of(mask)
        if segments is None or T == H or np.shape(segments.q_ids) != (B, H):
            raise
        raise ValueError(
            f"{error}. The ids are as many as q {q.shape} has heads: q, k and v look like "
            "[B, H, T, D], with heads and time swapped; use jnp.swapaxes(x, 1, 2)"
        ) from None


def _swapped(q, k, expected):
    # Heads of keys and values divide those of queries, and are fewer than keys.
    if q.shape[1] % k.shape[1] == 0 and k.shape[1] < k.shape[2]:
        return (
            f"{expected}. q {q.shape} and k {k.shape} look like [B, H, T, D]: heads and time "
            "are swapped; use jnp.swapaxes(x, 1, 2)"
        )
    return expected


def _validate_bias(bias, full):
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(f"bias must be floating, got {bias.dtype}; a boolean mask goes to mask=")
    shape = (1,) * (4 - bias.ndim) + bias.shape
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        B, H, T, S = full
        hint = ""
        swapped = (B, T, H, S)
        if len(shape) == 4 and all(n in (1, m) for n, m in zip(shape, swapped, strict=True)):
            hint = ": its head and time axes look swapped"
        raise ValueError(f"bias {bias.shape} does not broadcast to [B, H, T, S] = {full}{hint}")
