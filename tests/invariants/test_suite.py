"""The suite itself: a sound mixer passes everything, and each check catches its own kind of bug."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suite
from suite import Mixer


def average(params, x, *, state, positions, segment_ids, bug=None):
    """h_t = 0.9 h_{t-1} + W x_t, from zero at the start of each segment; y = h.

    `bug` names one of the errors that real mixers have had.
    """
    w = params["w"].astype(x.dtype)
    u = (x @ w).astype(jnp.float32)
    B, T, E = x.shape
    h, last = (jnp.zeros((B, E)), None) if state is None else state
    if segment_ids is None:
        keep = jnp.ones((B, T), bool)
    else:
        ids = jnp.asarray(segment_ids)
        before = ids[:, :1] if state is None else last[:, None]
        keep = ids == jnp.concatenate([before, ids[:, :-1]], axis=1)
        last = ids[:, -1]
    if bug == "ignores segments":
        keep = jnp.ones((B, T), bool)
    if bug == "forgets the carried segment" and segment_ids is not None:
        keep = keep.at[:, 0].set(True)

    def step(h, now):
        u, keep = now
        h = 0.9 * h * keep[:, None] + u
        if bug == "state of 8 bits" and x.dtype == jnp.bfloat16:
            h = h.astype(jnp.float8_e4m3fn).astype(h.dtype)
        return h, h

    inputs = jnp.moveaxis(u, 1, 0), keep.T
    end, y = jax.lax.scan(step, h, inputs)
    y = jnp.moveaxis(y, 0, 1)
    if bug == "sees one step ahead":
        y = y + 1e-6 * jnp.roll(u, -1, axis=1)
    if bug == "forgets the past":
        y = u
    if bug == "drops the tail of a chunk":
        y = y * (np.arange(T) < max(T - T % 32, min(T, 32)))[None, :, None]
    if bug == "drops the state":
        end = jnp.zeros_like(end)
    if bug == "state one token late" and T > 1:
        end = y[:, -2]
    if bug == "stops the gradient of the state":
        end = jax.lax.stop_gradient(end)
    if bug == "noise":
        y = y + 1e-5 * np.random.default_rng().standard_normal(y.shape, np.float32)
    if bug == "overflows":
        y = jnp.log(jnp.exp(y))
    if bug == "gradient is NaN":
        y = y * jnp.where(jnp.abs(u) > 0, jnp.abs(u), 1.0) ** 0 + 0 * jnp.sqrt(u * u)
    if bug == "float32 output":
        return y, None if state is None else (end, last)
    return y.astype(x.dtype), None if state is None else (end, last)


@functools.cache
def mixer(bug=None):
    def init_state(batch, max_len, dtype):
        return jnp.zeros((batch, Mixer.width)), jnp.zeros(batch, jnp.int32)

    def init(key):
        return {"w": jax.random.normal(key, (Mixer.width,) * 2) * Mixer.width**-0.5}

    return Mixer("average", functools.partial(average, bug=bug), init_state, init)


# Mixers of the project pass them too.
@pytest.mark.slow
@pytest.mark.parametrize("check", suite.INVARIANTS, ids=lambda f: f.__name__)
def test_a_sound_mixer_passes(check):
    check(mixer())


@pytest.mark.parametrize(
    "check,bug,message",
    [
        (suite.split_equals_whole, "drops the state", r"split \(1, 50\): y: relative error"),
        (suite.split_equals_whole, "state one token late", r"split \(50, 50\): y"),
        (suite.split_gradient_equals_whole, "stops the gradient of the state", "gradient"),
        (suite.step_equals_parallel, "drops the state", "24 steps: y"),
        (suite.packed_equals_separate, "ignores segments", "packed document of length 50: "),
        (suite.packed_split_equals_whole, "forgets the carried segment", "packed row, split"),
        (suite.causal_by_gradient, "sees one step ahead", "y at 0 depends on the future"),
        (suite.causal_by_gradient, "forgets the past", "y at 31 doesn't depend on all of its"),
        (suite.deterministic, "noise", "a second compilation gave other bits"),
        (suite.bf16_close_to_float32, "state of 8 bits", "bfloat16: y: relative error"),
        (suite.bf16_close_to_float32, "float32 output", "y is float32 for x in bfloat16"),
        (suite.finite_at_extremes, "overflows", "1e4 .* in float32: y: .* not finite"),
        (suite.finite_at_extremes, "gradient is NaN", "1e-30 .*: gradient.* not finite"),
        (suite.any_length, "drops the tail of a chunk", "length 50: y: relative error"),
    ],
)
def test_a_broken_mixer_fails(check, bug, message):
    with pytest.raises(AssertionError, match=message):
        check(mixer(bug))


def test_reach():
    """A mixer that sees farther than it says is caught."""
    with pytest.raises(AssertionError, match="y at 31 depends on tokens beyond the reach"):
        suite.causal_by_gradient(dataclasses.replace(mixer(), reach=20))


def test_every_check_is_shown_to_fail():
    marks = test_a_broken_mixer_fails.pytestmark[0].args[1]
    assert {check for check, *_ in marks} == set(suite.INVARIANTS)


def test_cases_of_a_mixer_without_direction():
    bidirectional = dataclasses.replace(mixer(), causal=False)
    assert [check for _, check in suite.cases([bidirectional])] == list(suite.WITHOUT_STATE)
