"""Norms, feed-forward kinds and the embedding against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

from tilescan.models.layers import MLP, Embedding, LayerNorm, RMSNorm

X = np.random.default_rng(0).normal(size=(2, 5, 12)) * 3 + 1


def apply(module, x=X):
    """Random parameters, in float64, and what the module makes of x."""
    x32, rng = np.float32(x), np.random.default_rng(1)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x32))["params"]
    draw = lambda p: np.float32((p.ndim == 1) + 0.4 * rng.standard_normal(p.shape))
    params = jax.tree.map(draw, shapes)
    out = jax.jit(module.apply)({"params": params}, x32)
    return jax.tree.map(lambda p: np.asarray(p, np.float64), params), out


def test_rmsnorm():
    p, y = apply(RMSNorm(eps=1e-3))
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-3) * p["scale"]
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_layernorm():
    p, y = apply(LayerNorm(eps=1e-3))
    centered = X - X.mean(-1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(y, expected * p["scale"] + p["bias"], atol=1e-5)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norms_keep_their_statistics_in_float32(norm):
    x = jnp.asarray(X * 1e3 + 1e4, jnp.bfloat16)
    module = norm(dtype=jnp.bfloat16)
    y = module.apply(module.init(jax.random.key(0), x), x)
    exact = norm().apply(norm().init(jax.random.key(0), x), x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def silu(x):
    return x * scipy.special.expit(x)


def gelu(x):
    return x * scipy.special.ndtr(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    "kind,activation,gated",
    [
        ("swiglu", silu, True),
        ("geglu", gelu_tanh, True),
        ("gelu", gelu, False),
        ("gelu_tanh", gelu_tanh, False),
        ("relu", lambda x: np.maximum(x, 0), False),
    ],
)
def test_mlp(kind, activation, gated):
    p, (y, state) = apply(MLP(kind, 20, use_bias=True))
    up = X @ p["up"]["kernel"] + p["up"]["bias"]
    h = activation(X @ p["gate"]["kernel"] + p["gate"]["bias"]) * up if gated else activation(up)
    np.testing.assert_allclose(y, h @ p["down"]["kernel"] + p["down"]["bias"], atol=1e-4)
    assert state is None and ("gate" in p) == gated


def test_embedding_looks_up_and_scores():
    module = Embedding(7, 4)
    tokens = jnp.asarray([[0, 6, 3]])
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), tokens))
    table = params["params"]["embedding"]
    vectors = module.apply(params, tokens)
    np.testing.assert_array_equal(vectors, table[tokens])
    scores = module.apply(params, vectors, method="logits")
    np.testing.assert_allclose(scores, vectors @ table.T, atol=1e-6)
    assert np.isnan(module.apply(params, jnp.asarray([[7]]))).all()
