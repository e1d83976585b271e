"""H3 (arXiv 2212.14052): attention from two state spaces and two products.

Dimensions: B batch, T time, E embedding, H heads, D head dim (E / H), m taps, S state dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Integer

from tilescan.models.layers import linear
from tilescan.models.module import Module
from tilescan.models.recurrent import (
    carried_segments,
    check_mixer_inputs,
    continued,
    uniform_fan_in,
)
from tilescan.models.s4 import log_steps, output_matrix, poles
from tilescan.ops import s4
from tilescan.ops.long_convolution import long_convolution
from tilescan.ops.sequence_parallel.on_mesh import on_mesh
from tilescan.ops.short_convolution import short_convolution
from tilescan.ops.state_space import diagonal_state_space


class H3State(NamedTuple):
    """What is carried over time: the latest keys, the diagonal states, the last token's segment."""

    keys: Float[Array, "B m-1 E"]
    ssm: Float[Array, "B H DD S"]
    segment: Integer[Array, " B"]


class H3(Module):
    """q, k, v = W u;  o = q * SSM_diag(SSM_shift(k) * v), per channel or per head;  y = W_out o.

    SSM_shift(k) = k * c + D_shift k with m taps c; of heads with D > 1, SSM_diag sees the outer
    products of SSM_shift(k) and v, and q is contracted with the keys' side.

    Attributes:
      d_model: E.
      head_dim: D; it divides E.
      taps: m.
      state_dim: S of the diagonal state space, even.
      init_A, discretization: of it, as of `models.s4.S4D`.
      dt_min, dt_max: its initial steps are log-uniform between them.
      fft: as of `models.s4.S4D`.
      use_bias: of the linear maps.
      sequence_parallel: a name of SCAN_KINDS in `ops.sequence_parallel.kinds`.
      out_scale: multiplies the output's initial weights.
    """

    d_model: int
    head_dim: int = 1
    taps: int = 64
    state_dim: int = 64
    init_A: str = "lin"
    discretization: str = "bilinear"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    fft: bool = True
    use_bias: bool = True
    out_scale: float = 1.0
    sequence_parallel: str = "all_scan"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        state: H3State | None = None,
        positions: Integer[Array, "B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], H3State | None]:
        """Mixes T tokens, as `models.mixers` says; positions are not used.

        Raises:
          ValueError: also for sizes that don't fit, or time that the mesh in use can't shard.
        """
        check_mixer_inputs(x, positions=positions, segment_ids=segment_ids)
        H, D = self._heads(), self.head_dim
        batch, T, E = x.shape
        wide = jnp.promote_types(self.dtype, jnp.float32)
        state = continued(state, segment_ids)
        ids, last = carried_segments(segment_ids, None if state is None else state.segment)
        common = dict(use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        # q, k, v, and the shift of the keys.
        q, k, v = (
            linear(E, ("embed", "inner"), init=uniform_fan_in(), name=name, **common)(x)
            for name in ("query", "key", "value")
        )
        k, keys = self._shift(k, None if state is None else state.keys, ids)
        # Products of shifted keys and values, elementwise or outer products of each head.
        q, v = q.astype(wide), v.astype(wide)
        if D == 1:
            kv = k * v
        else:
            by_head = lambda a: a.reshape(batch, T, H, D)
            kv = by_head(k)[..., :, None] * by_head(v)[..., None, :]
            kv = kv.reshape(batch, T, H, D * D)
        # Their state space, contracted with the queries, and W_out.
        memory, ssm = self._diagonal(kv, None if state is None else state.ssm, ids)
        if D == 1:
            o = q * memory
        else:
            memory = memory.reshape(batch, T, H, D, D)
            o = jnp.einsum("bthd,bthdp->bthp", by_head(q), memory).reshape(batch, T, E)
        init = uniform_fan_in(self.out_scale)
        out = linear(E, ("inner", "embed"), init=init, name="out", **common)(o.astype(self.dtype))
        return out, None if state is None else H3State(keys, ssm, last)

    @nn.nowrap
    def init_state(self, batch: int, max_len: int) -> H3State:
        """Returns zeros, whose size does not depend on max_len."""
        channels = () if self.head_dim == 1 else (self.head_dim**2,)
        shape = (batch, self._heads(), *channels, self.state_dim)
        return H3State(
            jnp.zeros((batch, self.taps - 1, self.d_model), self.dtype),
            jnp.zeros(shape, jnp.promote_types(self.dtype, jnp.float32)),
            jnp.full((batch,), -1, jnp.int32),
        )

    def _shift(self, k, state, ids):
        """The m taps of SSM_shift, c reversed as of `ops.short_convolution`, and its skip."""
        E, wide = self.d_model, jnp.promote_types(self.dtype, jnp.float32)
        bound = self.taps**-0.5

        def init(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        init = nn.with_logical_partitioning(init, ("window", "inner"))
        taps = self.param("shift", init, (self.taps, E), self.param_dtype)
        D = self._skip("D_shift", E).astype(wide)
        if self.fft and state is None and ids is None:
            taps = taps[::-1].astype(wide)
            return self._on_mesh(long_convolution, k.astype(wide), taps, D=D)[0], None
        y, state = self._on_mesh(short_convolution, k, taps, initial_state=state, segment_ids=ids)
        return y.astype(wide) + D.reshape(1, 1, E) * k.astype(wide), state

    def _diagonal(self, kv, state, ids):
        """SSM_diag with its skip: [B, T, H] or [B, T, H, D D] like kv, and the last state."""
        H, wide = self._heads(), kv.dtype
        shape = H, self.state_dim // 2
        axes = "inner", "state"
        log_dt = log_steps(self, H, self.dt_min, self.dt_max, wide)
        A = None if self.init_A == "random" else s4.s4d_init(self.state_dim, self.init_A)
        A = poles(self, A, shape, axes, wide)
        system = log_dt, A, jnp.ones_like(A), output_matrix(self, "C", shape, axes, wide)
        D = self._skip("D", H).astype(wide)
        D = D.reshape(1, 1, H, *(1,) * (kv.ndim - 3))
        if self.fft and state is None and ids is None:
            kernel = s4.s4d_kernel(*system, kv.shape[1], self.discretization)
            channels = kv.reshape(*kv.shape[:2], -1)
            kernel = jnp.repeat(kernel, channels.shape[2] // H, axis=1)
            y = self._on_mesh(long_convolution, channels, kernel)[0].reshape(kv.shape)
        else:
            y, state = self._on_mesh(
                diagonal_state_space,
                kv,
                *system,
                discretization=self.discretization,
                initial_state=state,
                segment_ids=ids,
            )
        return y + D * kv, state

    def _on_mesh(self, op: Callable, *arrays: Array, **options: Any) -> tuple[Array, Array]:
        return on_mesh(op, self.sequence_parallel, *arrays, **options)

    def _skip(self, name, features):
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("inner",))
        return self.param(name, init, (features,), self.param_dtype)

    @nn.nowrap
    def _heads(self) -> int:
        if self.head_dim < 1 or self.d_model % self.head_dim:
            raise ValueError(f"h3: head_dim={self.head_dim} must divide d_model={self.d_model}")
        if self.taps < 1:
            raise ValueError(f"h3: taps={self.taps} must be at least 1")
        return self.d_model // self.head_dim
