"""The loss against float64, microbatches against the whole batch, metrics against definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_training import Rows, TinyModel

from tilescan.training import steps
from tilescan.training.optimizers import make_optimizer
from tilescan.training.settings import OptimizerConfig


def batch(**fields):
    return {k: jnp.asarray(v) for k, v in next(Rows()).items()} | fields


@functools.cache
def start(dropout=0.0, clip_norm=1.0):
    """A state, and the loss and the optimizer of its model."""
    config = OptimizerConfig(warmup_steps=0, schedule="constant", clip_norm=clip_norm)
    tx, rate = make_optimizer(config, 10)
    return first_state(), steps.make_loss(TinyModel(dropout), "language_model"), tx, rate


@functools.cache
def first_state():
    """The same for every dropout and norm."""
    tx, _ = make_optimizer(OptimizerConfig(warmup_steps=0, schedule="constant"), 10)

    @jax.jit
    def init():
        state = steps.init_state(TinyModel(), tx, batch(), 0)
        return state.replace(params=nn.meta.unbox(state.params))

    return init()


@functools.cache
def train_step(parts=1, **options):
    """The update of `start(**options)`, in so many parts of a batch."""
    _, loss, tx, rate = start(**options)
    return jax.jit(steps.make_train_step(loss, tx, rate, parts))


@functools.cache
def gradient(**options):
    """The gradient of the loss of `start(**options)`."""
    return jax.jit(jax.grad(start(**options)[1], has_aux=True))


cross_entropy = jax.jit(steps.cross_entropy, static_argnames="z_loss")


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_is_its_definition(z_loss):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 7)) * 30
    targets, weights = rng.integers(0, 7, (3, 5)), rng.random((3, 5))
    got = cross_entropy(
        jnp.float32(logits), jnp.int32(targets), jnp.float32(weights), z_loss=z_loss
    )
    z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    nll = z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert float(got["nll"]) == pytest.approx((weights * nll).sum(), rel=1e-5)
    assert float(got["loss"]) == pytest.approx((weights * (nll + z_loss * z**2)).sum(), rel=1e-5)
    assert float(got["correct"]) == pytest.approx(
        (weights * (logits.argmax(-1) == targets)).sum(), rel=1e-5
    )
    assert float(got["weight"]) == pytest.approx(weights.sum(), rel=1e-6)


def test_exact_rows_are_those_without_a_weighted_mistake():
    targets = np.array([[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]])
    guesses = np.eye(3, dtype=np.float32)[[[0, 1, 2], [1, 1, 2], [1, 1, 2], [1, 0, 0]]]
    weights = np.array([[1, 1, 0.5], [0, 1, 1], [1, 1, 1], [0, 0, 0]])
    got = cross_entropy(guesses, targets, weights)
    assert float(got["exact"]) == 2 and float(got["rows"]) == 3
    classes = cross_entropy(guesses[:, 0], targets[:, 0], weights[:, 0])
    assert float(classes["exact"]) == 1 and float(classes["rows"]) == 2


def test_loss_of_bfloat16_logits_is_computed_in_float32():
    logits = jnp.linspace(-3, 3, 64, dtype=jnp.bfloat16).reshape(1, 64)
    got = cross_entropy(logits, jnp.array([5]), jnp.ones(1))
    want = -jax.nn.log_softmax(np.asarray(logits, np.float32))[0, 5]
    assert got["loss"].dtype == jnp.float32
    assert float(got["loss"]) == pytest.approx(float(want), rel=1e-6)


def test_targets_of_weight_zero_change_nothing():
    state, rows = start()[0], batch()
    other = rows | {"targets": np.where(rows["weights"] > 0, rows["targets"], 1)}
    a, b = (gradient()(state.params, r, None) for r in (rows, other))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("parts", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_microbatches_equal_the_full_batch(parts):
    """Rows have different weights, so that a mean of means would be wrong."""
    state, rows = start()[0], batch()
    rows["weights"] = rows["weights"] * np.arange(8, dtype=np.float32)[:, None]
    one, metrics_one = train_step()(state, rows)
    many, metrics_many = train_step(parts)(state, rows)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)
    jax.tree.map(close, metrics_one, metrics_many)
    jax.tree.map(close, one.params, many.params)
    jax.tree.map(close, one.opt_state, many.opt_state)


def test_metrics_are_what_they_say():
    state, rows = start(clip_norm=1e-3)[0], batch()
    new, metrics = train_step(clip_norm=1e-3)(state, rows)
    grads, sums = gradient()(state.params, rows, None)
    grads = jax.tree.map(lambda g: np.float64(g) / sums["weight"], grads)
    moved = jax.tree.map(lambda x, y: np.float64(x) - y, new.params, state.params)
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
    assert float(metrics["loss"]) == pytest.approx(float(sums["loss"] / sums["weight"]), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(norm(grads), rel=1e-5)
    assert float(metrics["grad_norm"]) > 1e-3, "the norm is the one before clipping"
    assert float(metrics["update_norm"]) == pytest.approx(norm(moved), rel=1e-3)
    assert float(metrics["learning_rate"]) == pytest.approx(3e-4)
    assert int(new.step) == 1


def test_nothing_to_predict_is_a_step_of_decay_alone():
    _, metrics = train_step()(start()[0], batch(weights=jnp.zeros((8, 12))))
    assert float(metrics["loss"]) == 0.0 and float(metrics["grad_norm"]) == 0.0


def test_dropout_differs_from_step_to_step_and_not_from_run_to_run():
    state, loss, *_ = start(dropout=0.5)
    step = train_step(dropout=0.5)
    first, again = (step(state, batch())[1]["loss"] for _ in range(2))
    later = step(state.replace(step=state.step + 1), batch())[1]["loss"]
    assert float(first) == float(again) != float(later)
    evaluations = (jax.jit(steps.make_eval_step(of)) for of in (loss, start()[1]))
    dropping, without = (evaluate(state.params, batch())["loss"] for evaluate in evaluations)
    assert float(dropping) == float(without)


def test_moments_are_float32_for_bfloat16_parameters():
    tx, rate = make_optimizer(OptimizerConfig(b2=0.999), 1000)
    params = {"w": jnp.ones((4,), jnp.bfloat16)}
    state = tx.init(steps.float32(params))
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(state))


class Mean(nn.Module):
    """A classifier: the mean embedding of a row, projected to three classes."""

    @nn.compact
    def __call__(self, tokens, *, positions=None, segment_ids=None):
        return nn.Dense(3)(nn.Embed(32, 8)(tokens).mean(1))


def test_classification_learns_the_label_of_a_row():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 64)
    tokens = rng.integers(0, 10, (64, 6)) + 10 * labels[:, None]
    rows = {"tokens": jnp.int32(tokens), "labels": jnp.int32(labels)}
    config = OptimizerConfig(learning_rate=0.05, warmup_steps=0, schedule="constant")
    tx, rate = make_optimizer(config, 60)
    state = jax.jit(lambda: steps.init_state(Mean(), tx, rows, 0))()
    step = jax.jit(steps.make_train_step(steps.make_loss(Mean(), "classification"), tx, rate))
    for _ in range(60):
        state, metrics = step(state, rows)
    assert float(metrics["accuracy"]) == 1.0 and float(metrics["weight"]) == 64
    ignored = rows | {"weights": jnp.float32(labels == 0)}
    assert float(step(state, ignored)[1]["weight"]) == (labels == 0).sum()
