"""What recurrent mixers share: initial values, the short convolution, segments across calls.

Dimensions: B batch, T time, E embedding or channels, W kernel width.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Integer

from tilescan.models.module import Module
from tilescan.ops.arrays import AnyArray
from tilescan.ops.mesh_axes import sequence_parts
from tilescan.ops.sequence_parallel.on_mesh import on_mesh
from tilescan.ops.short_convolution import short_convolution


def check_mixer_inputs(x: Any, *, positions: Any = None, segment_ids: Any = None) -> None:
    """Raises ValueError unless x is [B, T, E] and what belongs to its tokens [B, T]."""
    if x.ndim != 3:
        raise ValueError(f"a mixer's x is [batch, time, d_model]; got shape {x.shape}")
    for name, value in (("positions", positions), ("segment_ids", segment_ids)):
        if value is not None and value.shape != x.shape[:2]:
            raise ValueError(
                f"{name} must be [batch, time] = {x.shape[:2]} like x, got {value.shape}"
            )


def check_whole_time(x: Float[Array, "B T E"], option: str) -> None:
    """Raises ValueError, which names the option, if the mesh in use shards x's time."""
    P = sequence_parts(x.shape[1])
    if P > 1:
        raise ValueError(
            f"{option} needs all of time on one device, but mesh.sequence = {P} shards it; use "
            "mesh.sequence = 1, or do without"
        )


def continued(state: Any, segment_ids: Integer[Array, "B T"] | None) -> Any:
    """Returns a mixer's state with zeros in the rows whose first token begins another segment.

    Ops start there from nothing as well, but by a factor of 0, which leaves NaN what it is.
    """
    if state is None or segment_ids is None:
        return state
    same = segment_ids[:, 0].astype(state.segment.dtype) == state.segment

    def keep(x):
        return jnp.where(same.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))

    return jax.tree.map(keep, state)._replace(segment=state.segment)


def carried_segments(
    segment_ids: Integer[AnyArray, "B T"] | None, last: Integer[Array, " B"] | None
) -> tuple[
    Integer[AnyArray, "B 1+T"] | Integer[AnyArray, "B T"] | None, Integer[Array, " B"] | None
]:
    """Returns ids as ops take them, that of the state's token first, and the last token's.

    Args:
      segment_ids: of this call's tokens, or None.
      last: of the token before them, kept in the mixer's state; None if there is no state.
    """
    if segment_ids is None or last is None:
        return segment_ids, last
    ids = segment_ids.astype(last.dtype)
    return jnp.concatenate([last[:, None], ids], axis=1), ids[:, -1]


def uniform_fan_in(scale: float = 1.0) -> Callable:
    """Returns the initializer U(-b, b) with b = scale / sqrt(fan_in), torch's for linear maps."""
    return nn.initializers.variance_scaling(scale**2 / 3, "fan_in", "uniform")


def step_size_bias(low: float, high: float, floor: float = 1e-4) -> Callable:
    """Returns an initializer of b with softplus(b) log-uniform in [low, high].

    Source: arXiv 2312.00752, section 3.6.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Array:
        dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(low), math.log(high)))
        dt = jnp.maximum(dt, floor)
        return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)

    return init


def exact_dtype(param_dtype: Any) -> Any:
    """Returns the dtype of decays and step sizes, in which a small update still moves them."""
    return jnp.promote_types(param_dtype, jnp.float32)


class ShortConvolution(Module):
    """`ops.short_convolution` with its weights, [W, E] and [E].

    Attributes:
      width: W.
      activation: None or "silu".
      sequence_parallel: a name of SCAN_KINDS in `ops.sequence_parallel.kinds`.
    """

    width: int = 4
    use_bias: bool = True
    activation: str | None = "silu"
    sequence_parallel: str = "all_scan"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        state: Float[Array, "B {self.width}-1 E"] | None = None,
        segment_ids: Integer[Array, "B T"] | Integer[Array, "B 1+T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B {self.width}-1 E"]]:
        """Returns the convolution of x and the last W - 1 inputs, as `ops.short_convolution`."""
        named, E = nn.with_logical_partitioning, x.shape[-1]
        bound = self.width**-0.5  # torch's default: a channel sees W inputs

        def init(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        axes = ("window", "inner")
        kernel = self.param("kernel", named(init, axes), (self.width, E), self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", named(init, axes[1:]), (E,), self.param_dtype)
        return on_mesh(
            short_convolution,
            self.sequence_parallel,
            x.astype(self.dtype),
            kernel,
            bias=bias,
            activation=self.activation,
            initial_state=state,
            segment_ids=segment_ids,
        )
