"""The streamed backward pass on devices that share the sequence, against one device's plain one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from streamed_models import gradient, largest_error, setup
from tiny_training import Rows, hybrid_model, tiny_config

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.stream_bp import in_stream_order, stream_hidden, stream_order
from tilescan.ops import masks
from tilescan.training import sharding, steps, stream_bp
from tilescan.training.collectives import collectives, sent_bytes
from tilescan.training.config import settings
from tilescan.training.optimizers import make_optimizer
from tilescan.training.settings import ConfigError, MeshConfig, OptimizerConfig
from tilescan.training.train import train

SLOW = pytest.mark.slow
MIXERS = {
    "mamba2": {"mixers": {"mamba2": {"head_dim": 8, "state_dim": 8}}},
    "gla": {"mixers": {"gla": {"n_heads": 2, "gate_rank": 2}}},
}
# (devices, chunks, tokens, the model besides)
CASES = {
    "attention": (4, 3, 24, {"packed": True}),
    "attention, 1 chunk": (3, 1, 24, {"packed": True}),
    "zigzag, chunks of 16 and 8": (4, 3, 40, {"packed": True, "sequence_balance": "zigzag"}),
    "local": (
        4,
        3,
        24,
        {
            "pattern": ("local_attention:7", "mlp", "mlp"),
            "qk_norm": True,
            "post_norm": True,
            "attention_bias": True,
            "tie_embeddings": False,
            "packed": True,
        },
    ),
    "ulysses": (4, 3, 24, {"attention_sequence_parallel": "ulysses", "packed": True}),
    "usp, window": (
        4,
        3,
        24,
        {"attention_sequence_parallel": "usp", "pattern": ("local_attention:3", "mlp")},
    ),
    "gather, prefix": (
        3,
        2,
        24,
        {
            "attention_sequence_parallel": "all_gather",
            "mixers": {"attention": {"mask": masks.Causal() | masks.Prefix(10)}},
        },
    ),
    "alibi": (4, 2, 24, {"position": "alibi"}),
    "alibi, both ways": (3, 2, 24, {"position": "alibi", "causal": False}),
    "learned, unrolled": (
        4,
        2,
        24,
        {"position": "learned", "scan_layers": False, "pattern": ("mlp", "attention", "mlp")},
    ),
    "sinks": (
        8,
        3,
        48,
        {"pattern": ("local_attention:3", "mlp"), "mixers": {"local_attention": {"sinks": 2}}},
    ),
    "layout": (
        3,
        2,
        24,
        {
            "mixers": {
                "attention": {"mask": masks.Causal() & masks.BlockSparse(np.eye(6, dtype=bool), 4)}
            }
        },
    ),
    "mamba2": (4, 3, 24, {"pattern": ("mamba2", "mlp"), "packed": True, **MIXERS["mamba2"]}),
    "gla": (3, 2, 24, {"pattern": ("gla", "mlp"), "packed": True, **MIXERS["gla"]}),
    "hybrid": (
        4,
        2,
        16,
        {"pattern": ("gla", "attention"), "packed": True, "repeats": 1, **MIXERS["gla"]},
    ),
    "hybrid with mlp": (
        4,
        3,
        24,
        {"pattern": ("mlp", "mamba2", "mlp", "attention", "mlp"), **MIXERS["mamba2"]},
    ),
}


def mesh_of(n, **axes):
    config = MeshConfig(**{"data": 1, "sequence": n} | axes)
    return sharding.make_mesh(config, jax.devices()[: n * int(np.prod(list(axes.values())))])


def on_devices(mesh, loss, params, batch, balance="contiguous"):
    """(loss, sums), gradients of a batch that the devices share."""
    batch = sharding.put_batch(jax.device_get(batch), mesh, balance)
    with sharding.use(mesh):
        params = jax.device_put(params, sharding.replicated(mesh))
        return jax.device_get(gradient(loss, params, batch))


@SLOW
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_gradient_of_the_model(name, float64):
    devices, chunks, length, options = CASES[name]
    model, params, batch = setup(length=length, **options)
    (value, sums), want = gradient(steps.make_loss(model, "language_model"), params, batch)
    loss = stream_bp.stream_loss(model, chunks=chunks, logit_chunk=5)
    balance = model.config.sequence_balance
    (streamed, ours), got = on_devices(mesh_of(devices), loss, params, batch, balance)
    np.testing.assert_allclose(streamed, value, rtol=1e-12)
    for key in sums:
        np.testing.assert_allclose(ours[key], sums[key], rtol=1e-11, err_msg=key)
    assert largest_error(got, want) < 1e-10


@SLOW
def test_an_update_is_that_of_one_device(float64):
    """AdamW's, of microbatches of packed documents, on a mesh that cuts all there is to cut."""
    model, params, batch = setup(length=24, packed=True, pattern=("attention", "mlp", "mamba2"),
                                 repeats=1, **MIXERS["mamba2"])  # fmt: skip
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x[::-1]]), batch)
    tx, rate = make_optimizer(OptimizerConfig(warmup_steps=0, eps=1e-3), 10)
    state = steps.TrainState(
        jnp.zeros([], jnp.int32), params, tx.init(params), jax.random.key_data(jax.random.key(0))
    )

    def update(loss, state, batch):
        return jax.device_get(jax.jit(steps.make_train_step(loss, tx, rate, 2))(state, batch))

    want, metrics = update(steps.make_loss(model, "language_model"), state, batch)
    mesh = mesh_of(2, fsdp=2, tensor=2)
    with sharding.use(mesh):
        shared = sharding.put_batch(jax.device_get(batch), mesh)
        state = jax.device_put(state, sharding.replicated(mesh))
        got, ours = update(stream_bp.stream_loss(model, chunks=3, logit_chunk=5), state, shared)
    for name in metrics:
        np.testing.assert_allclose(ours[name], metrics[name], rtol=1e-10, err_msg=name)
    moved = lambda s: jax.tree.map(lambda a, b: a - np.asarray(b), s.params, params)
    assert largest_error(moved(got), moved(want)) < 1e-9
    assert largest_error(got.opt_state[1].mu, want.opt_state[1].mu) < 1e-10


@SLOW
def test_vectors_come_back_in_the_order_of_the_tokens(float64):
    model, params, batch = setup(length=40, packed=True, sequence_balance="zigzag", repeats=1)
    want = model.apply({"params": params}, batch["tokens"], method="hidden",
                       segment_ids=batch["segment_ids"])[0]  # fmt: skip
    mesh = mesh_of(4)
    shared = sharding.put_batch(jax.device_get(batch), mesh, "zigzag")
    inputs = {k: shared[k] for k in ("tokens", "positions", "segment_ids")}
    with sharding.use(mesh):
        got = jax.jit(lambda p, i: stream_hidden(model, p, **i, chunks=3))(params, inputs)
        moved = stream_order(model.config, 40, 3)
        order = jax.jit(lambda i: in_stream_order(model.config, i, 3))(inputs)["tokens"]
    zigzag = sharding.in_order(jax.device_get(batch), mesh, "zigzag")
    np.testing.assert_array_equal(order, zigzag["tokens"][:, moved])
    back = sharding.in_order({"tokens": np.asarray(want)}, mesh, "zigzag")["tokens"]
    np.testing.assert_allclose(got, back, rtol=0, atol=1e-12)


@SLOW
def test_a_run_has_the_losses_of_one_device(tmp_path, monkeypatch):
    make_mesh, found = sharding.make_mesh, {}
    for n, cut in (1, ()), (4, ("mesh.sequence=4", "train.stream_chunks=2")):
        monkeypatch.setattr(sharding, "make_mesh", lambda c, n=n: make_mesh(c, jax.devices()[:n]))
        config = tiny_config("train.steps=6", "train.eval_every=3", *cut)
        datasets = {"train": Rows(), "validation": [next(iter(Rows()))]}
        train(config, tmp_path / str(n), model=hybrid_model(), datasets=datasets)
        rows = map(json.loads, (tmp_path / str(n) / "metrics.jsonl").read_text().splitlines())
        found[n] = [(r["split"], r["step"], r["loss"]) for r in rows if "loss" in r]
    assert [r[:2] for r in found[4]] == [r[:2] for r in found[1]]
    assert {"train", "validation"} == {r[0] for r in found[1]}
    np.testing.assert_allclose([r[2] for r in found[4]], [r[2] for r in found[1]], rtol=2e-5)


def compiled(chunks, devices=4, length=16384, **options):
    """The gradient of a model as long as its activations are most of its memory, compiled.

    In one of half the length and width the tiles of attention are.
    """
    fields = dict(vocab_size=512, d_model=256, n_heads=4, n_kv_heads=1, repeats=4, remat="full")
    model = LanguageModel(LanguageModelConfig(**fields | options))
    mesh = mesh_of(devices)
    everywhere = sharding.replicated(mesh)
    time = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    row = lambda dtype: jax.ShapeDtypeStruct((1, length), dtype, sharding=time)
    batch = {"tokens": row(jnp.int32), "targets": row(jnp.int32), "weights": row(jnp.float32)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    place = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere)
    loss = stream_bp.stream_loss(model, chunks=chunks, logit_chunk=128)
    with sharding.use(mesh):
        step = jax.jit(jax.grad(loss, has_aux=True), out_shardings=(everywhere, None))
        return step.lower(jax.tree.map(place, nn.unbox(shapes)["params"]), batch).compile()


@SLOW
def test_devices_hold_less_and_send_what_the_docstring_says():
    """Less than remat="full" on the same devices; parameters once, keys 5 / 2 times."""
    whole, streamed = compiled(None), compiled(4)
    temp = lambda program: program.memory_analysis().temp_size_in_bytes
    assert temp(streamed) < 0.5 * temp(whole)
    sent = [sent_bytes(collectives(c.as_text())) for c in (whole, streamed)]
    assert sent[1]["all-reduce"] <= 1.01 * sent[0]["all-reduce"]
    assert sent[1]["all-gather"] < 2**20  # tokens and what belongs to them, no vectors
    assert sent[1]["collective-permute"] == pytest.approx(2.5 * sent[0]["collective-permute"], 0.01)


def test_what_cannot_be_shared_is_named():
    with pytest.raises(ConfigError, match="'ring_self_attention' holds rows .*; use 'ring', 'all"):
        settings(tiny_config("train.stream_chunks=2", "mesh.sequence=4",
                             "model.attention_sequence_parallel=ring_self_attention"))  # fmt: skip
    with pytest.raises(ConfigError, match="'s4' in pattern is bidirectional"):
        config = tiny_config("train.stream_chunks=2")
        config.model.pattern, config.model.mixers.s4.bidirectional = ("s4",), True
        settings(config)
    settings(tiny_config("train.stream_chunks=2", "mesh.sequence=4", "data.seq_len=16",
                         "model.sequence_balance=zigzag"))  # fmt: skip
    model, params, batch = setup(dtype="float32", length=24, sequence_balance="zigzag")
    with sharding.use(mesh_of(4)):
        with pytest.raises(ValueError, match="'zigzag' needs positions"):
            stream_hidden(model, params, batch["tokens"], chunks=2)
        with pytest.raises(ValueError, match="in_order=True needs positions"):
            stream_hidden(model, params, batch["tokens"], chunks=2, in_order=True)
        with pytest.raises(ValueError, match="22 tokens are not a multiple of 8"):
            stream_hidden(model, params, batch["tokens"][:, :22], chunks=2)
