"""A step on a mesh of eight devices equals the step on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from tiny_training import Rows, TinyModel

from models import LOGICAL_AXES
from training import sharding, steps
from training.config import ConfigError, MeshConfig, OptimizerConfig
from training.optimizers import make_optimizer
from training.train import sharded_init

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=2, tensor=4),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}


def two_steps(mesh, microbatches=1):
    """Two updates on a mesh; returns (state before, gradients of step 1, state, metrics)."""
    tx, rate = make_optimizer(OptimizerConfig(learning_rate=0.01, warmup_steps=0), 10)
    model, rows = TinyModel(), iter(Rows())
    shardings, _, initialise = sharded_init(model, tx, next(iter(Rows())), 0, mesh)
    loss = steps.make_loss(model, "language_model")
    step = steps.make_train_step(loss, tx, rate, microbatches)
    step = jax.jit(step, out_shardings=(shardings, sharding.replicated(mesh)))
    gradients = jax.jit(
        lambda p, b: steps.summed_gradients(loss, p, b, jax.random.key(0), microbatches)[0]
    )
    with sharding.use(mesh):
        before = state = initialise()
        grads = gradients(state.params, sharding.put_batch(next(iter(Rows())), mesh))
        for _ in range(2):
            state, metrics = step(state, sharding.put_batch(next(rows), mesh))
    return before, grads, state, metrics


@pytest.fixture(scope="module")
def single():
    return jax.device_get(two_steps(sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])))


@pytest.mark.parametrize(
    ("name", "microbatches"), [("data", 1), ("fsdp", 1), ("tensor", 1), ("all", 2)]
)
def test_sharded_step_equals_single_device_step(name, microbatches, single):
    got = two_steps(sharding.make_mesh(MESHES[name]), microbatches)
    before, grads, state, metrics = jax.device_get(got)
    jax.tree.map(np.testing.assert_array_equal, before, single[0])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
    jax.tree.map(close, grads, single[1])
    jax.tree.map(close, state, single[2])
    jax.tree.map(close, metrics, single[3])


def test_parameters_and_moments_are_cut_where_the_rules_say():
    tx, _ = make_optimizer(OptimizerConfig(), 1000)
    mesh = sharding.make_mesh(MESHES["all"])
    state = sharded_init(TinyModel(), tx, next(iter(Rows())), 0, mesh)[2]()
    want = {
        "embedding": P("tensor", "fsdp"),
        "up": P("fsdp", "tensor", None),
        "down": P("tensor", "fsdp"),
        "scale": P(None),
    }
    adam = state.opt_state[1]
    for tree in (state.params, adam.mu, adam.nu):
        assert {k: v.sharding.spec for k, v in tree.items()} == want
    assert state.params["down"].addressable_shards[0].data.shape == (16, 8)
    assert adam.count.sharding.is_fully_replicated


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=4))
    assert sharding.spec_of(("embed", "kv_heads", "head_dim"), (16, 1, 8), mesh) == P(
        None, None, None
    )
    assert sharding.spec_of(("embed", "kv_heads", "head_dim"), (16, 4, 8), mesh)[1] == "tensor"
    assert sharding.spec_of(("heads", "mlp"), (8, 8), mesh) == P("tensor", None)  # one axis, once


def test_every_logical_axis_of_the_layers_has_a_rule():
    assert set(LOGICAL_AXES) <= set(sharding.RULES)


def test_an_unknown_logical_axis_is_refused():
    mesh = sharding.make_mesh(MeshConfig())
    with pytest.raises(ValueError, match=r"'embd' is not in .*RULES: batch, .*embed"):
        sharding.spec_of(("embd",), (8,), mesh)


def test_mesh_sizes_must_multiply_to_the_devices():
    with pytest.raises(ValueError, match=r"mesh.tensor=3 multiply to 6, but there are 8 devices"):
        sharding.make_mesh(MeshConfig(data=2, tensor=3))
    with pytest.raises(ValueError, match=r"3 does not divide the 8 devices"):
        sharding.make_mesh(MeshConfig(tensor=3))
    assert dict(sharding.make_mesh(MeshConfig(tensor=2)).shape) == {
        "data": 4, "fsdp": 1, "sequence": 1, "tensor": 2
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"mesh.fsdp = 0 must be at least 1"):
        MeshConfig(fsdp=0)
    with pytest.raises(ConfigError, match=r"mesh.sequence = 2: .*use mesh.data, mesh.fsdp"):
        MeshConfig(sequence=2)


def test_every_device_needs_a_row_of_every_microbatch():
    with pytest.raises(ValueError, match=r"batch_size = 8 must be a multiple of 16: mesh.data"):
        sharding.check_batch(sharding.make_mesh(MESHES["fsdp"]), 8, 2)
    sharding.check_batch(sharding.make_mesh(MESHES["all"]), 8, 2)


def test_boxes_come_off_and_bare_parameters_are_copied():
    mesh = sharding.make_mesh(MeshConfig())
    params = {
        "named": nn.LogicallyPartitioned(jnp.zeros((8, 4)), ("embed", None)),
        "bare": jnp.zeros(3),
    }
    got = sharding.param_shardings(params, mesh)
    assert got["bare"].is_fully_replicated
    assert jax.tree.structure(got) == jax.tree.structure(nn.meta.unbox(params))
