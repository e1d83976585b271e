"""Gated DeltaNet as a token mixer (arXiv 2412.06464, section 3.4).

Dimensions: B batch, T time, E embedding, H heads, D head dim of queries and keys, P of values,
W width of the convolutions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Integer

from tilescan.models.gated_linear_attention import HeadNorm, head_dims
from tilescan.models.layers import linear, scaled_fan_in
from tilescan.models.module import Module
from tilescan.models.recurrent import (
    ShortConvolution,
    carried_segments,
    check_mixer_inputs,
    continued,
    exact_dtype,
    step_size_bias,
)
from tilescan.ops.delta_rule import gated_delta_rule
from tilescan.ops.sequence_parallel.on_mesh import on_mesh


class GatedDeltaNetState(NamedTuple):
    """What is carried over time: the convolutions' last inputs, a matrix per head, the segment."""

    conv: tuple[Float[Array, "B W-1 HD"], Float[Array, "B W-1 HD"], Float[Array, "B W-1 HP"]]
    memory: Float[Array, "B H D P"]
    segment: Integer[Array, " B"]


class GatedDeltaNet(Module):
    """S_t = a_t (1 - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T and o_t = S_t^T q_t / sqrt(D);

    q, k, v = silu(conv(W x)), q and k of length 1 in each head;  b = sigmoid(W_b x);
    log a = -exp(A_log) softplus(W_a x + dt_bias);  y = W_out (RMSNorm(o) silu(W_g x)).

    Attributes:
      d_model: E.
      n_heads: H.
      expand_k, expand_v: H D / E and H P / E.
      conv_width: W.
      A_range: initial exp(A_log) is uniform in it.
      dt_min, dt_max: initial softplus(dt_bias) is log-uniform between them.
      negative_eigenvalues: b = 2 sigmoid, so that a step may turn the state (arXiv 2411.12537).
      norm_eps: of the norm over P.
      chunk, implementation: of `ops.gated_delta_rule`.
      sequence_parallel: a name of SCAN_KINDS in `ops.sequence_parallel.kinds`.
      out_scale: multiplies the output's initial weights.
    """

    d_model: int
    n_heads: int = 4
    expand_k: float = 0.75
    expand_v: float = 1.5
    conv_width: int = 4
    A_range: tuple[float, float] = (0.0, 16.0)
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    negative_eigenvalues: bool = False
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
        x: Float[Array, "B T E"],
        *,
        state: GatedDeltaNetState | None = None,
        positions: Integer[Array, "B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], GatedDeltaNetState | None]:
        """Mixes T tokens, as `models.mixers` says; positions are not used.

        Raises:
          ValueError: also for heads that don't divide.
        """
        check_mixer_inputs(x, positions=positions, segment_ids=segment_ids)
        H, (D, P) = self.n_heads, self._head_dims()
        batch, T, _ = x.shape
        exact, wide = exact_dtype(self.param_dtype), jnp.promote_types(self.dtype, jnp.float32)
        state = continued(state, segment_ids)
        ids, last = carried_segments(segment_ids, None if state is None else state.segment)
        common = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        # q, k, v = silu(conv(W x)), q and k of unit length.
        tails, qkv = [], []
        for i, (name, features) in enumerate((("query", D), ("key", D), ("value", P))):
            y = linear(H * features, ("embed", "inner"), name=name, **common)(x)
            conv = ShortConvolution(
                self.conv_width,
                False,
                name=f"{name}_conv",
                sequence_parallel=self.sequence_parallel,
                **common,
            )
            y, tail = conv(y, state=None if state is None else state.conv[i], segment_ids=ids)
            tails.append(tail)
            qkv.append(y.reshape(batch, T, H, features))
        q, k, v = qkv
        q, k = _unit(q, wide), _unit(k, wide)

        # b = sigmoid(W_b x) and log a = -exp(A_log) softplus(W_a x + dt_bias), one of each head.
        b, a = (
            linear(H, ("embed", "heads"), name=name, **common)(x).astype(wide)
            for name in ("beta", "decay")
        )
        beta = jax.nn.sigmoid(b) * (2 if self.negative_eigenvalues else 1)

        def vector(name, init):
            init = nn.with_logical_partitioning(init, ("heads",))
            return self.param(name, init, (H,), exact).astype(wide).reshape(1, 1, H)

        dt_bias = vector("dt_bias", step_size_bias(self.dt_min, self.dt_max))
        A_log = vector("A_log", _log_uniform(*self.A_range))
        log_decay = -jnp.exp(A_log) * jax.nn.softplus(a + dt_bias)

        # The delta rule, and what it leaves in memory.
        o, memory = on_mesh(
            gated_delta_rule,
            self.sequence_parallel,
            q,
            k,
            v,
            beta,
            log_decay,
            initial_state=None if state is None else state.memory,
            segment_ids=ids,
            chunk=self.chunk,
            implementation=self.implementation,
        )
        # W_out (RMSNorm(o) silu(W_g x))
        gate = linear((H, P), ("embed", "heads", "head_dim"), name="gate", **common)(x)
        o = HeadNorm(self.norm_eps, name="norm", **common)(o, gate)
        out = linear(
            self.d_model,
            ("heads", "head_dim", "embed"),
            inputs=2,
            init=scaled_fan_in(self.out_scale),
            name="out",
            **common,
        )(o)
        return out, None if state is None else GatedDeltaNetState(tuple(tails), memory, last)

    @nn.nowrap
    def init_state(self, batch: int, max_len: int) -> GatedDeltaNetState:
        """Returns zeros, whose size does not depend on max_len."""
        H, (D, P) = self.n_heads, self._head_dims()
        tails = (jnp.zeros((batch, self.conv_width - 1, H * n), self.dtype) for n in (D, D, P))
        return GatedDeltaNetState(
            tuple(tails),
            jnp.zeros((batch, H, D, P), jnp.promote_types(self.dtype, jnp.float32)),
            jnp.full((batch,), -1, jnp.int32),
        )

    @nn.nowrap
    def _head_dims(self) -> tuple[int, int]:
        return head_dims("gated_deltanet", self.d_model, self.n_heads, self.expand_k, self.expand_v)


def _unit(x, wide):
    """x / |x| over the last axis, in x's dtype."""
    y = x.astype(wide)
    return (y * jax.lax.rsqrt(jnp.sum(y * y, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def _log_uniform(low: float, high: float) -> Callable:
    """log of U(low, high), for low = 0 too."""

    def init(key, shape, dtype):
        return jnp.log(jnp.maximum(jax.random.uniform(key, shape, dtype, low, high), 1e-4))

    return init
