"""Mamba-2's mixer (arXiv 2405.21060, section 7.1), with the interventions of "Stuffed Mamba"
(arXiv 2410.07145).

Dimensions: B batch, T time, M d_model, E channels (expand * M), H heads, P head dim (E / H), G
groups of heads that share B and C, N state dim, W width of the convolution, r window.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Integer

from tilescan.models.layers import GatedRMSNorm, linear
from tilescan.models.module import Module
from tilescan.models.recurrent import (
    ShortConvolution,
    carried_segments,
    check_mixer_inputs,
    check_whole_time,
    continued,
    exact_dtype,
    step_size_bias,
    uniform_fan_in,
)
from tilescan.models.state_window import StateWindow, beyond_window
from tilescan.ops.sequence_parallel.on_mesh import on_mesh
from tilescan.ops.ssd import ssd


class Mamba2State(NamedTuple):
    """What is carried over time: the convolution's last inputs, h, the last token's segment."""

    conv: Float[Array, "B W-1 E+2GN"]
    ssm: Float[Array, "B H P N"]
    segment: Integer[Array, " B"]
    window: StateWindow | None = None


class Mamba2(Module):
    """z, x, B, C, dt = W_in u;  x, B, C = silu(conv(x, B, C));  dt = softplus(dt + dt_bias);

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T per head;  y_t = h_t C_t + D x_t;
    out = W_out RMSNorm(y silu(z)).

    With `mutable=["intermediates"]`, `apply` also returns the traces dt [B, T, H],
    cumulative_log_decay [B, T, H] (log of the first token's share: the sum of dt A) and state_norm
    [B, H] (of h after the last token). Norms and variances every k tokens: read k tokens a call
    and look at the state.

    Attributes:
      d_model: M.
      state_dim: N.
      head_dim: P.
      n_groups: G.
      expand: E / M.
      conv_width: W.
      conv_bias, use_bias: of the convolution; of W_in and W_out.
      A_range: initial -A is uniform in it.
      dt_min, dt_max: initial step sizes are log-uniform between them.
      dt_limit: bounds of the step sizes, or None.
      decay_scale: factor of every decay exp(dt A), at most 1.
      b_scale: factor of B after the convolution.
      dt_scale: factor of the step sizes, after softplus and before dt_limit.
      state_window: r, how many tokens the state holds; None: all. The convolution still sees
        W - 1 tokens more.
      norm_eps: of the norm.
      chunk, implementation: of `ops.ssd`.
      sequence_parallel: a name of SCAN_KINDS in `ops.sequence_parallel.kinds`.
      out_scale: multiplies the output's initial weights.
    """

    d_model: int
    state_dim: int = 128
    head_dim: int = 64
    n_groups: int = 1
    expand: int = 2
    conv_width: int = 4
    conv_bias: bool = True
    use_bias: bool = False
    A_range: tuple[float, float] = (1.0, 16.0)
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_limit: tuple[float, float] | None = None
    decay_scale: float = 1.0
    b_scale: float = 1.0
    dt_scale: float = 1.0
    state_window: int | None = None
    chunk: int | None = None
    implementation: str | None = None
    norm_eps: float = 1e-5
    out_scale: float = 1.0
    sequence_parallel: str = "all_scan"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        state: Mamba2State | None = None,
        positions: Integer[Array, "B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T M"], Mamba2State | None]:
        """Mixes T tokens, as `models.mixers` says; positions are not used.

        Raises:
          ValueError: also for sizes that don't divide, decay_scale out of (0, 1], or a state_window
            where the mesh in use shards time.
        """
        check_mixer_inputs(x, positions=positions, segment_ids=segment_ids)
        # Where the tokens start: h, the convolution's last inputs, the segment before.
        E, H, G, N = self._sizes()
        batch, T, P = *x.shape[:2], self.head_dim
        state = continued(state, segment_ids)
        carried = self.init_state(batch, T) if state is None else state
        last = None if state is None else state.segment
        ids, last = carried_segments(segment_ids, last)
        named, exact = nn.with_logical_partitioning, exact_dtype(self.param_dtype)
        common = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        # z, x, B, C, dt = W_in u, and the short convolution of x, B and C.
        zxbcdt = linear(
            2 * E + 2 * G * N + H,
            ("embed", "inner"),
            use_bias=self.use_bias,
            init=uniform_fan_in(),
            name="in_proj",
            **common,
        )(x)
        z, xBC, dt = jnp.split(zxbcdt, (E, 2 * E + 2 * G * N), axis=-1)
        conv = ShortConvolution(
            self.conv_width,
            self.conv_bias,
            name="conv",
            sequence_parallel=self.sequence_parallel,
            **common,
        )
        xBC, tail = conv(xBC, state=carried.conv, segment_ids=ids)
        u, B, C = jnp.split(xBC, (E, E + G * N), axis=-1)
        u = u.reshape(batch, T, H, P)
        B, C = (a.reshape(batch, T, G, N) for a in (B, C))
        if self.b_scale != 1:
            B = B * self.b_scale

        # A < 0 and the step sizes dt = softplus(dt + dt_bias), one of each head.
        def vector(name: str, init: Callable) -> Float[Array, " H"]:
            return self.param(name, named(init, ("inner",)), (H,), exact)

        A = -jnp.exp(vector("A_log", _log_uniform(*self.A_range)).astype(carried.ssm.dtype))
        dt = dt.astype(A.dtype) + vector(
            "dt_bias", step_size_bias(self.dt_min, self.dt_max)
        ).astype(A.dtype).reshape(1, 1, H)
        dt = jax.nn.softplus(dt) * self.dt_scale
        if self.dt_limit is not None:
            dt = jnp.clip(dt, *self.dt_limit)
        D = vector("D", nn.initializers.ones_init())

        # The recurrence. exp(dt A) * decay_scale = exp(slower A), and dt x = slower faded.
        slower, faded = dt, u
        if self.decay_scale != 1:
            slower = dt + math.log(self.decay_scale) / A[None, None]
            faded = (u.astype(A.dtype) * (dt / slower)[..., None]).astype(u.dtype)
        options = dict(chunk=self.chunk, implementation=self.implementation)
        y, ssm = on_mesh(
            ssd,
            self.sequence_parallel,
            faded,
            slower,
            A,
            B,
            C,
            initial_state=None if state is None else carried.ssm,
            segment_ids=ids,
            **options,
        )
        y = y.astype(A.dtype) + D.astype(A.dtype).reshape(1, 1, H, 1) * u.astype(A.dtype)
        # Less what tokens beyond the state's window added.
        window = carried.window
        if window is not None:
            check_whole_time(x, f"mamba2: state_window={self.state_window}")
            old, window = beyond_window(
                faded, slower, A, B, C, window, segment_ids=segment_ids, **options
            )
            y = y - old
        self._trace(dt, slower * A[None, None], ssm)

        # W_out RMSNorm(y silu(z))
        norm = GatedRMSNorm(G, self.norm_eps, name="norm", **common)
        out = linear(
            self.d_model,
            ("inner", "embed"),
            use_bias=self.use_bias,
            init=uniform_fan_in(self.out_scale),
            name="out_proj",
            **common,
        )(norm(y.reshape(batch, T, E), z))
        return out, None if state is None else Mamba2State(tail, ssm, last, window)

    @nn.nowrap
    def init_state(self, batch: int, max_len: int) -> Mamba2State:
        """Returns zeros, whose size does not depend on max_len."""
        E, H, G, N = self._sizes()
        window, wide = None, jnp.promote_types(self.dtype, jnp.float32)
        if self.state_window is not None:
            window = StateWindow.create(
                batch, self.state_window, H, self.head_dim, G, N, self.dtype
            )
        return Mamba2State(
            jnp.zeros((batch, self.conv_width - 1, E + 2 * G * N), self.dtype),
            jnp.zeros((batch, H, self.head_dim, N), wide),
            jnp.full((batch,), -1, jnp.int32),
            window,
        )

    @nn.nowrap
    def _sizes(self) -> tuple[int, int, int, int]:
        """E, H, G and N, if they fit."""
        E, P, G = self.expand * self.d_model, self.head_dim, self.n_groups
        if E % P:
            raise ValueError(
                f"mamba2: head_dim={P} must divide expand * d_model = {E}; for example head_dim="
                f"{math.gcd(E, P)}"
            )
        if (E // P) % G:
            raise ValueError(f"mamba2: n_groups={G} must divide the {E // P} heads")
        if not 0 < self.decay_scale <= 1:
            raise ValueError(f"mamba2: decay_scale={self.decay_scale} must be in (0, 1]")
        if self.state_window is not None and self.state_window < 1:
            raise ValueError(f"mamba2: state_window={self.state_window} must be at least 1")
        return E, E // P, G, self.state_dim

    def _trace(self, dt, log_decay, ssm) -> None:
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "dt", dt)
            self.sow("intermediates", "cumulative_log_decay", jnp.cumsum(log_decay, axis=1))
            self.sow("intermediates", "state_norm", jnp.sqrt(jnp.sum(ssm**2, axis=(2, 3))))


def _log_uniform(low: float, high: float) -> Callable:
    """log of U(low, high)."""

    def init(key, shape, dtype):
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return init
