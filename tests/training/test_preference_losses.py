"""GRPO and DPO by chunks against their formulas on whole logits, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.training.preference_losses import dpo, grpo
from tilescan.training.steps import means

B, T, E, V = 4, 9, 5, 11
ANSWERS = np.array([[2, 7], [4, 9], [1, 3], [0, 0]])  # the last row has none


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(B, T, E)), rng.normal(size=(E, V))
    targets = rng.integers(0, V, (B, T))
    index = np.arange(T)[None]
    mask = ((index >= ANSWERS[:, :1]) & (index < ANSWERS[:, 1:])).astype(float)
    logits = hidden @ head
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_p = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    old, reference = (log_p + 0.4 * rng.normal(size=(B, T)) for _ in range(2))
    # What is no answer must not matter.
    old, reference = (np.where(mask > 0, a, -np.inf) for a in (old, reference))
    targets = np.where(mask > 0, targets, -100)
    return tuple(map(jnp.asarray, (hidden, head, targets, mask, old, reference)))


def log_probs(hidden, head, targets, temperature=1.0):
    log_p = jax.nn.log_softmax(hidden @ head / temperature)
    return jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], -1)[..., 0]


SOFT = {"kl_weight": 0.3, "temperature": 0.7}


@pytest.mark.parametrize(
    ("normalizer", "options"),
    [
        ("sequences", {}),
        (6, SOFT),
        pytest.param("sequences", SOFT, marks=pytest.mark.slow),
        pytest.param("tokens", {}, marks=pytest.mark.slow),  # the next test has a sum over tokens
        pytest.param("tokens", SOFT, marks=pytest.mark.slow),
        pytest.param(6, {}, marks=pytest.mark.slow),
    ],
)
def test_grpo_is_its_formula(normalizer, options):
    with jax.enable_x64(True):
        hidden, head, targets, mask, old, reference = inputs()
        advantages = jnp.asarray([1.0, -2.0, 0.5, 3.0])
        low, high = 0.1, 0.3

        def plain(hidden, head):
            log_p = log_probs(hidden, head, targets, options.get("temperature", 1.0))
            log_p = jnp.where(mask > 0, log_p, 0)
            ratio = jnp.exp(log_p - jnp.where(mask > 0, old, 0))
            A = advantages[:, None]
            each = -jnp.minimum(ratio * A, jnp.clip(ratio, 1 - low, 1 + high) * A)
            d = jnp.where(mask > 0, reference, 0) - log_p
            each = each + options.get("kl_weight", 0.0) * (jnp.exp(d) - d - 1)
            each = mask * each
            lengths = mask.sum(1)
            if normalizer == "sequences":
                return jnp.sum(each.sum(1) / jnp.maximum(lengths, 1)) / 3
            return jnp.sum(each) / (mask.sum() if normalizer == "tokens" else 3 * normalizer)

        def chunked(hidden, head):
            sums = grpo(
                hidden, head, targets, mask, advantages, old, reference, chunk=4,
                clip_low=low, clip_high=high, normalizer=normalizer, **options,
            )  # fmt: skip
            return sums["loss"] / sums["weight"], sums

        value, want = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, head)
        (loss, sums), got = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(hidden, head)
        np.testing.assert_allclose(loss, value, rtol=1e-12)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
        assert 0 < float(sums["clipped"]) < float(sums["weight"])
        assert float(sums["rows"]) == 3 and set(means(sums)) == {"loss", "nll", "accuracy", "exact"}


def test_an_unclipped_first_step_is_the_policy_gradient():
    """At the old policy the ratio is 1: the gradient is that of A log p."""
    with jax.enable_x64(True):
        hidden, head, targets, mask, *_ = inputs()
        old = jax.jit(log_probs)(hidden, head, targets)
        advantages = np.array([1.0, -2.0, 0.5, 3.0])
        call = functools.partial(
            grpo, targets=targets, mask=mask, advantages=advantages, old_log_probs=old, chunk=3
        )
        plain = lambda h: -jnp.sum(mask * advantages[:, None] * log_probs(hidden, h, targets))
        got = jax.jit(jax.grad(lambda h: call(hidden, h, normalizer="tokens")["loss"]))(head)
        want = jax.jit(jax.grad(plain))(head)
        np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize("chunk", [2, pytest.param(9, marks=pytest.mark.slow)])
def test_dpo_is_its_formula(chunk):
    with jax.enable_x64(True):
        hidden, head, targets, mask, _, reference = inputs(1)
        beta = 0.7

        def plain(hidden, head):
            ratio = jnp.where(mask > 0, log_probs(hidden, head, targets) - reference, 0).sum(1)
            z = beta * (ratio[:2] - ratio[2:])
            return -jnp.sum(jnp.log(jax.nn.sigmoid(z))), z

        def chunked(hidden, head):
            sums = dpo(hidden, head, targets, mask, reference, chunk=chunk, beta=beta)
            return sums["loss"], sums

        (value, z), want = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(hidden, head)
        (loss, sums), got = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(hidden, head)
        np.testing.assert_allclose(loss, value, rtol=1e-12)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
        assert float(sums["correct"]) == np.sum(z > 0) and float(sums["weight"]) == 2
        np.testing.assert_allclose(sums["margin"], z.sum(), rtol=1e-10)


def test_dpos_gradient_is_a_number_times_that_of_log_probabilities():
    """-beta sigmoid(-z), pair by pair (StreamBP, section 3.1)."""
    with jax.enable_x64(True):
        hidden, head, targets, mask, _, reference = inputs(2)
        call = functools.partial(
            dpo, head=head, targets=targets, mask=mask, reference_log_probs=reference, chunk=4
        )
        got = jax.jit(jax.grad(lambda h: call(h)["loss"]))(hidden)

        @jax.jit
        def total(h):
            value = lambda h: jnp.where(mask > 0, log_probs(h, head, targets), 0).sum(1)
            return value(h), jax.grad(lambda h: value(h).sum())(h)

        sums, of_log_p = map(np.asarray, total(hidden))
        ratio = sums - np.where(mask > 0, reference, 0).sum(1)
        z = 0.1 * (ratio[:2] - ratio[2:])
        factor = -0.1 / (1 + np.exp(z))
        want = of_log_p * np.concatenate([factor, -factor])[:, None, None]
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-14)


def test_pairs_without_answers_do_not_count():
    hidden, head, targets, mask, _, reference = inputs(3)
    call = jax.jit(functools.partial(dpo, chunk=4))
    empty = np.array(mask)
    empty[[1, 3]] = 0
    both = call(hidden, head, targets, empty, reference)
    assert float(both["weight"]) == 1
    other = (np.asarray(x)[::2] for x in (targets, mask, reference))  # the other pair alone
    one = call(np.asarray(hidden)[::2], head, *other)
    np.testing.assert_allclose(both["loss"], one["loss"], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *a: grpo(*a[:4], jnp.ones(B), a[4], chunk=4, kl_weight=0.1), "needs reference"),
        (
            lambda *a: grpo(*a[:4], jnp.ones(B), a[4], chunk=4, normalizer="rows"),
            "normalizer='rows' must be 'sequences', 'tokens' or",
        ),
        (lambda *a: dpo(*(x if x.ndim == 2 and len(x) == E else x[:3] for x in a[:5]), chunk=4),
         "3 rows are not pairs"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*inputs())
