"""AutoLRS's forecaster and its search: exact cases, spikes, closed forms, a known optimum."""

import math

import numpy as np
import pytest

from tilescan.training.bayesian_optimization import Search, matern52, posterior
from tilescan.training.loss_forecast import exponential, forecast, smoothed

T = np.arange(100.0)


def test_an_exponential_is_found_exactly():
    a, b, c = exponential(T, 2 * np.exp(-0.01 * T) + 1)
    assert (a, b, c) == pytest.approx((2, -0.01, 1), abs=1e-4)
    found = forecast(2 * np.exp(-0.01 * T) + 1, 1000)
    assert found == pytest.approx(1 + 2 * math.exp(-10), abs=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_spikes_of_the_first_half_are_left_out(seed):
    rng = np.random.default_rng(seed)
    clean = 2 * np.exp(-0.03 * T) + 1
    noisy = clean + 0.005 * rng.standard_normal(100)
    noisy[rng.choice(50, 3, replace=False)] += 5
    assert forecast(noisy, 1000) == pytest.approx(1.0, abs=0.05)
    kept, found = smoothed(noisy)
    assert np.abs(found - clean[kept.astype(int)]).max() < 0.05 and (kept >= 50).sum() == 50


def test_forecasts_fall():
    losses = 2 * np.exp(-0.03 * T) + 1
    found = [forecast(losses, at) for at in (100, 200, 500, 1000)]
    assert found == sorted(found, reverse=True)
    assert forecast(np.linspace(3, 2, 40), 400) < 2  # a straight line goes on, but is bounded
    assert np.isfinite(forecast(np.full(10, 2.0), 100))
    for wrong in (np.ones(3), np.array([1, 2, np.nan, 3])):
        with pytest.raises(ValueError, match="four or more finite numbers"):
            forecast(wrong, 10)


def test_the_posterior_is_its_closed_form():
    rng = np.random.default_rng(0)
    x, y, at = rng.uniform(size=6), rng.standard_normal(6), rng.uniform(size=4)
    mean, deviation, evidence = posterior(x, y, at, 0.3, 1e-2)
    K = matern52(x, x, 0.3) + 1e-2 * np.eye(6)
    k = matern52(x, at, 0.3)
    np.testing.assert_allclose(mean, k.T @ np.linalg.inv(K) @ y, rtol=1e-9)
    variance = 1 - np.sum(k * (np.linalg.inv(K) @ k), 0)
    np.testing.assert_allclose(deviation, np.sqrt(variance), rtol=1e-6)
    want = -y @ np.linalg.inv(K) @ y / 2 - np.linalg.slogdet(2 * np.pi * K)[1] / 2
    assert evidence == pytest.approx(want)
    # Without noise it goes through the values.
    np.testing.assert_allclose(posterior(x, y, x, 0.3, 1e-10)[0], y, atol=1e-6)


def test_scikit_learns_process_is_the_same():
    process = pytest.importorskip("sklearn.gaussian_process")
    rng = np.random.default_rng(1)
    x, y, at = rng.uniform(size=8), rng.standard_normal(8), rng.uniform(size=5)
    kernel = process.kernels.Matern(0.4, nu=2.5)
    peer = process.GaussianProcessRegressor(kernel, alpha=1e-3, optimizer=None)
    mean, deviation = peer.fit(x[:, None], y).predict(at[:, None], return_std=True)
    ours = posterior(x, y, at, 0.4, 1e-3)
    np.testing.assert_allclose(ours[0], mean, rtol=1e-6)
    np.testing.assert_allclose(ours[1], deviation, rtol=1e-6)
    assert ours[2] == pytest.approx(peer.log_marginal_likelihood())


@pytest.mark.parametrize("kappa", [2.0, 1000.0])
def test_a_quadratics_optimum_is_found_within_ten(kappa):
    search = Search(1e-5, 1.0, seed=0, kappa=kappa)
    for _ in range(10):
        rate = search.ask()
        search.tell(rate, (math.log(rate) - math.log(3e-3)) ** 2)
    assert abs(math.log(search.best / 3e-3)) < math.log(1e5) / 10
    assert len(set(search.asked)) == 10 and all(1e-5 <= rate <= 1 for rate in search.asked)


def test_losses_that_are_not_finite_are_worse_than_all():
    search = Search(1e-3, 1.0, seed=1)
    for _ in range(6):
        rate = search.ask()
        search.tell(rate, math.nan if rate > 0.1 else math.log(rate) ** 2)
    assert search.best <= 0.1
    with pytest.raises(ValueError, match="must be 0 < low < high"):
        Search(1.0, 0.1)
