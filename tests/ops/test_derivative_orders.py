"""Derivatives beyond the first reverse pass are refused in words; the definitions have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan import ops
from tilescan.ops import masks, reference

B, T, H, D = 1, 5, 2, 3
CASES = {
    "attention": lambda x: ops.attention(x, x, x, mask=masks.Causal()),
    "ssd": lambda x: ops.ssd(x, x[..., 0], -jnp.ones(H), x[:, :, :1], x[:, :, :1])[0],
    "gated_linear_attention": lambda x: ops.gated_linear_attention(x, x, x, -(x[..., 0] ** 2))[0],
    "delta_rule": lambda x: ops.delta_rule(x, x, x, x[..., 0])[0],
    "selective_scan": lambda x: ops.selective_scan(
        x[:, :, 0], x[:, :, 0], -jnp.ones((D, 2)), jnp.ones((B, T, 2)), jnp.ones((B, T, 2))
    )[0],
}


@pytest.mark.parametrize("name", CASES)
def test_a_second_reverse_pass_is_refused_in_words(name):
    loss = lambda x: jnp.sum(CASES[name](x) ** 2)
    twice = jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))
    with pytest.raises(TypeError, match="first order in reverse mode.*tilescan.ops.reference"):
        jax.eval_shape(twice, jnp.ones((B, T, H, D)))


def test_the_definition_has_the_second_derivatives_that_differences_give():
    q, k, v = jax.random.normal(jax.random.key(0), (3, B, T, H, D))
    loss = lambda q: jnp.sum(jnp.sin(reference.attention(q, k, v, mask=masks.Causal())))
    along = jax.random.normal(jax.random.key(1), q.shape)
    with jax.enable_x64(True):
        q, k, v, along = (jnp.asarray(np.asarray(a), jnp.float64) for a in (q, k, v, along))
        product = jax.jvp(jax.grad(loss), (q,), (along,))[1]
        step = 1e-5
        up, down = (jax.grad(loss)(q + sign * step * along) for sign in (1, -1))
        np.testing.assert_allclose(product, (up - down) / (2 * step), atol=1e-8)
