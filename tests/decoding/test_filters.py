"""The distribution that is drawn from at the bounds of its settings, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.decoding.filters import filter_logits


def kept(logits, *settings):
    return np.isfinite(np.asarray(filter_logits(logits, *settings)))


@pytest.mark.slow
def test_the_nucleus_of_a_large_vocabulary_is_that_of_float64():
    scales, ps = (0.5, 5.0), (1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6, 1 - 1e-9, 1.0)
    logits = np.float32(np.random.default_rng(0).normal(size=50_257))
    rows, expected = [], []
    for scale in scales:
        p = np.sort(np.exp(np.float64(scale * logits - scale * logits.max())))
        onward = (np.cumsum(p) / p.sum())[::-1]  # from each token on, the most probable one first
        for top_p in ps:
            rows.append(scale * logits)
            expected.append(max(1, int((onward > 1 - top_p).sum())))
    top_p = np.tile(ps, len(scales))
    found = kept(np.stack(rows), 1.0, None, top_p).sum(1)
    np.testing.assert_array_equal(found, expected)
    assert found[-1] == 50_257
    # Also where p is known only to the running program.
    traced = jax.jit(lambda x, p: filter_logits(x, 1.0, None, p))(logits, 1.0)
    assert np.isfinite(traced).all()
    for whole in ((1.0, None, 1), (1.0, 50_257, 1.0)):
        assert kept(logits, *whole).all()


@pytest.mark.parametrize("traced", [pytest.param(False, marks=pytest.mark.slow), True])
def test_small_temperatures_are_greedy(traced):
    logits = jnp.asarray([[1.0, 2.0, -3.0, 1.5], [3e38, -3e38, 1.0, -jnp.inf]])
    run = jax.jit(filter_logits, static_argnums=2) if traced else filter_logits
    for temperature in (0, 0.0, -0.0, 1e-39, 1e-45, 1e-300, 1e-37, 1e-12):
        for options in ((None, None), (3, 0.5)):
            found = np.exp(run(logits, temperature, *options))
            np.testing.assert_array_equal(found, [[0, 1, 0, 0], [1, 0, 0, 0]])


def test_of_equal_scores_temperature_0_takes_the_lower_id():
    np.testing.assert_array_equal(kept([1.0, 2.0, 2.0], 0.0), [0, 1, 0])


def test_large_temperatures_are_uniform_and_keep_the_order():
    logits = jnp.asarray([1.0, 3.0, -jnp.inf, 2.0])
    expected = np.where(np.isfinite(logits), -np.log(3), -np.inf)
    for temperature in (1e30, 1e39, 1e300):
        found = jax.jit(lambda x, t=temperature: filter_logits(x, t))(logits)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_array_equal(kept(logits, temperature, 2), [0, 1, 0, 1])


def test_each_row_has_its_own_temperature_and_top_p():
    logits = np.random.default_rng(1).normal(size=(3, 9)).astype(np.float32)
    one = jax.jit(lambda x, t, p: filter_logits(x, t, 5, p))
    t, p = np.asarray([0.5, 0.0, 2.0]), np.asarray([0.6, 0.9, 1.0])
    whole = jax.jit(lambda x: filter_logits(x, t, 5, p))(logits)
    traced = jax.jit(lambda t, p: filter_logits(logits, t, 5, p))(t, p)
    for row in range(3):
        alone = one(logits[row], t[row], p[row])
        np.testing.assert_allclose(whole[row], alone, atol=1e-6)
        np.testing.assert_allclose(traced[row], alone, atol=1e-6)


@pytest.mark.parametrize("settings", [(1.0,), (0.0,), (1.0, 1), (1.0, None, 0.5), (1e-3, 2, 0.9)])
def test_rows_that_make_no_distribution_are_nan(settings):
    inf, nan = jnp.inf, jnp.nan
    logits = jnp.asarray(
        [[1.0, nan, 3.0], [1.0, inf, 3.0], [-inf, -inf, -inf], [inf, -inf, nan], [1.0, -inf, 3.0]]
    )
    found = np.asarray(filter_logits(logits, *settings))
    assert np.isnan(found[:4]).all()
    assert not np.isnan(found[4]).any() and found[4, 1] == -np.inf


def test_traced_numbers_out_of_range_give_nan():
    logits = jnp.asarray([1.0, 2.0])
    run = jax.jit(lambda t, p: filter_logits(logits, t, None, p))
    for t, p in (
        (jnp.nan, 0.5),
        (-1.0, 0.5),
        (jnp.inf, 0.5),
        (1.0, jnp.nan),
        (1.0, 0.0),
        (1.0, 2.0),
    ):
        assert np.isnan(run(t, p)).all(), (t, p)
    assert not np.isnan(run(1.0, 0.5)).any()


@pytest.mark.parametrize(
    "settings,error,message",
    [
        ((float("nan"),), ValueError, "temperature=nan must be 0 .* or more, and finite"),
        ((float("inf"),), ValueError, "temperature=inf must be 0"),
        ((-1e-45,), ValueError, "temperature=-1e-45 must be 0"),
        ((np.asarray([1.0, np.nan]),), ValueError, r"temperature=\[ 1. nan\] must be 0"),
        (([1.0, 2.0, 3.0],), ValueError, r"temperature of shape \(3,\) .* one for each row: .*2"),
        (([[1.0], [2.0]],), ValueError, r"temperature of shape \(2, 1\) must be one number"),
        (("1",), TypeError, "temperature='1' must be a number"),
        ((None,), TypeError, "temperature=None must be a number"),
        ((True,), TypeError, "temperature=True must be a number"),
        ((1j,), TypeError, "temperature=1j must be a number"),
        (([[1.0], [2.0, 3.0]],), TypeError, "temperature=.* must be a number"),
        ((1.0, 0), ValueError, "top_k=0 must be between 1 and vocab_size=3"),
        ((1.0, 4), ValueError, "top_k=4 must be between 1 and vocab_size=3"),
        ((1.0, 2.0), TypeError, "top_k=2.0 must be an integer"),
        ((1.0, True), TypeError, "top_k=True must be an integer"),
        ((1.0, np.asarray([1, 2])), TypeError, "top_k=.* must be an integer"),
        ((1.0, None, 0.0), ValueError, r"top_p=0.0 must be in \(0, 1\]"),
        ((1.0, None, 1.0000001), ValueError, r"top_p=1.0000001 must be in \(0, 1\]"),
        ((1.0, None, float("nan")), ValueError, r"top_p=nan must be in \(0, 1\]"),
        ((1.0, None, [0.5, 2.0]), ValueError, r"top_p=\[0.5, 2.0\] must be in \(0, 1\]"),
        ((1.0, None, [0.5]), ValueError, r"top_p of shape \(1,\) must be one number"),
        ((1.0, None, True), TypeError, "top_p=True must be a number"),
    ],
)
def test_wrong_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        filter_logits(jnp.zeros((2, 3)), *settings)


def test_a_traced_top_k_and_logits_without_tokens_are_named():
    with pytest.raises(TypeError, match="top_k is traced"):
        jax.jit(lambda k: filter_logits(jnp.zeros(3), 1.0, k))(2)
    with pytest.raises(ValueError, match=r"logits must be \[\.\.\., V\]"):
        filter_logits(jnp.zeros((2, 0)))


def test_numpy_and_jax_scalars_are_numbers():
    logits = jnp.asarray([1.0, 2.0, 3.0])
    expected = filter_logits(logits, 2.0, 2, 0.75)
    for kind in (np.float64, np.float32, jnp.float32, jnp.bfloat16):
        got = filter_logits(logits, kind(2.0), np.int64(2), kind(0.75))
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(filter_logits(logits, 2, jnp.asarray(2), 0.75), expected)
