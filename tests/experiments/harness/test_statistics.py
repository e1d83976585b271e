"""Fits of lines and exponentials."""

import numpy as np
import pytest
import scipy.stats

from tilescan.experiments.harness.statistics import exponential_fit, line_fit


def test_line_fit_is_scipys():
    rng = np.random.default_rng(0)
    x = np.repeat(np.arange(3.0), 3)
    y = 2 * x + rng.normal(size=9)
    want = scipy.stats.linregress(x, y)
    margin = want.stderr * scipy.stats.t.ppf(0.975, 7)
    slope, low, high, r2 = line_fit(x, y)
    assert (slope, low, high) == pytest.approx(
        (want.slope, want.slope - margin, want.slope + margin), rel=2e-3
    )
    assert r2 == pytest.approx(want.rvalue**2)


def test_exponential_fit_finds_the_published_law():
    n_s = np.array([0.81, 1.6, 2.4, 4.85, 12.9, 19.35])
    scale, base, r2 = exponential_fit(n_s, 4.756 * (1.365**n_s - 1))
    assert (scale, base) == pytest.approx((4.756, 1.365), rel=1e-2) and r2 > 0.9999


@pytest.mark.parametrize("fit", [line_fit, exponential_fit])
def test_fits_need_three_points(fit):
    with pytest.raises(ValueError, match="needs? three points"):
        fit(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    with pytest.raises(ValueError):
        fit(np.zeros(4), np.arange(4.0))
