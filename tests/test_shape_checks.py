"""Wrong shapes are caught while tests run, and functions' own errors still come first."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import shape_checks
from jax.sharding import PartitionSpec as P

from tilescan import ops
from tilescan.pallas_kernels import dropout


def test_a_wrong_shape_that_would_pass_unseen_is_caught():
    seed = jnp.zeros((2,), jnp.int32)
    with pytest.raises(jaxtyping.TypeCheckError, match=r"dropout\.seeds"):
        dropout.seeds(seed, 2, 3)
    with pytest.raises(jaxtyping.TypeCheckError, match=r"dropout\.seeds"):
        jax.jit(dropout.seeds, static_argnums=(1, 2))(seed, 2, 3)
    assert dropout.seeds(seed[0], 2, 3).shape == (2, 3)


def test_a_letter_has_one_meaning_within_a_call():
    def outer(x: jaxtyping.Float[jax.Array, "B T"]) -> jaxtyping.Float[jax.Array, "T B"]:
        return x.T if x.shape[0] > 1 else x

    checked = jaxtyping.jaxtyped(outer, typechecker=shape_checks.check)
    assert checked(jnp.zeros((2, 3))).shape == (3, 2)
    with pytest.raises(jaxtyping.TypeCheckError, match="outer"):
        checked(jnp.zeros((1, 3)))


def test_an_op_s_own_error_comes_first():
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="bias"):
        ops.attention(q, q, q, bias=jnp.zeros((1, 3, 4, 4)))


def test_shapes_within_a_shard_are_the_shard_s():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    q = jnp.ones((8, 4, 2, 8))
    gradient = jax.grad(lambda q: ops.attention(q, q, q).sum())
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert jax.jit(sharded)(q).shape == q.shape
