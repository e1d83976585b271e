"""The annealing law: areas against closed forms, fits against what made the curves."""

import numpy as np
import pytest
import scipy.signal
from hypothesis import given
from hypothesis import strategies as st

from tilescan.training.annealing_law import Curve, Law, areas, bootstrap, errors, fit, predict
from tilescan.training.schedules import ScheduleConfig, rates

TRUE = Law(L0=2.6, A=0.45, C=0.4, alpha=0.6, decay=0.99)
WARMUP = 50


def schedule(name, steps=2000, **options):
    return rates(ScheduleConfig(1e-2, name, warmup_steps=WARMUP, **options), steps)


def curve(learning_rates, noise=0.0, seed=0):
    steps = np.arange(20, len(learning_rates) + 1, 20)
    losses = predict(TRUE, learning_rates, WARMUP)[steps - 1]
    scale = 1 + noise * np.random.default_rng(seed).standard_normal(len(steps))
    return Curve(learning_rates, steps, losses * scale, WARMUP)


COSINE, CONSTANT = schedule("cosine"), schedule("constant")
WSD = schedule("wsd", decay_steps=400, decay_shape="sqrt")


@given(
    st.lists(st.floats(0, 1), min_size=33, max_size=33),  # one program
    st.sampled_from([0.0, 0.5, 0.99, 1.0]),
)
def test_areas_are_their_sums(found, decay):
    eta = np.array(found)
    S1, S2 = areas(eta, decay)
    drops = np.concatenate([[0.0], eta[:-1] - eta[1:]])
    np.testing.assert_allclose(S1, np.cumsum(eta), rtol=1e-12)
    momentum = scipy.signal.lfilter([1.0], [1.0, -decay], drops)
    np.testing.assert_allclose(S2, np.cumsum(momentum), rtol=1e-10, atol=1e-12)


def test_areas_have_their_closed_forms():
    eta, delta, k, decay = np.full(3000, 1.0), 0.4, 1000, 0.999
    np.testing.assert_array_equal(areas(eta)[1], 0)  # nothing anneals at a constant rate
    eta[k - 1 :] -= delta  # update k is the first with the lower rate
    s = np.arange(k, 3001)
    want = delta * (1 - decay ** (s - k + 1)) / (1 - decay)
    np.testing.assert_allclose(areas(eta, decay)[1][k - 1 :], want, rtol=1e-9)
    # Without a memory, how far the rate has fallen; without forgetting, all that it ever has.
    np.testing.assert_allclose(areas(COSINE, 0.0)[1], COSINE[0] - COSINE, atol=1e-15)
    np.testing.assert_allclose(areas(eta, 1.0)[1], np.cumsum(1.0 - eta), rtol=1e-12)
    # Linear in the rates, and the forward area of a cosine to a tenth is 0.55 of its peak's.
    both = areas(COSINE + WSD, 0.99, WARMUP)[1]
    apart = areas(COSINE, 0.99, WARMUP)[1] + areas(WSD, 0.99, WARMUP)[1]
    np.testing.assert_allclose(both, apart, rtol=1e-9, atol=1e-15)
    whole = rates(ScheduleConfig(1.0, "cosine", warmup_steps=0), 10**5)
    assert areas(whole)[0][-1] == pytest.approx(0.55e5, rel=1e-4)


def test_the_warm_up_counts_as_if_it_had_the_rate_after_it():
    flat = np.full(2000, 1e-2)
    for with_ramp, without in zip(areas(CONSTANT, 0.99, WARMUP), areas(flat, 0.99), strict=True):
        np.testing.assert_allclose(with_ramp, without, rtol=1e-12, atol=1e-15)
    assert areas(CONSTANT, 0.99)[1][-1] < 0  # a rise counts, where it is none of the warm-up


def test_a_rate_that_rises_again_raises_the_loss():
    again = schedule("rewarmed", rewarm_start=1000, rewarm_steps=50)
    found = predict(TRUE, again, WARMUP)
    assert found[1100] > found[999] and found[-1] < found[999]


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_fit_finds_what_made_the_curves(noise):
    """And predicts the run that it did not see as exactly as the noise lets it."""
    law = fit([curve(COSINE, noise), curve(CONSTANT, noise, seed=1)], decays=(0.99,))
    np.testing.assert_allclose(law[:4], TRUE[:4], rtol=1e-5 if not noise else 0.02)
    assert np.abs(errors(law, curve(WSD))).max() < max(1e-6, noise)


def test_fits_do_not_hang_on_the_unit_of_the_rate():
    """A peak of 3 instead of 1e-2 gives the same curve by another A and C."""
    scaled = [c._replace(rates=300 * c.rates) for c in (curve(COSINE), curve(CONSTANT))]
    law = fit(scaled, decays=(0.99,))
    want = [TRUE.L0, TRUE.A * 300**TRUE.alpha, TRUE.C / 300, TRUE.alpha]
    np.testing.assert_allclose(law[:4], want, rtol=1e-4)


def test_the_decay_is_the_papers_unless_another_is_clearly_better():
    curves = [curve(COSINE), curve(WSD)]
    assert fit(curves).decay == 0.99
    assert fit([curve(CONSTANT, 1e-3)]).decay == 0.999  # which has no annealing to tell by
    assert fit(curves, decays=(0.995,)).decay == 0.995


def test_laws_without_annealing_are_worse():
    seen, unseen = [curve(COSINE), curve(CONSTANT)], curve(WSD)
    whole, area, steps = (
        np.abs(errors(law, unseen)).mean()
        for law in (
            fit(seen, decays=(0.99,)),
            fit(seen, annealing=False),
            fit(seen, annealing=False, by_steps=True),
        )
    )
    assert fit(seen, annealing=False).C == 0
    assert 100 * whole < min(area, steps)


def test_the_law_has_no_edge_of_stability():
    """Its known limits: a higher peak is always better, and so are updates at rate 0."""
    ends = [predict(TRUE, peak * COSINE, WARMUP)[-1] for peak in (1, 10, 100)]
    assert ends == sorted(ends, reverse=True)
    padded = predict(TRUE, np.append(schedule("linear", final_fraction=0.0), np.zeros(300)), WARMUP)
    assert padded[-1] < padded[-301]


def test_intervals_hold_what_made_the_curves():
    curves = [curve(COSINE, 1e-3), curve(CONSTANT, 1e-3, seed=1)]
    law = fit(curves, decays=(0.99,))
    laws = bootstrap(curves, law, samples=100)
    low, high = np.quantile([other[:4] for other in laws], [0.005, 0.995], axis=0)
    assert (low < TRUE[:4]).all() and (high > TRUE[:4]).all()
    assert ((high - low) / TRUE[:4] < 0.1).all()
    assert laws == bootstrap(curves, law, samples=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(losses=np.array([1.0])), "steps must rise, and be as many as losses"),
        (
            dict(steps=np.arange(100)),
            "steps run from 0 to 99; there are rates of updates 1 to 2000",
        ),
        (dict(losses=np.zeros(100)), "losses must be above 0"),
        (dict(warmup=1990), "1 losses after their warm-up; a fit needs 5"),
        (dict(rates=-CONSTANT), "rates must be .S. numbers of at least 0"),
        (dict(warmup=2000), "0 losses after"),
    ],
)
def test_curves_that_cannot_be_fitted_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fit([curve(CONSTANT)._replace(**change)])


def test_a_decay_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"decay=1.5 must lie in \[0, 1\]"):
        areas(CONSTANT, 1.5)
    with pytest.raises(ValueError, match="warmup=2000 must be at least 0 and below 2000"):
        areas(CONSTANT, warmup=2000)
