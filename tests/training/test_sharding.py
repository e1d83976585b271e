"""A step on a mesh of eight devices equals the step on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from tiny_training import Rows, TinyModel

from tilescan.models import LOGICAL_AXES, LanguageModel, LanguageModelConfig
from tilescan.ops.sequence_parallel import layouts
from tilescan.training import sharding, steps
from tilescan.training.config import default_config, settings
from tilescan.training.optimizers import make_optimizer, path_name
from tilescan.training.settings import ConfigError, MeshConfig, OptimizerConfig
from tilescan.training.stream_bp import stream_loss
from tilescan.training.train import sharded_init

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=2, tensor=4),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}


# What a model is besides, and the mesh that it is cut over.
LANGUAGE_MODELS = {
    "grouped": ("all", dict(n_heads=4, n_kv_heads=2, norm="layernorm")),
    "alibi": ("tensor", dict(n_heads=8, n_kv_heads=2, position="alibi", norm="layernorm")),
    "recurrent": (
        "all",
        dict(
            repeats=1,
            pattern=("mamba2", "mlp", "mamba"),
            mixers=dict(mamba2=dict(head_dim=4, state_dim=4), mamba=dict(state_dim=4)),
        ),
    ),
}


def language_model(**fields):
    fields = dict(vocab_size=32, d_model=16, repeats=2, mlp_dim=32) | fields
    return LanguageModel(LanguageModelConfig(**fields))


WIDE = dict(dtype="float64", param_dtype="float64")  # with the fixture `float64`


class PackedRows(Rows):
    """Rows of three documents each, then padding."""

    def __iter__(self):
        return PackedRows(self.batch_size, self.seq_len)

    def __next__(self):
        batch = super().__next__()
        rng = np.random.default_rng(self.index)
        ends = np.sort(rng.integers(1, self.seq_len, (self.batch_size, 3)), axis=1)
        index = np.arange(self.seq_len)[None, None]
        ids = 1 + (index >= ends[:, :, None]).sum(1).astype(np.int32)
        return batch | {"segment_ids": np.where(ids > 3, 0, ids)}


def two_steps(
    mesh, microbatches=1, model=None, before=None, rows=Rows, balance="contiguous", loss=None,
    rules=sharding.RULES,
):  # fmt: skip
    """Two updates on a mesh, from its own parameters or those given.

    Returns:
        (state before, gradients of the first step, clipped, state after, metrics of the second).
    """
    # A larger eps than usual: Adam would make rounding of the smallest gradients a matter of signs.
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=0, eps=1e-3)
    tx, rate = make_optimizer(config, 10)
    model, rows = model or TinyModel(), iter(rows())
    put = functools.partial(sharding.put_batch, mesh=mesh, balance=balance)
    example = sharding.in_order(next(iter(rows)), mesh, balance)
    shardings, _, initialize = sharded_init(model, tx, example, 0, mesh, rules)
    loss = loss or steps.make_loss(model, "language_model")
    train_step = steps.make_train_step(loss, tx, rate, microbatches)

    step = jax.jit(train_step, out_shardings=(shardings, sharding.replicated(mesh)))
    before = initialize() if before is None else jax.device_put(before, shardings)
    with sharding.use(mesh):
        middle, first = step(before, put(next(rows)))
        after, metrics = step(middle, put(next(rows)))
    # Sums over the tokens, from the first moment, which begins at 0.
    moment, factor = jax.device_get(middle.opt_state[1].mu), float(first["weight"])
    grads = jax.tree.map(lambda mu: mu * factor / (1 - config.b1), moment)
    return jax.device_get(before), grads, after, metrics


def assert_same(got, want, tolerance=1e-5):
    """Equal but for rounding, float32's at first, relative to an array's largest element."""

    def close(x, y, name):
        np.testing.assert_allclose(
            x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 0.1), err_msg=name
        )

    names = ("initial parameters", "gradients", "state", "metrics")
    for name, a, b in zip(names, jax.device_get(got), jax.device_get(want), strict=True):
        jax.tree.map(functools.partial(close, name=name), a, b)


def single_device():
    return sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def single():
    return two_steps(single_device())


@pytest.mark.parametrize(
    ("name", "microbatches"),
    [*(pytest.param(n, 1, marks=pytest.mark.slow) for n in ("data", "fsdp", "tensor")), ("all", 2)],
)
def test_sharded_step_equals_single_device_step(name, microbatches, single):
    assert_same(two_steps(sharding.make_mesh(MESHES[name]), microbatches), single)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("grouped", marks=pytest.mark.slow),
        pytest.param("alibi", marks=pytest.mark.slow),
        pytest.param("recurrent", marks=pytest.mark.slow),
    ],
)
def test_sharded_language_model_equals_the_one_on_a_single_device(name):
    """Packed documents, and heads that the mesh divides or not."""
    mesh, fields = LANGUAGE_MODELS[name]
    model = language_model(**fields)
    want = two_steps(single_device(), model=model, rows=PackedRows)
    mesh = sharding.make_mesh(MESHES[mesh])
    got = two_steps(mesh, model=model, before=want[0], rows=PackedRows)
    assert_same(got, want)
    specs = {
        path_name(path): x.sharding.spec for path, x in jax.tree.leaves_with_path(got[2].params)
    }
    (up,) = (spec for name, spec in specs.items() if name.endswith("up/kernel"))
    fsdp = "fsdp" if mesh.shape["fsdp"] > 1 else None
    assert up == P(None, fsdp, "tensor")  # layers, embed, mlp


# The way to split time, the order of tokens, the model besides, and the mesh. In the quick suite
# models/test_sequence_cells.py has the loss and gradients of such a model.
SEQUENCES = [
    pytest.param(
        "ulysses", "zigzag", dict(n_heads=4, n_kv_heads=2, pattern=("attention",), repeats=1),
        MeshConfig(data=4, sequence=2), marks=pytest.mark.slow,
    ),
    pytest.param(
        "ring", "zigzag", dict(n_heads=4, n_kv_heads=2), MeshConfig(data=4, sequence=2),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "ring", "zigzag", dict(n_heads=4, n_kv_heads=2), MeshConfig(data=2, sequence=4),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "ulysses", "striped", dict(n_heads=4), MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "usp", "striped", dict(pattern=("local_attention:5", "mlp"), n_heads=4),
        MeshConfig(data=1, sequence=8), marks=pytest.mark.slow,
    ),
    pytest.param(
        "all_gather", "contiguous", dict(n_heads=4, position="alibi"),
        MeshConfig(data=1, sequence=8), marks=pytest.mark.slow,
    ),
    pytest.param(
        "ring_self_attention", "zigzag", dict(n_heads=4, position="learned"),
        MeshConfig(data=2, sequence=4), marks=pytest.mark.slow,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "balance", "fields", "mesh"), SEQUENCES)
def test_a_step_with_time_cut_equals_the_one_on_a_single_device(kind, balance, fields, mesh):
    """Two updates of packed documents: values, gradients and moments."""
    rows = functools.partial(PackedRows, 8, 16)
    order = dict(attention_sequence_parallel=kind, sequence_balance=balance)
    model = language_model(**order, **fields)
    want = two_steps(single_device(), model=model, rows=rows)
    mesh = sharding.make_mesh(mesh)
    got = two_steps(mesh, model=model, before=want[0], rows=rows, balance=balance)
    assert_same(got, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "parts", "fields"),
    [
        (
            MeshConfig(data=2, sequence=4),
            dict(chunks=None, logit_chunk=3),
            dict(sequence_balance="zigzag"),
        ),
        (
            MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
            dict(chunks=None, logit_chunk=4),
            dict(tie_embeddings=False),
        ),
        (MeshConfig(data=2, fsdp=2, tensor=2), dict(chunks=3, logit_chunk=4), dict()),
    ],
)
def test_losses_by_parts_of_the_sequence_on_a_mesh(mesh, parts, fields, float64):
    """Logits by chunks on devices that share time; layers by chunks on devices that share rows."""
    model = language_model(n_heads=4, n_kv_heads=2, **WIDE, **fields)
    rows, loss = functools.partial(PackedRows, 8, 16), stream_loss(model, **parts)
    want = two_steps(single_device(), model=model, rows=rows)
    balance = model.config.sequence_balance
    mesh = sharding.make_mesh(mesh)
    got = two_steps(mesh, model=model, before=want[0], rows=rows, balance=balance, loss=loss)
    assert_same(got, want, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [None, dict(chunks=2, logit_chunk=2)], ids=["whole", "streamed"])
def test_parameters_cut_over_the_sequence_too(parts, float64):
    """ZeRO-3 over rows and time: the same numbers, an eighth of the parameters on a device."""
    config = MeshConfig(data=1, fsdp=2, sequence=4, parameters_over_sequence=True)
    model = language_model(n_heads=4, attention_sequence_parallel="ulysses", **WIDE)
    rows = functools.partial(PackedRows, 8, 16)
    want = two_steps(single_device(), model=model, rows=rows)
    mesh, rules = sharding.make_mesh(config), sharding.rules(config)
    options = {} if parts is None else dict(loss=stream_loss(model, **parts))
    got = two_steps(mesh, model=model, before=want[0], rows=rows, rules=rules, **options)
    assert_same(got, want, 1e-10)
    specs = {path_name(p): x.sharding.spec for p, x in jax.tree.leaves_with_path(got[2].params)}
    assert specs["backbone/embed/embedding"] == P(None, ("fsdp", "sequence"))


def test_tokens_are_dealt_in_the_order_of_the_balance():
    mesh = sharding.make_mesh(MeshConfig(data=2, sequence=4))
    batch = next(iter(PackedRows(4, 16)))
    put = sharding.put_batch(batch, mesh, "zigzag")
    assert all(x.sharding.spec == P(("data", "fsdp"), "sequence") for x in put.values())
    first = put["tokens"].addressable_shards[0].data
    np.testing.assert_array_equal(first, batch["tokens"][:2, [0, 1, 14, 15]])
    ids, positions = put["segment_ids"], put["positions"]
    order = layouts.order(16, 4, "zigzag")
    for row, where in zip(np.asarray(ids), np.asarray(positions), strict=True):
        for segment in set(row):
            at = np.sort(order[row == segment])
            runs = np.split(at, np.flatnonzero(np.diff(at) != 1) + 1)
            want = np.concatenate([np.arange(len(run)) for run in runs])
            np.testing.assert_array_equal(where[np.argsort(order)][at], want)
    with pytest.raises(ValueError, match="pad the sequence to 24"):
        sharding.put_batch(next(iter(PackedRows(4, 20))), mesh, "zigzag")


def test_a_model_whose_tokens_are_moved_asks_for_positions():
    model = language_model(sequence_balance="zigzag")
    tokens = jnp.zeros((2, 16), jnp.int32)
    with (
        sharding.use(sharding.make_mesh(MeshConfig(data=2, sequence=4))),
        pytest.raises(ValueError, match="'zigzag' needs positions"),
    ):
        jax.eval_shape(model.init, jax.random.key(0), tokens)


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
    config = default_config()
    config.mesh.sequence, config.data.seq_len = 3, 256
    with pytest.raises(ConfigError, match=r"256 tokens are not a multiple of 3; pad .* to 258"):
        settings(config)


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
