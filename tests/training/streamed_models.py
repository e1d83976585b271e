"""Small language models in float64, and gradients of their losses: for tests of StreamBP."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tilescan.models import LanguageModel, LanguageModelConfig, language_model, layers, positions
from tilescan.training import steps

B, T, V = 2, 13, 17
SMALL = dict(vocab_size=V, d_model=16, n_heads=4, n_kv_heads=2, repeats=2, mlp_dim=24)


class Float64:
    """jax.numpy whose float32 is float64: for modules that compute statistics in float32."""

    float32 = jnp.float64

    def __getattr__(self, name):
        return getattr(jnp, name)


# Those that compute statistics, or sums of a step, in float32.
WIDENED = layers, positions, language_model, steps


def setup(dtype="float64", length=T, packed=False, **options):
    """(model, its parameters, a batch)"""
    config = LanguageModelConfig(**SMALL | {"dtype": dtype, "param_dtype": dtype} | options)
    model, rng = LanguageModel(config), np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, V, (B, length + 1)), jnp.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch["weights"] = jnp.asarray(rng.random((B, length)) * (rng.random((B, length)) < 0.8))
    if packed:
        batch["segment_ids"] = jnp.asarray(segments(length), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch["tokens"])
    # Away from a symmetric start: biases and scales have gradients of their own.
    draw = lambda p: jnp.asarray((p.ndim < 2) + 0.2 * rng.normal(size=p.shape), p.dtype)
    return model, jax.tree.map(draw, nn.unbox(shapes)["params"]), batch


def segments(length):
    """Ids [B, length] of three documents, and of two and padding."""
    parts = lambda *shares: [round(share * length / 13) for share in shares]
    rows = ([1, 2, 3], parts(4, 9, 13)), ([1, 2, 0], parts(7, 10, 13))
    return np.stack([np.repeat(ids, np.diff([0, *ends])) for ids, ends in rows])


def gradient(loss, params, batch):
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)


def largest_error(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    got, want = jax.device_get((got, want))  # differences in NumPy: nothing to compile
    error = lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    return max(jax.tree.leaves(jax.tree.map(error, got, want)))
