"""How a model knows where a token stands: rotary angles, ALiBi, positions of packed documents.

Dimensions: B batch, T time, S key time, H heads, D head dim.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

POSITION_KINDS = ("rope", "rope_interleaved", "alibi", "learned", "none")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scales rotary frequencies so that a model reads further than it was trained.

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
                    f"rope_scaling.{name} must be positive, got {value}; any finite number above 0"
                )
        if not self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"rope_scaling.high_freq_factor={self.high_freq_factor} must be finite and above "
                f"low_freq_factor={self.low_freq_factor}"
            )

    @classmethod
    def of(cls, value: "RopeScaling | Mapping[str, Any] | None") -> "RopeScaling | None":
        """Returns the scaling of what a config file can hold: None, a mapping of fields, or itself.

        Raises:
          ValueError: anything else, and fields that make no sense.
        """
        if not isinstance(value, Mapping | RopeScaling | None):
            raise ValueError(
                f"rope_scaling={value!r} must hold fields, e.g. {{'kind': 'linear', 'factor': 2.0}}"
            )
        return cls(**dict(value)) if isinstance(value, Mapping) else value


def rope_frequencies(
    head_dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None
) -> Float[np.ndarray, "{head_dim}//2"]:
    """Returns the angle per position of each pair of channels: `theta ** (-2 i / D)`, float64.

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
    positions: Integer[Array, "B T"],
    *,
    theta: float = 10000.0,
    interleaved: bool = False,
    scaling: RopeScaling | None = None,
) -> Float[Array, "B T H D"]:
    """Turns pairs of channels by an angle that grows with the position.

    Half-split pairs channel i with i + D/2 (Hugging Face's Llama); interleaved pairs 2i with
    2i + 1 (the paper, GGUF files). Angles are those of `rope_angles`, good to 4e-7 at any length;
    the result has x's dtype.

    Raises:
      ValueError: if D is odd.
      TypeError: positions that are not integers.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    angle = rope_angles(positions, rope_frequencies(x.shape[-1], theta, scaling), wide)
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    x32 = x.astype(wide)
    if interleaved:
        a, b = x32[..., 0::2], x32[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(x32, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x.dtype)


def rope_angles(
    positions: Integer[Array, "B T"], frequencies: Float[np.ndarray, "R"], dtype: Any = jnp.float32
) -> Float[Array, "B T R"]:
    """Returns positions times frequencies, less whole turns in float32: angles in [-pi, pi].

    A product in float32 is off by 2^-25 of itself, 0.3 at ten million. Here angles are integers,
    in units of 2^-32 of a turn: the product with a frequency's 32 leading bits drops whole turns as
    it overflows and is exact, and one in float32 with the bits after them adds what is left, which
    is small. Cosines and sines are off by at most 4e-7 up to 2^24 positions, most of it float32's
    own, and by 1e-6 for all of int32.

    Args:
      positions: any integers of int32; beyond it, where their dtype is wider, angles are NaN.
      frequencies: in radians per position, NumPy's float64: `rope_frequencies`.
      dtype: of the result; float64 takes the product in float64.

    Raises:
      TypeError: positions that are not integers.
    """
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions must be integers, got {positions.dtype}")
    if jnp.dtype(dtype) == jnp.float64:
        return positions.astype(dtype)[..., None] * frequencies.reshape(1, 1, -1)

    # The turn of one step in units of 2^-32: a whole number of them, modulo 2^32, and the rest.
    units = np.mod(frequencies / (2 * np.pi), 1.0) * 2.0**32
    whole = np.floor(units)
    rest = (units - whole).astype(np.float32).reshape(1, 1, -1)
    whole = whole.astype(np.uint32).view(np.int32).reshape(1, 1, -1)

    at = positions.astype(jnp.int32)[..., None]
    turned = at * whole + jnp.rint(at.astype(jnp.float32) * rest).astype(jnp.int32)
    angle = turned.astype(dtype) * np.asarray(2 * np.pi / 2**32, dtype)
    info = jnp.iinfo(positions.dtype)
    if info.max <= 2**31 - 1:
        return angle
    outside = positions > 2**31 - 1
    if info.min < 0:
        outside |= positions < -(2**31)
    return jnp.where(outside[..., None], jnp.nan, angle)


def alibi_slopes(n_heads: int) -> Float[np.ndarray, " H"]:
    """Returns one slope per head (Press et al. 2021, arXiv 2108.12409).

    A geometric sequence that starts at 2 ** (-8/H) for a power of two; otherwise the slopes of
    the power of two below it, then every other slope of the next one, as in the authors' code.
    """

    def power_of_two(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    below = 2 ** math.floor(math.log2(n_heads))
    slopes = power_of_two(below) + power_of_two(2 * below)[0::2][: n_heads - below]
    return np.asarray(slopes, np.float32)


def alibi_bias(
    n_heads: int, T: int, S: int, q_offset: Integer[Array, "*B"] | int, *, causal: bool
) -> Float[Array, "B_or_1 H T_or_1 S"]:
    """Returns the bias -slope * |i - j| of ALiBi, in the cheapest form that gives the same softmax.

    If a query sees only its past, |i - j| = i - j, and softmax ignores the part -slope * i that
    all keys of a query share: slope * j, [1, H, 1, S], says the same in O(S) memory. If it
    also sees its future the whole [1, H, T, S] must be built, or [B, H, T, S] where q_offset [B] is
    one of each row.

    The cheap form has a limit: float32 logits that it is added to are rounded to 2^-24 of
    slope * j, by up to 0.003 at 100,000 keys and 0.03 at a million for a slope of 1/2. Beyond some
    hundred thousand tokens use rotary positions.
    """
    slopes = jnp.asarray(alibi_slopes(n_heads))[None, :, None, None]
    k_index = jnp.arange(S, dtype=jnp.int32)[None, None, None, :]
    if causal:
        return slopes * k_index.astype(jnp.float32)
    # Subtracted as integers: floats would be rounded from 2^24 on.
    q_index = jnp.reshape(q_offset, (-1, 1)) + jnp.arange(T, dtype=jnp.int32)[None]
    q_index = q_index[:, None, :, None]
    return -slopes * jnp.abs(q_index - k_index).astype(jnp.float32)


def token_positions(
    B: int,
    T: int,
    segment_ids: Integer[Array, "B T"] | None = None,
    start: Integer[Array, " B"] | None = None,
    last_segment: Integer[Array, " B"] | None = None,
) -> Integer[Array, "B T"]:
    """Returns positions that count up and start again at 0 wherever `segment_ids` changes.

    `start` is the position of the first token if it carries on what came before it; it does
    unless its segment differs from `last_segment`. Ids may be any integers.
    """
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    start = jnp.zeros((B,), jnp.int32) if start is None else start
    if segment_ids is None:
        return index + start[:, None]
    if last_segment is None:
        last_segment = segment_ids[:, 0]
    previous = jnp.concatenate([last_segment[:, None], segment_ids[:, :-1]], axis=1)
    changed = segment_ids != previous
    began = jax.lax.cummax(jnp.where(changed, index, -1), axis=1)
    return jnp.where(began < 0, index + start[:, None], index - began)
