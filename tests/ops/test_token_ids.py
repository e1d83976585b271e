"""Ids outside the vocabulary, targets without weight, narrow dtypes: one rule in every loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tilescan.models import LanguageModel, LanguageModelConfig, SequenceClassifier
from tilescan.ops.cross_entropy import chunked_cross_entropy, chunked_log_probabilities
from tilescan.ops.token_ids import bounded_ids
from tilescan.training import stream_bp
from tilescan.training.preference_losses import dpo, grpo
from tilescan.training.steps import cross_entropy

B, T, E, V = 2, 6, 4, 300
WEIGHTS = np.float32([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]])


def whole(hidden, head, targets, weights):
    return cross_entropy(hidden @ head, targets, weights, z_loss=0.01)


def chunked(hidden, head, targets, weights):
    return chunked_cross_entropy(hidden, head, targets, weights, chunk=4, z_loss=0.01)


def policy(hidden, head, targets, weights):
    others = jnp.where(weights > 0, -1.0, jnp.nan)
    return grpo(hidden, head, targets, weights, jnp.asarray([1.0, -2.0]), others, chunk=4)


def preference(hidden, head, targets, weights):
    return dpo(hidden, head, targets, weights, jnp.where(weights > 0, -1.0, jnp.nan), chunk=4)


def own_sum(hidden, head, targets, weights):
    log_p = chunked_log_probabilities(hidden, head, targets, chunk=4)
    return {"loss": -jnp.sum(jnp.where(weights > 0, log_p, 0))}


# DPO's targets go where the policy's do.
LOSSES = [whole, chunked, policy, own_sum, pytest.param(preference, marks=pytest.mark.slow)]


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(B, T, E)), rng.normal(size=(E, V))
    targets = rng.integers(0, 120, (B, T)).astype(np.int32)
    return np.float32(hidden), np.float32(head), targets


@functools.cache
def compiled(loss):
    def value(hidden, head, targets):
        sums = loss(hidden, head, targets, WEIGHTS)
        return sums["loss"], sums

    return jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))


@pytest.mark.parametrize("dtype", ["int8", pytest.param("uint8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "loss",
    [
        whole,
        *(pytest.param(x, marks=pytest.mark.slow) for x in (chunked, policy, preference, own_sum)),
    ],
)
def test_targets_of_every_integer_dtype_are_the_same_targets(loss, dtype):
    """V = 300 is more than int8 and uint8 can count to."""
    hidden, head, targets = inputs()
    want = compiled(loss)(hidden, head, targets)
    assert np.isfinite(want[0][0])
    got = compiled(loss)(hidden, head, targets.astype(dtype))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ignored", [-100, -1, V, 2**31 - 1])
def test_targets_of_weight_zero_are_never_looked_at(loss, ignored):
    hidden, head, targets = inputs()
    want = compiled(loss)(hidden, head, targets)
    got = compiled(loss)(hidden, head, np.where(WEIGHTS > 0, targets, np.int32(ignored)))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("unknown", [-100, -1, V, 2**31 - 1])
def test_a_target_with_weight_that_is_no_token_is_nan_with_its_gradients(loss, unknown):
    hidden, head, targets = inputs()
    targets = targets.copy()
    targets[1, 2] = unknown
    found = jax.tree.map(np.asarray, compiled(loss)(hidden, head, targets))
    (value, sums), (to_hidden, to_head) = found
    assert np.isnan(value)
    assert loss in (own_sum, preference) or np.isnan(sums["nll"])  # DPO's is of chosen tokens
    assert np.isnan(to_hidden[1, 2]).all() and np.isnan(to_head).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bool_])
def test_targets_that_are_not_integers_are_refused_by_name(loss, dtype):
    hidden, head, targets = inputs()
    with pytest.raises(TypeError, match="targets must be .* integers.*got (float32|bool)"):
        loss(hidden, head, targets.astype(dtype), WEIGHTS)


def test_targets_of_another_shape_are_refused():
    hidden, head, targets = inputs()
    with pytest.raises(ValueError, match=r"targets must be \(2, 6\) like logits, got \(2, 1\)"):
        whole(hidden, head, targets[:, :1], WEIGHTS)


def test_ids_of_every_dtype_are_compared_as_what_they_are():
    for dtype in ("int8", "uint8", "int16", "uint16", "uint32", "int32"):
        got = bounded_ids(jnp.asarray([3, 127, 0], dtype), 300, -7)
        np.testing.assert_array_equal(got, [3, 127, 0], strict=False)
        assert got.dtype == jnp.int32
    with jax.enable_x64(True):
        ids = jnp.asarray([3, 2**32 + 3, -(2**32) + 3, 300, -1], jnp.int64)
        np.testing.assert_array_equal(bounded_ids(ids, 300, -7), [3, -7, -7, -7, -7])
    got = bounded_ids(jnp.asarray([3, 2**32 - 1, 2**31], jnp.uint32), 300, -7)
    np.testing.assert_array_equal(got, [3, -7, -7])


MODEL = dict(vocab_size=20, d_model=8, n_heads=2, repeats=1, position="learned", max_len=9)
CALLS = {
    "whole": lambda model, params, x, **a: model.apply({"params": params}, x, **a)[0],
    "a state": lambda model, params, x, **a: model.apply(
        {"params": params}, x, state=model.init_state(1, 9), **a
    )[0],
    "streamed": lambda model, params, x, **a: stream_bp.stream_hidden(
        model, params, x, chunks=2, **a
    ),
}


@functools.cache
def small_model():
    model = LanguageModel(LanguageModelConfig(**MODEL))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    rng = np.random.default_rng(0)
    draw = lambda x: rng.standard_normal(x.shape).astype(x.dtype)
    return model, jax.tree.map(draw, nn.unbox(variables)["params"])


def with_last(x, value):
    x = x.copy()
    x[0, 3] = value
    return x


@pytest.mark.parametrize(
    "call", ["whole", *(pytest.param(x, marks=pytest.mark.slow) for x in ("a state", "streamed"))]
)
def test_ids_outside_the_vocabulary_are_nan(call):
    """Token -1 is not the table's last row; nor is position -1."""
    model, params = small_model()
    run = jax.jit(functools.partial(CALLS[call], model, params))
    tokens, positions = np.int32([[3, 5, 7, 19]]), np.arange(4, dtype=np.int32)[None]
    assert np.isfinite(run(tokens, positions=positions)).all()
    last = lambda tokens, positions: np.asarray(run(tokens, positions=positions))[0, 3]
    for unknown in (-1, -20, -100, 20, 2**31 - 1, -(2**31)):
        assert np.isnan(last(with_last(tokens, unknown), positions)).all()
    for unknown in (-1, -9, 9):
        assert np.isnan(last(tokens, with_last(positions, unknown))).all()
    if call == "whole":  # narrow integers are another program
        assert np.isnan(last(with_last(tokens.astype(np.int8), -1), positions)).all()


@pytest.mark.slow
def test_a_classifier_gives_nan_for_an_unknown_token():
    model = SequenceClassifier(LanguageModelConfig(**MODEL), 3)
    tokens = jnp.asarray([[3, 5], [3, -1]])
    run = jax.jit(lambda key, x: model.apply(model.init(key, x), x))
    scores = np.asarray(run(jax.random.key(0), tokens))
    assert np.isfinite(scores[0]).all() and np.isnan(scores[1]).all()


@pytest.mark.parametrize("name", ["positions", "segment_ids"])
def test_integers_of_a_token_that_are_no_integers_are_refused_by_name(name):
    model, params = small_model()
    tokens = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(TypeError, match=f"{name} must be integers .* got float32"):
        model.apply({"params": params}, tokens, **{name: jnp.zeros((1, 4))})
