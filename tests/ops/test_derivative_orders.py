"""Derivatives beyond one reverse pass are right or refused in words; the definitions have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_op import OPS, arrays

from tilescan import ops
from tilescan.ops import masks, reference

FORWARD = ["decode_attention", "long_convolution", "s4d_step"]
SECOND = FORWARD + [
    *("linear_recurrence", "linear_recurrence, one decay", "short_convolution"),
    *("chunked_cross_entropy", "chunked_log_probabilities"),
    *("diagonal_state_space", "dplr_state_space"),
]

# Seconds to compile, for what the other names show too.
LONG = (
    "decode_attention", "diagonal_state_space", "dplr_state_space", "chunked_cross_entropy",
    "chunked_log_probabilities", "short_convolution", "linear_recurrence, one decay",
    "retention", "ssd", "delta_rule",
)  # fmt: skip
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in OPS]
# Of the long convolution, which is differentiated by JAX, the forward mode is quick.
TWICE = [
    pytest.param(n, marks=pytest.mark.slow if n in (*LONG, "long_convolution") else ()) for n in OPS
]


def _loss(name):
    op = OPS[name]
    x, ids = arrays(op)

    def loss(x):
        floating = [a for a in jax.tree.leaves(op.call(x, ids)) if a.dtype == jnp.float32]
        return sum(jnp.sum(jnp.sin(jnp.where(jnp.isfinite(a), a, 0))) for a in floating)

    return loss, x, arrays(op, seed=1)[0]


def _along(tree, direction):
    return sum(jnp.vdot(tree[name], direction[name]) for name in tree)


def _difference(function, x, direction, step=1e-2):
    function, step = jax.jit(function), np.float32(step)
    moved = lambda t, name: np.asarray(x[name]) + t * np.asarray(direction[name])
    at = lambda t: float(function({name: moved(t, name) for name in x}))
    return (at(step) - at(-step)) / (2 * step)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_right_or_refused_in_words(name):
    loss, x, direction = _loss(name)
    if name in FORWARD:
        slope = jax.jit(lambda x: jax.jvp(loss, (x,), (direction,))[1])(x)
        np.testing.assert_allclose(slope, _difference(loss, x, direction), atol=0.02, rtol=5e-3)
        return
    with pytest.raises(TypeError, match="For jax.jvp, .* use its definition .tilescan.ops.refere"):
        jax.jvp(loss, (x,), (direction,))


@pytest.mark.parametrize("name", TWICE)
def test_a_gradient_of_a_gradient_is_right_or_refused_in_words(name):
    loss, x, direction = _loss(name)
    slope = lambda x: _along(jax.grad(loss)(x), direction)
    if name in SECOND:
        found = jax.jit(lambda x: _along(jax.grad(slope)(x), direction))(x)
        np.testing.assert_allclose(found, _difference(slope, x, direction), atol=0.06, rtol=1e-2)
        return
    with pytest.raises(TypeError, match="For a derivative of its gradient use its definition"):
        jax.eval_shape(jax.grad(slope), x)


def _twice(f):
    return lambda x: jax.lax.scan(lambda carry, _: (f(carry) * carry, None), x, length=2)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
        lambda f, x: jax.hessian(f)(x),
        lambda f, x: jax.linearize(f, x)[1](x),
        lambda f, x: jax.jvp(_twice(f), [x], [x]),
        lambda f, x: jax.jvp(lambda x: jax.vmap(f)(x[None]), [x], [x]),
    ],
    ids=["jit", "hessian", "linearize", "scan", "vmap"],
)  # fmt: skip
def test_the_refusal_reaches_through_transformations(transform):
    f = lambda x: jnp.sum(ops.attention(x, x, x, mask=masks.Causal()))
    with pytest.raises(TypeError, match="this op has a written backward pass"):
        transform(f, jnp.ones((1, 3, 1, 2)))


def test_the_definition_has_the_second_derivatives_that_differences_give():
    q, k, v, along = np.random.default_rng(0).standard_normal((4, 1, 5, 2, 3))
    loss = lambda q: jnp.sum(jnp.sin(reference.attention(q, k, v, mask=masks.Causal())))
    with jax.enable_x64(True):
        k, v = jnp.asarray(k), jnp.asarray(v)
        product = jax.jit(lambda q: jax.jvp(jax.grad(loss), (q,), (jnp.asarray(along),))[1])(q)
        step = 1e-5
        gradient = jax.jit(jax.grad(loss))
        up, down = (np.asarray(gradient(q + sign * step * along)) for sign in (1, -1))
        np.testing.assert_allclose(product, (up - down) / (2 * step), atol=1e-8)
