"""Mamba's selective state space mixer (arXiv 2312.00752, section 3.4).

Dimensions: B batch, T time, M d_model, E channels (expand * M), N state dim, R rank of the step
sizes, W width of the convolution.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Integer

from tilescan.models.layers import linear
from tilescan.models.module import Module
from tilescan.models.recurrent import (
    ShortConvolution,
    carried_segments,
    check_mixer_inputs,
    continued,
    exact_dtype,
    step_size_bias,
    uniform_fan_in,
)
from tilescan.ops.selective_scan import selective_scan
from tilescan.ops.sequence_parallel.on_mesh import on_mesh


class MambaState(NamedTuple):
    """What is carried over time: the convolution's last inputs, h, the last token's segment."""

    conv: Float[Array, "B W-1 E"]
    ssm: Float[Array, "B E N"]
    segment: Integer[Array, " B"]


class Mamba(Module):
    """x, z = W_in u;  x = silu(conv(x));  dt, B, C = W_x x;  y = scan(x, softplus(W_dt dt + b));

    out = W_out (y silu(z)), with h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = C_t h_t + D x_t.

    Attributes:
      d_model: M.
      state_dim: N.
      expand: E / M.
      dt_rank: R; default M / 16, rounded up.
      conv_width: W.
      conv_bias, use_bias: of the convolution; of W_in and W_out.
      dt_min, dt_max: initial step sizes are log-uniform between them.
      sequence_parallel: a name of SCAN_KINDS in `ops.sequence_parallel.kinds`.
      out_scale: multiplies the output's initial weights.
      implementation: of `ops.selective_scan`.
    """

    d_model: int
    state_dim: int = 16
    expand: int = 2
    dt_rank: int | None = None
    conv_width: int = 4
    conv_bias: bool = True
    use_bias: bool = False
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    implementation: str | None = None
    out_scale: float = 1.0
    sequence_parallel: str = "all_scan"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        state: MambaState | None = None,
        positions: Integer[Array, "B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T M"], MambaState | None]:
        """Mixes T tokens, as `models.mixers` says; positions are not used."""
        check_mixer_inputs(x, positions=positions, segment_ids=segment_ids)
        E, N, R = self.expand * self.d_model, self.state_dim, self.rank
        named, exact = nn.with_logical_partitioning, exact_dtype(self.param_dtype)
        common = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        state = continued(state, segment_ids)
        ids, last = carried_segments(segment_ids, None if state is None else state.segment)

        # x, z = W_in u;  x = silu(conv(x))
        xz = linear(
            2 * E,
            ("embed", "inner"),
            use_bias=self.use_bias,
            init=uniform_fan_in(),
            name="in_proj",
            **common,
        )(x)
        u, z = jnp.split(xz, 2, axis=-1)
        conv = ShortConvolution(
            self.conv_width,
            self.conv_bias,
            name="conv",
            sequence_parallel=self.sequence_parallel,
            **common,
        )
        u, tail = conv(u, state=None if state is None else state.conv, segment_ids=ids)

        # dt, B, C = W_x x, and the step sizes' second map.
        axes = ("inner", "rank")
        selected = linear(R + 2 * N, axes, init=uniform_fan_in(), name="x_proj", **common)(u)
        dt, B, C = jnp.split(selected, (R, R + N), axis=-1)
        # |weights| <= R ** -0.5; the bias belongs inside the scan's softplus.
        axes = ("rank", "inner")
        dt = linear(E, axes, init=uniform_fan_in(), name="dt_proj", **common)(dt)
        bias_init = step_size_bias(self.dt_min, self.dt_max)
        dt_bias = self.param("dt_bias", named(bias_init, ("inner",)), (E,), exact)
        # The scan, gated by silu(z), and W_out.
        A_log = self.param("A_log", named(_log_steps, ("inner", "state")), (E, N), exact)
        D = self.param("D", named(nn.initializers.ones_init(), ("inner",)), (E,), exact)
        y, ssm = on_mesh(
            selective_scan,
            self.sequence_parallel,
            u,
            dt,
            -jnp.exp(A_log.astype(jnp.promote_types(A_log.dtype, jnp.float32))),
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=True,
            initial_state=None if state is None else state.ssm,
            segment_ids=ids,
            implementation=self.implementation,
        )
        out = linear(
            self.d_model,
            ("inner", "embed"),
            use_bias=self.use_bias,
            init=uniform_fan_in(self.out_scale),
            name="out_proj",
            **common,
        )(y)
        return out, None if state is None else MambaState(tail, ssm, last)

    @property
    def rank(self) -> int:
        """R, the rank of the step sizes."""
        return -(-self.d_model // 16) if self.dt_rank is None else self.dt_rank

    @nn.nowrap
    def init_state(self, batch: int, max_len: int) -> MambaState:
        """Returns zeros, whose size does not depend on max_len."""
        E = self.expand * self.d_model
        return MambaState(
            jnp.zeros((batch, self.conv_width - 1, E), self.dtype),
            jnp.zeros((batch, E, self.state_dim), jnp.promote_types(self.dtype, jnp.float32)),
            jnp.full((batch,), -1, jnp.int32),
        )


def _log_steps(key: jax.Array, shape: tuple[int, int], dtype) -> Float[Array, "E N"]:
    """log(1 .. N) in each channel: S4D-Real (arXiv 2206.11893)."""
    E, N = shape
    return jnp.broadcast_to(jnp.log(jnp.arange(1, N + 1, dtype=dtype)), (E, N))
