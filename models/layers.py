"""The layers that every model shares: norms, feed-forward, embedding.

Dimensions: B batch, T time, E embedding (d_model), F feed-forward width, V vocabulary. Every
parameter names its axes with the words of `LOGICAL_AXES`; training/sharding.py maps them to a mesh.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Integer

from tilescan.models.module import Module
from tilescan.ops.token_ids import bounded_ids

LOGICAL_AXES = (
    "vocab",
    "embed",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "norm",
    "position",
    "classes",
    "layers",
    "inputs",  # features of real-valued inputs
    "inner",  # channels or heads of a recurrent mixer
    "state",  # state dim
    "rank",  # of a low-rank projection
    "window",  # of a short convolution
)

Dtype = Any
fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def scaled_fan_in(scale: float) -> Callable:
    """Returns fan_in with `scale` times its deviation (1/sqrt(depth) for residual outputs)."""
    return nn.initializers.variance_scaling(scale**2, "fan_in", "normal")


def linear(
    features: int | tuple[int, ...],
    axes: tuple[str, ...],
    *,
    inputs: int = 1,
    use_bias: bool = False,
    init: Callable = fan_in,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    name: str | None = None,
) -> nn.DenseGeneral:
    """Returns a linear map from the last `inputs` axes to `features`; `axes` name its kernel's."""
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-inputs, 0)),
        use_bias=use_bias,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[inputs:]),
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )


class RMSNorm(Module):
    """x / rms(x) * scale over the last axis (Zhang & Sennrich 2019); statistics in float32."""

    eps: float = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        """Returns x with mean square 1 over the last axis, times the scale."""
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)),
            (x.shape[-1],),
            self.param_dtype,
        )
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * _trailing(scale, x.ndim)).astype(self.dtype)


class GatedRMSNorm(Module):
    """RMSNorm of x silu(z), the gate before the norm (Mamba-2, arXiv 2405.21060, section 7.1).

    Attributes:
      groups: in how many groups the last axis is normalized, each by itself.
    """

    groups: int = 1
    eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... E"], z: Float[Array, "... E"]) -> Float[Array, "... E"]:
        """Returns the normalized x silu(z), times the scale."""
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("inner",))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        x = x.astype(wide) * jax.nn.silu(z.astype(wide))
        groups = x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
        # In units of the largest: x is a product of many factors, and its square may overflow.
        unit = jax.lax.stop_gradient(jnp.max(jnp.abs(groups), axis=-1, keepdims=True))
        unit = jnp.maximum(unit, 1.0)
        groups = groups / unit
        mean = jnp.mean(jnp.square(groups), axis=-1, keepdims=True)
        groups = groups * jax.lax.rsqrt(mean + self.eps / unit / unit)
        return (groups.reshape(x.shape) * _trailing(scale, x.ndim)).astype(self.dtype)


class LayerNorm(Module):
    """(x - mean) / std * scale + bias over the last axis; statistics in float32."""

    eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        """Returns x with mean 0 and variance 1 over the last axis, times scale, plus bias."""
        shape, named = (x.shape[-1],), nn.with_logical_partitioning
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale = self.param("scale", named(ones, ("norm",)), shape, self.param_dtype)
        bias = self.param("bias", named(zeros, ("norm",)), shape, self.param_dtype)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * _trailing(scale, x.ndim) + _trailing(bias, x.ndim)).astype(self.dtype)


def _trailing(vector: Float[Array, " E"], ndim: int) -> Array:
    """A vector as the last axis of `ndim`, in float32 (ranks are never promoted silently)."""
    return vector.astype(jnp.float32).reshape((1,) * (ndim - 1) + vector.shape)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


@jax.custom_jvp
def _erfc(x: Array) -> Array:
    return jax.lax.erfc(x)


@_erfc.defjvp
def _erfc_jvp(primals, tangents):
    """JAX's own rule fails in a `jax.shard_map` with check_vma."""
    (x,), (dx,) = primals, tangents
    return _erfc(x), (-2 / math.sqrt(math.pi)) * jnp.exp(-x * x) * dx


def exact_gelu(x: Array) -> Array:
    """Returns x times the normal distribution's share below x, without approximation.

    `jax.nn.gelu` with approximate=False has a derivative that fails in `jax.shard_map`.
    """
    return 0.5 * x * _erfc(x * -math.sqrt(0.5))


# Activation, and whether a gate multiplies it (Shazeer 2020, arXiv 2002.05202).
MLP_KINDS: dict[str, tuple[Callable, bool]] = {
    "swiglu": (jax.nn.silu, True),
    "geglu": (lambda x: jax.nn.gelu(x, approximate=True), True),
    "gelu": (exact_gelu, False),
    "gelu_tanh": (lambda x: jax.nn.gelu(x, approximate=True), False),
    "relu": (jax.nn.relu, False),
}


class MLP(Module):
    """A feed-forward block; it mixes nothing over time, so its state is None.

    Attributes:
      kind: a key of MLP_KINDS.
      dim: hidden width F.
      use_bias: whether the linear maps have biases.
      out_scale: multiplies the standard deviation of the output's initial weights.
    """

    kind: str
    dim: int
    use_bias: bool = False
    out_scale: float = 1.0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        state: None = None,
        positions: Integer[Array, "B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], None]:
        """Maps each of T tokens by itself; arguments as `models.mixers` says."""
        activation, gated = MLP_KINDS[self.kind]
        common = dict(use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        h = linear(self.dim, ("embed", "mlp"), name="up", **common)(x)
        if gated:
            h = activation(linear(self.dim, ("embed", "mlp"), name="gate", **common)(x)) * h
        else:
            h = activation(h)
        init = scaled_fan_in(self.out_scale)
        y = linear(x.shape[-1], ("mlp", "embed"), name="down", init=init, **common)(h)
        return y, None

    @nn.nowrap
    def init_state(self, batch: int, max_len: int) -> None:
        """Returns None: nothing is carried over time."""
        return None


class Embedding(Module):
    """Token vectors, and the same matrix as a head if it is tied."""

    vocab_size: int
    d_model: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axes: tuple[str, str] = ("vocab", "embed")

    def setup(self) -> None:
        """Makes the table, [V, E]."""
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes)
        shape = (self.vocab_size, self.d_model)
        self.embedding = self.param("embedding", init, shape, self.param_dtype)

    def __call__(self, tokens: Integer[Array, "B T"]) -> Float[Array, "B T E"]:
        """Returns rows of the table; NaN for ids outside [0, V), never a wrong vector."""
        # "fill" counts negative ids from the table's end, and fills beyond it alone.
        tokens = bounded_ids(tokens, self.vocab_size, outside=self.vocab_size)
        rows = jnp.take(self.embedding, tokens, axis=0, mode="fill", fill_value=jnp.nan)
        return rows.astype(self.dtype)

    def logits(self, x: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Returns x times the transposed table, accumulated in float32."""
        table = self.embedding.astype(self.dtype)
        return jnp.einsum("bte,ve->btv", x, table, preferred_element_type=jnp.float32)
