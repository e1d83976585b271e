"""The streamed backward pass against jax.grad of the model itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from streamed_models import SMALL, B, T, gradient, largest_error, setup

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.stream_bp import stream_hidden
from tilescan.ops import masks
from tilescan.training import steps, stream_bp
from tilescan.training.optimizers import make_optimizer
from tilescan.training.settings import OptimizerConfig

MODELS = {
    "packed": {"packed": True},
    "a window": {"pattern": ("local_attention:4", "mlp"), "tie_embeddings": False},
    "windows": {
        "pattern": ("local_attention:4", "mlp"),
        "qk_norm": True,
        "post_norm": True,
        "attention_bias": True,
        "tie_embeddings": False,
    },
    "learned, unrolled": {
        "position": "learned",
        "scan_layers": False,
        "pattern": ("mlp", "attention", "mlp"),
        "embed_scale": 4.0,
        "logit_cap": 6.0,
    },
    "sinks": {
        "pattern": ("local_attention:3", "mlp"),
        "mixers": {"local_attention": {"sinks": 2}},
    },
    "prefix": {
        "mixers": {"attention": {"mask": masks.Causal() | masks.Prefix(5)}},
        "position": "alibi",
    },
    "both ways": {"causal": False, "position": "rope_interleaved", "packed": True},
    "layout": {
        "mixers": {
            "attention": {"mask": masks.Causal() & masks.BlockSparse(np.eye(4, dtype=bool), 4)}
        },
        "position": "alibi",
        "attention_logit_cap": 5.0,
        "norm": "layernorm",
    },
    "mamba": {"pattern": ("mamba", "mlp"), "packed": True},
    "hybrid": {"pattern": ("gla", "attention", "mlp"), "packed": True, "repeats": 1},
}


# Each is two programs, half a minute of compiling in all: these stand for the others.
QUICK = ("a window",)
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else SLOW) for n in MODELS]
)
def test_it_is_the_gradient_of_the_model(name, float64):
    """To 1e-10 in float64, though 13 tokens are no multiple of 2 chunks."""
    model, params, batch = setup(**MODELS[name])
    (value, sums), want = gradient(steps.make_loss(model, "language_model"), params, batch)
    loss = stream_bp.stream_loss(model, chunks=2, logit_chunk=5)
    (streamed, ours), got = gradient(loss, params, batch)
    np.testing.assert_allclose(streamed, value, rtol=1e-12)
    assert set(ours) == set(sums)
    for key in sums:
        np.testing.assert_allclose(ours[key], sums[key], rtol=1e-11, err_msg=key)
    assert largest_error(got, want) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gated_deltanet", "h3", "mamba2", "s4", "s4d"])
def test_states_carry_gradients_from_chunk_to_chunk(mixer, float64):
    options = {"mixers": {"mamba2": {"head_dim": 8, "state_dim": 8}}} if mixer == "mamba2" else {}
    model, params, batch = setup(pattern=(mixer, "mlp"), repeats=1, length=12, **options)
    (_, _), want = gradient(steps.make_loss(model, "language_model"), params, batch)
    (_, _), got = gradient(stream_bp.stream_loss(model, chunks=3), params, batch)
    assert largest_error(got, want) < 1e-10


@pytest.mark.slow
def test_the_number_of_chunks_does_not_matter(float64):
    """One chunk is checkpointing; more change the last bits alone; all are the loss's slope."""
    model, params, batch = setup(packed=True, repeats=1)
    checkpointed = LanguageModel(dataclasses.replace(model.config, remat="full"))
    plain = gradient(stream_bp.stream_loss(checkpointed, chunks=None), params, batch)[1]
    one = gradient(stream_bp.stream_loss(model, chunks=1), params, batch)[1]
    assert largest_error(one, plain) < 1e-13
    loss = jax.jit(jax.value_and_grad(stream_bp.stream_loss(model, chunks=3), has_aux=True))
    grads = loss(params, batch)[1]
    assert largest_error(grads, plain) < 1e-12
    rng = np.random.default_rng(1)
    way = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    value = lambda h: loss(jax.tree.map(lambda p, d: p + h * d, params, way), batch)[0][0]
    along = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, way)), strict=True))
    assert float(along) == pytest.approx(float(value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-5)


@pytest.mark.slow
def test_bfloat16_gradients_are_summed_in_float32():
    """Their errors are of single products, and do not grow with the number of chunks."""
    model, params, batch = setup(dtype="float32", repeats=1)
    narrow = LanguageModel(dataclasses.replace(model.config, dtype="bfloat16"))
    exact = gradient(steps.make_loss(model, "language_model"), params, batch)[1]
    got = gradient(stream_bp.stream_loss(narrow, chunks=3), params, batch)[1]
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(got))
    ratio = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    error = max(jax.tree.leaves(jax.tree.map(ratio, got, exact)))
    assert 1e-3 < error < 2e-2, error


@pytest.mark.slow
def test_preference_losses_stream_too(float64):
    model, params, batch = setup(logit_scale=0.5, tie_embeddings=False, repeats=1)
    rng = np.random.default_rng(2)
    given = lambda: jnp.asarray(-3 + 0.3 * rng.normal(size=(B, T)))
    batch |= {"old_log_probs": given(), "reference_log_probs": given()}
    batch["advantages"] = jnp.asarray([1.0, -1.0])

    def both(chunks, logit_chunk):
        options = dict(chunks=chunks, logit_chunk=logit_chunk)
        grpo = stream_bp.stream_grpo_loss(model, kl_weight=0.1, temperature=0.8, **options)
        dpo = stream_bp.stream_dpo_loss(model, **options)
        return lambda p, b: (grpo(p, b)[0] + dpo(p, b)[0], ())

    want = gradient(both(None, 100), params, batch)[1]
    assert largest_error(gradient(both(2, 4), params, batch)[1], want) < 1e-10
    log_p = stream_bp.log_probabilities(model, params, batch, logit_chunk=4)
    logits = model.apply({"params": params}, batch["tokens"])[0]
    want = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(log_p, want, rtol=1e-10)


@pytest.mark.slow
def test_it_takes_the_place_of_the_loss_in_a_training_step():
    model, params, batch = setup(dtype="float32", repeats=1)
    tx, rate = make_optimizer(OptimizerConfig(warmup_steps=0), 10)
    state = steps.TrainState(
        jnp.zeros([], jnp.int32), params, tx.init(params), jax.random.key_data(jax.random.key(0))
    )
    run = lambda loss: jax.jit(steps.make_train_step(loss, tx, rate, 2))(state, batch)
    plain, metrics = run(steps.make_loss(model, "language_model"))
    streamed, ours = run(stream_bp.stream_loss(model, chunks=2))
    for name in metrics:
        np.testing.assert_allclose(ours[name], metrics[name], rtol=1e-4, err_msg=name)
    moved = lambda s: jax.tree.map(jnp.subtract, s.params, params)
    ratio = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    errors = jax.tree.map(ratio, moved(streamed), moved(plain))
    assert max(jax.tree.leaves(errors)) < 1e-2  # Adam divides tiny gradients by themselves


@pytest.mark.slow
def test_memory_falls_with_the_number_of_chunks():
    """Activations of a wide MLP: nearly all of what checkpointing holds at this size."""
    options = {"pattern": ("local_attention:16", "mlp"), "mlp_dim": 512, "remat": "full"}
    model, length = LanguageModel(LanguageModelConfig(**SMALL | options)), 2048
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, length), jnp.float32)
    batch = {"tokens": tokens, "targets": tokens, "weights": weights}
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    params = nn.unbox(params)["params"]

    def temp_bytes(chunks):
        loss = stream_bp.stream_loss(model, chunks=chunks)
        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp_bytes(4) < 0.4 * temp_bytes(None)


def test_what_cannot_be_streamed_is_named():
    model, params, batch = setup(dtype="float32", repeats=1)
    with pytest.raises(ValueError, match="chunks=0 must be at least 1"):
        stream_hidden(model, params, batch["tokens"], chunks=0)
    both = {"pattern": ("s4",), "mixers": {"s4": {"bidirectional": True}}}
    model, params, batch = setup(dtype="float32", repeats=1, **both)
    with pytest.raises(ValueError, match="'s4' in pattern is bidirectional"):
        stream_hidden(model, params, batch["tokens"], chunks=2)
    with pytest.raises(ValueError, match="positions must be"):
        stream_hidden(*setup(dtype="float32")[:2], batch["tokens"], chunks=2,
                      positions=jnp.zeros((1, 1), jnp.int32))  # fmt: skip
