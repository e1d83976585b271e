"""What generation is given, checked before anything is compiled.

Dimensions: B batch, T prompt length, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, Num

from tilescan.decoding.filters import check_integer, is_traced
from tilescan.models import LanguageModelConfig
from tilescan.models.blocks import make_mixer
from tilescan.models.mixers import attends
from tilescan.ops import masks

# What callers may give: arrays of NumPy or JAX, or lists of numbers.
AnyInteger = int | np.integer | Integer[Array | np.ndarray, ""]
Prompt = Integer[Array | np.ndarray, "B T"] | Sequence[Sequence[AnyInteger]]
Lengths = Integer[Array | np.ndarray, " B"] | Sequence[AnyInteger]
Numbers = (
    float | int | np.number | Num[Array | np.ndarray, " #B"] | Num[Array | np.ndarray, ""]
    | Sequence[float]
)  # fmt: skip

_INT32 = np.iinfo(np.int32).max


def is_known(array: Any) -> bool:
    """Returns whether this process can look at all values of an array now."""
    return not is_traced(array) and getattr(array, "is_fully_addressable", True)


def check_prompt(
    config: LanguageModelConfig, prompt: Any, lengths: Any
) -> tuple[Array, Integer[np.ndarray, " B"] | None]:
    """Returns prompt [B, T] of its integer dtype, and lengths [B] or None if all are T.

    Values after a row's length are never looked at. A traced prompt is taken as it is: an id
    outside the vocabulary makes the model's scores NaN.

    Raises:
      TypeError: a prompt or lengths that are not integers.
      ValueError: another shape, an id outside the vocabulary, lengths outside 1..T, a model
        that reads no tokens.
    """
    if config.input_features is not None:
        raise ValueError(
            f"a model with input_features={config.input_features} reads vectors, not tokens; "
            "generation needs tokens"
        )
    try:
        values = np.asarray(prompt) if is_known(prompt) else prompt
    except ValueError as error:
        raise ValueError(
            "prompt must be [batch, time], and its rows differ in length: pad them, and "
            "give lengths"
        ) from error
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(
            "prompt must be [batch, time] with a row and a token at least, got shape "
            f"{values.shape}"
        )
    if not jnp.issubdtype(values.dtype, np.integer):
        raise TypeError(f"prompt must hold token ids, which are integers, got {values.dtype}")
    B, T = values.shape
    if lengths is not None:
        lengths = _check_lengths(lengths, B, T)
    if is_known(prompt):
        wrong = (values < 0) | (values >= config.vocab_size)
        if lengths is not None:
            wrong &= np.arange(T) < lengths[:, None]
        if wrong.any():
            b, t = np.argwhere(wrong)[0]
            raise ValueError(
                f"prompt[{b}, {t}]={values[b, t]} is outside the vocabulary: ids are "
                f"0..{config.vocab_size - 1}"
            )
    return jnp.asarray(prompt), None if lengths is None or np.all(lengths == T) else lengths


def _check_lengths(lengths: Any, B: int, T: int) -> Integer[np.ndarray, " B"]:
    if is_traced(lengths):
        raise TypeError("lengths are traced; they must be integers that are known beforehand")
    lengths = np.asarray(lengths)
    if lengths.size and not jnp.issubdtype(lengths.dtype, np.integer):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}: {lengths}")
    if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
        raise ValueError(
            f"lengths must be [{B}] numbers between 1 and the prompt's {T}, got {lengths}"
        )
    return lengths.astype(np.int64)


def flush_right(
    config: LanguageModelConfig,
    prompt: Integer[Array, "B T"],
    lengths: Integer[np.ndarray, " B"] | None,
) -> tuple[Integer[Array, "B T"], Integer[Array, "B T"] | None, Integer[Array, "B T"] | None]:
    """Returns tokens, segment ids and positions; None for the latter two if lengths is None.

    Padding is token 0 in segment 0, before the prompt, which is segment 1.

    Raises:
      ValueError: different lengths with a mask that counts from the start of the row.
    """
    if lengths is None:
        return prompt.astype(jnp.int32), None, None
    for block in filter(attends, config.pattern):
        mask = make_mixer(config, block).sees
        if not _shift_invariant(mask):
            raise ValueError(
                "prompts of different lengths need a mask that depends on distances alone; with "
                f"{mask!r} of {block!r} generate row by row"
            )
    T = prompt.shape[1]
    positions = np.arange(T)[None] - (T - lengths)[:, None]
    tokens = jnp.take_along_axis(prompt, jnp.asarray(positions % T), axis=1)
    tokens = jnp.where(positions >= 0, tokens, 0).astype(jnp.int32)
    ids = jnp.asarray(positions >= 0, jnp.int32)
    return tokens, ids, jnp.asarray(np.maximum(positions, 0), jnp.int32)


def _shift_invariant(mask: masks.Mask) -> bool:
    """Whether a mask that sees only the past depends on the distance i - j alone."""
    if isinstance(mask, masks.And | masks.Or):
        return all(_shift_invariant(part) for part in mask.masks)
    return isinstance(mask, masks.Causal | masks.SlidingWindow | masks.Full)


def check_max_new_tokens(
    max_new_tokens: Any, config: LanguageModelConfig | None = None, prompt_length: int = 1
) -> int:
    """Returns max_new_tokens as an int of at least 1 for which the model has positions."""
    new = check_integer("max_new_tokens", max_new_tokens)
    total = prompt_length + new
    if new < 1:
        raise ValueError(f"max_new_tokens={new} must be at least 1")
    if total > _INT32:
        raise ValueError(
            f"prompt and max_new_tokens are {total} tokens; positions count to {_INT32}"
        )
    if config is not None and config.position == "learned" and total > config.max_len:
        raise ValueError(
            f"prompt and max_new_tokens are {total} tokens, but the model has positions for "
            f"max_len={config.max_len}"
        )
    return new


def check_eos(eos: Any, vocab_size: int) -> tuple[int, ...]:
    """Returns the tokens that end a text: of one integer, several of them, or None.

    Raises:
      TypeError: for what is not an integer and holds none.
      ValueError: for tokens outside the vocabulary.
    """
    if eos is None:
        return ()
    if is_traced(eos):
        raise TypeError("eos is traced; it must be known beforehand")
    if isinstance(eos, tuple | list | set | frozenset | range) or np.ndim(eos) == 1:
        ends = tuple(sorted({_end(token, eos) for token in eos}))
    else:
        ends = (_end(eos, eos),)
    for token in ends:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"eos={eos!r} holds {token}, outside the vocabulary: ids are 0..{vocab_size - 1}; "
                "None is no end"
            )
    return ends


def _end(token: Any, eos: Any) -> int:
    try:
        return check_integer("eos", token)
    except TypeError as error:
        raise TypeError(f"eos={eos!r} must be a token id, several of them, or None") from error


def check_key(key: Any, temperature: Any, greedy: bool) -> Array:
    """Returns the random key; any one if nothing is random.

    Raises:
      TypeError: not a JAX random key. ValueError: several keys, or none where one is needed.
    """
    if key is None and not greedy:
        raise ValueError(f"temperature={temperature} needs key, e.g. jax.random.key(0)")
    if key is None:
        return jax.random.key(0)
    dtype, shape = getattr(key, "dtype", None), np.shape(key)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and (dtype != jnp.uint32 or len(shape) == 0):
        raise TypeError(f"key={key!r} must be a JAX random key, e.g. jax.random.key(0)")
    if len(shape) != (0 if typed else 1):
        raise ValueError(f"key of shape {shape} must be one key; each row gets its own from it")
    return key
