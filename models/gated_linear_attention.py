"""Gated linear attention as a token mixer: GLA (arXiv 2312.06635, section 4.4).

Dimensions: B batch, T time, E embedding, H heads, D head dim of queries and keys, P of values.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Integer

from tilescan.models.layers import linear, scaled_fan_in
from tilescan.models.module import Module
from tilescan.models.recurrent import carried_segments, check_mixer_inputs, continued
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.ops.sequence_parallel.on_mesh import on_mesh


class GLAState(NamedTuple):
    """What is carried over time: a matrix per head, and the last token's segment."""

    memory: Float[Array, "B H D P"]
    segment: Integer[Array, " B"]


class GatedLinearAttention(Module):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t / sqrt(D) in each head;

    log a = logsigmoid(W_2 W_1 x + b) / gate_normalizer;  y = W_out (RMSNorm(o) silu(W_g x)).

    Attributes:
      d_model: E.
      n_heads: H.
      expand_k, expand_v: H D / E and H P / E.
      gate_rank: of W_2 W_1.
      gate_normalizer: the larger, the slower is the decay.
      norm_eps: of the norm over P.
      chunk, implementation: of `ops.gated_linear_attention`.
      sequence_parallel: a name of SCAN_KINDS in `ops.sequence_parallel.kinds`.
      out_scale: multiplies the output's initial weights.
    """

    d_model: int
    n_heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_rank: int = 16
    gate_normalizer: float = 16.0
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
        state: GLAState | None = None,
        positions: Integer[Array, "B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], GLAState | None]:
        """Mixes T tokens, as `models.mixers` says; positions are not used.

        Raises:
          ValueError: also for heads that don't divide.
        """
        check_mixer_inputs(x, positions=positions, segment_ids=segment_ids)
        H, (D, P) = self.n_heads, self._head_dims()
        state = continued(state, segment_ids)
        ids, last = carried_segments(segment_ids, None if state is None else state.segment)
        common = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        # q, k, v, and log a = logsigmoid(W_2 W_1 x + b) / gate_normalizer of each key channel.
        def project(name: str, features: int) -> Float[Array, "B T H features"]:
            axes = ("embed", "heads", "head_dim")
            return linear((H, features), axes, name=name, **common)(x)

        q, k, v = project("query", D), project("key", D), project("value", P)
        low = linear(self.gate_rank, ("embed", "rank"), name="decay_in", **common)(x)
        axes = ("rank", "heads", "head_dim")
        decay = linear((H, D), axes, use_bias=True, name="decay_out", **common)(low)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        log_decay = jax.nn.log_sigmoid(decay.astype(wide)) / self.gate_normalizer

        # The recurrence, then W_out (RMSNorm(o) silu(W_g x)).
        o, memory = on_mesh(
            gated_linear_attention,
            self.sequence_parallel,
            q,
            k,
            v,
            log_decay,
            initial_state=None if state is None else state.memory,
            segment_ids=ids,
            chunk=self.chunk,
            implementation=self.implementation,
        )
        norm = HeadNorm(self.norm_eps, name="norm", **common)
        o = norm(o, project("gate", P))
        out = linear(
            self.d_model,
            ("heads", "head_dim", "embed"),
            inputs=2,
            init=scaled_fan_in(self.out_scale),
            name="out",
            **common,
        )(o)
        return out, None if state is None else GLAState(memory, last)

    @nn.nowrap
    def init_state(self, batch: int, max_len: int) -> GLAState:
        """Returns zeros, whose size does not depend on max_len."""
        return GLAState(
            jnp.zeros(
                (batch, self.n_heads, *self._head_dims()),
                jnp.promote_types(self.dtype, jnp.float32),
            ),
            jnp.full((batch,), -1, jnp.int32),
        )

    @nn.nowrap
    def _head_dims(self) -> tuple[int, int]:
        return head_dims("gla", self.d_model, self.n_heads, self.expand_k, self.expand_v)


class HeadNorm(Module):
    """RMSNorm(x) silu(gate) over the last axis, all heads with one scale."""

    eps: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T H P"], gate: Float[Array, "B T H P"]
    ) -> Float[Array, "B T H P"]:
        """Returns the normed x times silu of the gate."""
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        # In units of the largest: x is a product of three factors, and its square may overflow.
        x = x.astype(wide)
        unit = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
        unit = jnp.maximum(unit, 1.0)
        x = x / unit
        mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(mean + self.eps / unit / unit)
        scale = scale.astype(wide).reshape((1,) * (x.ndim - 1) + scale.shape)
        return (x * scale * jax.nn.silu(gate.astype(wide))).astype(self.dtype)


def head_dims(
    mixer: str, d_model: int, n_heads: int, expand_k: float, expand_v: float
) -> tuple[int, int]:
    """Returns D and P of a mixer, whose name errors give.

    Raises:
      ValueError: widths that the heads don't divide.
    """
    dims = []
    for name, expand in (("expand_k", expand_k), ("expand_v", expand_v)):
        width = expand * d_model
        if n_heads < 1 or width < n_heads or width % n_heads:
            raise ValueError(
                f"{mixer}: n_heads={n_heads} must divide {name} * d_model = {width:g}; choose "
                f"another n_heads or {name}"
            )
        dims.append(int(width) // n_heads)
    return tuple(dims)
