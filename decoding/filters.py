"""The distribution that tokens are sampled from: temperature, the k likeliest tokens, the nucleus.

Dimensions: B batch, V vocabulary.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

# Below float32's least normal number, which many devices round to 0, a temperature is its limit.
_TINY = float(np.finfo(np.float32).tiny)
# A compiler may multiply by a temperature's inverse, which is a normal number up to here.
_LARGEST = 0.5 / _TINY


class Nucleus(NamedTuple):
    """top_p as float32 compares it: p, and 1 - p (taken before rounding), of shape () or [B]."""

    p: Float[Array | np.ndarray, "..."]
    rest: Float[Array | np.ndarray, "..."]


def filter_logits(
    logits: Float[Array, "... V"] | Sequence[float],
    temperature: float | Num[Array, "..."] = 1.0,
    top_k: int | None = None,
    top_p: float | Num[Array, "..."] | None = None,
) -> Float[Array, "... V"]:
    """Returns the log-probabilities that tokens are sampled from; -inf for what is left out.

    Args:
      logits: scores, of any real dtype; computed in float32. -inf leaves a token out.
      temperature: divides the logits; one number, or one for each row (the shape of logits but
        its last axis). 0, and what float32 can't tell from it (below 1.2e-38), is the limit: the
        most probable token alone.
      top_k: keeps the k most probable tokens.
      top_p: keeps the fewest tokens, most probable first, whose probabilities (after temperature
        and top_k) reach p (Holtzman et al. 2020, arXiv 1904.09751); one number or one for each
        row; 1 keeps all.

    Of equally probable tokens the lower id goes first.

    Returns:
      float32, of logits' shape. A row is NaN throughout if its logits hold NaN or +inf or are -inf
      throughout, or if its traced temperature or top_p is out of range.

    Raises:
      TypeError: arguments that are not numbers, a top_k that is not an integer.
      ValueError: a temperature that is negative, NaN or inf, top_k outside 1..V, top_p outside
        (0, 1], neither one number nor one for each row.
    """
    logits = jnp.asarray(logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V >= 1, got shape {logits.shape}")
    rows = logits.shape[:-1]
    return filtered(
        logits,
        check_temperature(temperature, rows),
        check_top_k(top_k, logits.shape[-1]),
        check_top_p(top_p, rows),
    )


def filtered(
    logits: Float[Array, "... V"],
    temperature: Float[Array | np.ndarray, "..."],
    top_k: int | None,
    nucleus: Nucleus | None,
) -> Float[Array, "... V"]:
    """Returns `filter_logits` of arguments that are checked already."""
    logits = logits.astype(jnp.float32)
    *rows, V = logits.shape
    column = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), rows)[..., None]
    ids = jnp.broadcast_to(jnp.arange(V), logits.shape)
    t = column(temperature)
    valid = is_distribution(logits)[..., None] & (t >= 0) & (t < jnp.inf)

    # Differences to the highest score neither overflow nor lose it, however small t is.
    scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.clip(t, _TINY, _LARGEST)
    likeliest = jnp.argmax(logits, axis=-1, keepdims=True) == ids
    scores = jnp.where(t < _TINY, jnp.where(likeliest, 0.0, -jnp.inf), scores)

    if top_k is not None or nucleus is not None:
        order = jnp.argsort(-logits, axis=-1, stable=True)
        ranked = jnp.take_along_axis(scores, order, axis=-1)
        if top_k is not None:
            ranked = jnp.where(ids < top_k, ranked, -jnp.inf)
        if nucleus is not None:
            p, rest = column(nucleus.p), column(nucleus.rest)
            valid &= (p > 0) & (rest >= 0)
            inside = _in_nucleus(jax.nn.softmax(ranked, axis=-1), p, rest)
            ranked = jnp.where(inside, ranked, -jnp.inf)
        scores = jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(valid, jax.nn.log_softmax(scores, axis=-1), jnp.nan)


def is_distribution(logits: Float[Array, "... V"]) -> Bool[Array, "..."]:
    """Returns whether a row makes a distribution: no NaN, no +inf, not all -inf."""
    return jnp.all(logits < jnp.inf, axis=-1) & jnp.any(logits > -jnp.inf, axis=-1)


def _in_nucleus(probabilities, p, rest):
    """Whether the tokens before a token, most probable first, do not reach p yet.

    Float32 sums of V terms are off by some 1e-6 of themselves, which near 1 is more than all that
    the last thousands of tokens weigh. So a large p asks what stands from the token on: these sums
    start from the smallest terms and are small where the decision falls.
    """
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    onward = jax.lax.cumsum(probabilities, axis=probabilities.ndim - 1, reverse=True)
    inside = jnp.where(p <= 0.5, before < p, onward > rest) | (rest <= 0)
    return inside.at[..., 0].set(True)


def is_traced(value: Any) -> bool:
    """Returns whether a value is known only when the program runs."""
    return isinstance(value, jax.core.Tracer)


def check_temperature(temperature: Any, rows: tuple[int, ...]) -> Float[Array | np.ndarray, "..."]:
    """Returns the temperature in float32, of shape () or `rows`; see `filter_logits`."""
    value = _numbers("temperature", temperature, rows)
    if is_traced(value):
        return value.astype(jnp.float32)
    if not np.all((value >= 0) & (value < np.inf)):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more, and finite")
    return np.where(value < _TINY, 0.0, np.minimum(value, _LARGEST)).astype(np.float32)


def check_top_p(top_p: Any, rows: tuple[int, ...]) -> Nucleus | None:
    """Returns top_p ready for float32; None where all tokens stay; see `filter_logits`."""
    if top_p is None:
        return None
    value = _numbers("top_p", top_p, rows)
    if is_traced(value):
        p = value.astype(jnp.float32)
        return Nucleus(p, 1 - p)
    if not np.all((value > 0) & (value <= 1)):
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
    if np.all(value == 1):
        return None
    return Nucleus(np.maximum(value, _TINY).astype(np.float32), (1 - value).astype(np.float32))


def check_top_k(top_k: Any, vocab_size: int | None = None) -> int | None:
    """Returns top_k as an int between 1 and V (unbounded if V is not known yet), or None."""
    if top_k is None:
        return None
    k = check_integer("top_k", top_k)
    if vocab_size is None and k < 1:
        raise ValueError(f"top_k={k} must be at least 1")
    if vocab_size is not None and not 1 <= k <= vocab_size:
        raise ValueError(f"top_k={k} must be between 1 and vocab_size={vocab_size}")
    return k


def check_integer(name: str, value: Any) -> int:
    """Returns an int, a numpy integer or a scalar array of integers as an int.

    Raises:
      TypeError: for anything else, booleans and traced values among it.
    """
    if is_traced(value):
        raise TypeError(f"{name} is traced; it must be an integer that is known beforehand")
    boolean = isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_
    if not boolean:
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}")


def _numbers(name: str, value: Any, rows: tuple[int, ...]):
    """A traced value as it is, another one as float64; of shape () or one number for each row."""
    traced = is_traced(value)
    try:
        array = value if traced else np.asarray(value)
    except ValueError:  # a nested list whose rows differ
        array = np.asarray(None)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (np.integer, np.floating)):
        raise TypeError(f"{name}={value!r} must be a number, or one for each row")
    if array.shape not in ((), rows):
        raise ValueError(
            f"{name} of shape {array.shape} must be one number, or one for each row: shape {rows}"
        )
    return array if traced else array.astype(np.float64)
