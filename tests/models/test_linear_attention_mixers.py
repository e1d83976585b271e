"""GLA and gated DeltaNet against the layers as they are defined, step by step in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import expit

from tilescan.models.gated_delta_net import GatedDeltaNet
from tilescan.models.gated_linear_attention import GatedLinearAttention

E, T, H = 16, 21, 2
X = np.random.default_rng(0).standard_normal((2, T, E), np.float32)


def params_of(mixer):
    """Random ones: biases and scales away from 0 and 1."""
    shapes = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), jnp.asarray(X))["params"])
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: 0.4 * rng.standard_normal(a.shape).astype(np.float32), shapes)


def silu(x):
    return x * expit(x)


def heads(x, kernel):
    return np.einsum("te,e...->t...", x, kernel.reshape(E, H, -1))


def gated_output(p, x, o, eps=1e-5):
    """W_out (RMSNorm(o) silu(W_g x)) of o [T, H, P]."""
    normed = o / np.sqrt(np.mean(o * o, -1, keepdims=True) + eps) * p["norm"]["scale"]
    y = normed * silu(heads(x, p["gate"]["kernel"]))
    return np.einsum("thp,hpe->te", y, p["out"]["kernel"])


def gla(p, x, normalizer):
    q, k, v = (heads(x, p[name]["kernel"]) for name in ("query", "key", "value"))
    low = x @ p["decay_in"]["kernel"]
    decay = np.einsum("tr,rhd->thd", low, p["decay_out"]["kernel"]) + p["decay_out"]["bias"]
    a = expit(decay) ** (1 / normalizer)
    S, o = np.zeros((H, q.shape[-1], v.shape[-1])), np.zeros(v.shape)
    for t in range(len(x)):
        S = a[t][..., None] * S + k[t][..., None] * v[t][:, None, :]
        o[t] = np.einsum("hdp,hd->hp", S, q[t]) / np.sqrt(q.shape[-1])
    return gated_output(p, x, o)


def gated_delta_net(p, x, largest_beta):
    def convolved(name):
        y, kernel = x @ p[name]["kernel"], p[f"{name}_conv"]["kernel"]
        padded = np.concatenate([np.zeros((len(kernel) - 1, y.shape[1])), y])
        return silu(sum(w * padded[j : j + len(x)] for j, w in enumerate(kernel)))

    q, k, v = (convolved(n).reshape(len(x), H, -1) for n in ("query", "key", "value"))
    q, k = (u / np.sqrt(np.sum(u * u, -1, keepdims=True) + 1e-6) for u in (q, k))
    beta = largest_beta * expit(x @ p["beta"]["kernel"])
    dt = np.logaddexp(0, x @ p["decay"]["kernel"] + p["dt_bias"])
    a = np.exp(-np.exp(p["A_log"]) * dt)
    D = q.shape[-1]
    S, o = np.zeros((H, D, v.shape[-1])), np.zeros(v.shape)
    for t in range(len(x)):
        for h in range(H):
            erase = np.eye(D) - beta[t, h] * np.outer(k[t, h], k[t, h])
            S[h] = a[t, h] * erase @ S[h] + beta[t, h] * np.outer(k[t, h], v[t, h])
            o[t, h] = S[h].T @ q[t, h] / np.sqrt(D)
    return gated_output(p, x, o)


@pytest.mark.parametrize(
    "mixer, definition, setting",
    [
        (GatedLinearAttention(E, n_heads=H, gate_rank=3), gla, 16.0),
        (GatedLinearAttention(E, n_heads=H, gate_rank=3, gate_normalizer=0.5), gla, 0.5),
        (GatedDeltaNet(E, n_heads=H, negative_eigenvalues=True), gated_delta_net, 2.0),
        pytest.param(
            GatedDeltaNet(E, n_heads=H), gated_delta_net, 1.0, marks=pytest.mark.slow
        ),  # the same without the factor of 2
    ],
    ids=["gla", "gla, strong decay", "gated DeltaNet, negative eigenvalues", "gated DeltaNet"],
)
def test_is_its_definition(mixer, definition, setting):
    params = params_of(mixer)
    y, state = jax.jit(mixer.apply)({"params": params}, X)
    assert state is None
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for row in range(2):
        expected = definition(wide, X[row].astype(np.float64), setting)
        np.testing.assert_allclose(y[row], expected, atol=1e-5 * np.abs(expected).max())
