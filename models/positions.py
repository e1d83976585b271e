"""How a model knows where a token stands: rotary angles, ALiBi, positions of packed documents.

Letters: B batch, T time, S key time, H heads, D head dim.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

POSITION_KINDS = ("rope", "rope_interleaved", "alibi", "learned", "none")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretches rotary frequencies so that a model reads further than it was trained.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv 2306.15595). `llama3`
    divides only wavelengths longer than `original_max_len / low_freq_factor`, keeps those
    shorter than `original_max_len / high_freq_factor`, and blends in between (Llama 3.1).
    `per_frequency` divides each frequency by its own of `factors` [D/2], and by `factor` (GGUF's
    rope_freqs).

    Raises:
      ValueError: for an unknown kind, and for factors that are not positive and finite.
    """

    kind: str = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192
    factors: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.kind not in ("linear", "llama3", "per_frequency"):
            raise ValueError(
                f"rope_scaling.kind={self.kind!r} is unknown; it can be 'linear' or 'llama3', or "
                "'per_frequency' with factors"
            )
        if self.factors is not None:
            object.__setattr__(self, "factors", tuple(float(f) for f in self.factors))
        if (self.factors is not None) != (self.kind == "per_frequency"):
            raise ValueError(
                f"rope_scaling.factors={self.factors} with kind={self.kind!r}: 'per_frequency' "
                "needs them, and only it has them"
            )
        positive = dict(factor=self.factor, original_max_len=self.original_max_len)
        positive |= dict(low_freq_factor=self.low_freq_factor)
        for name, value in [*positive.items(), *(("factors", f) for f in self.factors or ())]:
            if not 0 < value < math.inf:
                raise ValueError(
                    f"rope_scaling.{name} must be positive, got {value}; e.g. 1.0, any finite one"
                )
        if not self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"rope_scaling.high_freq_factor={self.high_freq_factor} must be finite and above "
                f"low_freq_factor={self.low_freq_factor}"
            )

    @classmethod
    def of(cls, value: "RopeScaling | Mapping[str, Any] | None") -> "RopeScaling | None":
        """Accepts what a config file can hold: None, a mapping of fields, or the thing itself."""
        return cls(**dict(value)) if isinstance(value, Mapping) else value


def rope_frequencies(
    head_dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None
) -> Float[np.ndarray, "D/2"]:
    """Angle per position of each pair of channels: `theta ** (-2 i / D)`, float64.

    Source: Su et al. 2021 (arXiv 2104.09864), equation 15.

    Raises:
      ValueError: if D is odd, or if `scaling.factors` are not D / 2.
    """
    if head_dim % 2:
        raise ValueError(f"rotary positions turn pairs of channels: head_dim={head_dim} is odd")
    freq = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    if scaling.kind == "per_frequency":
        if len(scaling.factors) != len(freq):
            raise ValueError(
                f"rope_scaling.factors are {len(scaling.factors)}, but head_dim={head_dim} has "
                f"{len(freq)} frequencies"
            )
        return freq / np.asarray(scaling.factors) / scaling.factor
    wavelength = 2 * np.pi / freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((scaling.original_max_len / wavelength - low) / (high - low), 0.0, 1.0)
    return keep * freq + (1 - keep) * freq / scaling.factor


def apply_rope(
    x: Float[Array, "B T H D"],
    positions: Int[Array, "B T"],
    *,
    theta: float = 10000.0,
    interleaved: bool = False,
    scaling: RopeScaling | None = None,
) -> Float[Array, "B T H D"]:
    """Turns pairs of channels by an angle that grows with the position.

    Half-split pairs channel i with i + D/2 (Hugging Face's Llama); interleaved pairs 2i with
    2i + 1 (the paper, GGUF files). Angles are float32, the result has x's dtype.

    Raises:
      ValueError: if D is odd.
    """
    freq = jnp.asarray(rope_frequencies(x.shape[-1], theta, scaling), jnp.float32)
    angle = positions.astype(jnp.float32)[:, :, None, None] * freq[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x32 = x.astype(jnp.float32)
    if interleaved:
        a, b = x32[..., 0::2], x32[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(x32, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x.dtype)


def alibi_slopes(n_heads: int) -> Float[np.ndarray, " H"]:
    """One slope per head (Press et al. 2021, arXiv 2108.12409).

    A geometric sequence that starts at 2 ** (-8/H) for a power of two; otherwise the slopes of
    the power of two below it, then every other slope of the next one, as in the authors' code.
    """

    def power_of_two(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    below = 2 ** math.floor(math.log2(n_heads))
    slopes = power_of_two(below) + power_of_two(2 * below)[0::2][: n_heads - below]
    return np.asarray(slopes, np.float32)


def alibi_bias(
    n_heads: int, T: int, S: int, q_offset: Int[Array, ""] | int, *, causal: bool
) -> Float[Array, "1 H T_or_1 S"]:
    """The bias -slope * |i - j| of ALiBi, in the cheapest form that gives the same softmax.

    If a query sees only its past, |i - j| = i - j, and softmax ignores the part -slope * i that
    all keys of a query share: slope * j, [1, H, 1, S], says the same in O(S) memory. If it
    also sees its future the whole [1, H, T, S] must be built.
    """
    slopes = jnp.asarray(alibi_slopes(n_heads))[None, :, None, None]
    k_index = jnp.arange(S, dtype=jnp.float32)[None, None, None, :]
    if causal:
        return slopes * k_index
    q_index = (q_offset + jnp.arange(T)).astype(jnp.float32)[None, None, :, None]
    return -slopes * jnp.abs(q_index - k_index)


def token_positions(
    B: int,
    T: int,
    segment_ids: Int[Array, "B T"] | None = None,
    start: Int[Array, " B"] | None = None,
    last_segment: Int[Array, " B"] | None = None,
) -> Int[Array, "B T"]:
    """Positions that count up and start again at 0 wherever `segment_ids` changes.

    `start` is the position of the first token if it carries on what came before it; it does
    unless its segment differs from `last_segment` (-1: nothing came before).
    """
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    start = jnp.zeros((B,), jnp.int32) if start is None else start
    if segment_ids is None:
        return index + start[:, None]
    if last_segment is None:
        last_segment = segment_ids[:, 0]
    previous = jnp.concatenate([last_segment[:, None], segment_ids[:, :-1]], axis=1)
    changed = (segment_ids != previous) & (previous != -1)
    began = jax.lax.cummax(jnp.where(changed, index, -1), axis=1)
    return jnp.where(began < 0, index + start[:, None], index - began)
