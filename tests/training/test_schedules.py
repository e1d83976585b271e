"""Schedules against their formulas, optax's and SciPy's, and the identities of their papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.signal

from tilescan.training.checkpoints import CheckpointError
from tilescan.training.config import default_config, settings
from tilescan.training.schedule_config import SCHEDULES, ConfigError, in_steps
from tilescan.training.schedules import (
    SHAPES,
    ScheduleConfig,
    first_peak,
    make_schedule,
    rates,
)
from tilescan.training.settings import OptimizerConfig
from tilescan.training.workdir import keep_schedule

STEPS, W = 40, 7
# Settings that each schedule needs, and some that it may have.
OPTIONS = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "cosine_cycles": dict(cycle_steps=5, cycle_growth=2, cycle_peak=0.5),
    "cyclical": dict(cycle_steps=12, cycle_peak=0.5),
    "wsd": dict(decay_steps=10),
    "multi_step": dict(milestones=(12, 30), milestone_factor=0.3),
    "inverse_sqrt": {},
    "rewarmed": dict(rewarm_start=20, rewarm_steps=4, rewarm_fraction=0.6),
    "infinite": dict(cooldown_steps=12, decay_steps=10, constant_fraction=0.5),
}


def cosine(u, high=1.0, low=0.2):
    return low + (high - low) * (1 + math.cos(math.pi * min(max(u, 0), 1))) / 2


def cycles(t):
    """Lengths 5, 10, 20 after the warm-up, from 1, 1/2, 1/4."""
    if t < W:
        return 1.0
    i, start, length = next(
        c for c in ((0, W, 5), (1, W + 5, 10), (2, W + 15, 20)) if t < sum(c[1:])
    )
    return cosine((t - start) / length, high=0.5**i)


def triangles(t):
    if t < W:
        return 0.2
    i, into = divmod((t - W) / 12, 1)
    return 0.2 + (max(0.5**i, 0.2) - 0.2) * (1 - abs(2 * into - 1))


def rewarmed(t):
    if t < 20:
        return cosine((t - W) / (20 - W))
    return 0.2 + 0.4 * (t - 20) / 4 if t < 24 else cosine((t - 24) / 16, high=0.6)


def infinite(t):
    return cosine((t - W) / 12, low=0.5) if t < 30 else 0.5 * (0.2 / 0.5) ** ((t - 30) / 10)


FORMULAS = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - 0.8 * max(0, (t - W) / (STEPS - W)),
    "cosine": lambda t: cosine((t - W) / (STEPS - W)),
    "cosine_cycles": cycles,
    "cyclical": triangles,
    "wsd": lambda t: 1.0 if t < 30 else 1 - 0.8 * (t - 30) / 10,
    "multi_step": lambda t: 1.0 if t < 12 else 0.3 if t < 30 else 0.09,
    "inverse_sqrt": lambda t: math.sqrt(W / max(t, W)),
    "rewarmed": rewarmed,
    "infinite": infinite,
}


def made(name, **options):
    given = dict(learning_rate=3e-3, warmup_steps=W, final_fraction=0.2)
    return ScheduleConfig(schedule=name, **given | OPTIONS.get(name, {}) | options)


def test_every_schedule_has_its_formula():
    assert set(SCHEDULES) == set(SHAPES) == set(FORMULAS)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_its_formula(name):
    want = [3e-3 * min(1, (t + 1) / (W + 1)) * FORMULAS[name](t) for t in range(STEPS)]
    np.testing.assert_allclose(rates(made(name), STEPS), want, rtol=1e-12)
    rate = jax.jit(jax.vmap(make_schedule(made(name), STEPS)))
    np.testing.assert_allclose(rate(jnp.arange(STEPS)), want, rtol=1e-5)
    assert want[0] > 0, "the first update must move the parameters"
    if name != "cyclical":  # which rises only then
        assert max(want) == pytest.approx(3e-3) and np.argmax(want) == W


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "rewarmed"])
def test_schedules_end_where_they_say(name):
    for final, end in ((0.0, None), (0.3, 36)):
        rate = make_schedule(made(name, final_fraction=final, end_step=end), STEPS)
        at = STEPS if name == "wsd" else end or STEPS
        assert float(rate(at)) == pytest.approx(3e-3 * final, abs=1e-9)


@pytest.mark.parametrize("name", ["cosine", "rewarmed", "infinite", "wsd", "cyclical"])
def test_schedules_are_continuous(name):
    """No jump between phases: no step is larger than a short phase makes it."""
    config = made(name, learning_rate=1.0)
    longer = dict(warmup_steps=W * 100, decay_steps=1000, rewarm_start=2000, rewarm_steps=400)
    longer |= dict(cooldown_steps=1200, cycle_steps=1200)
    fields = {k: v for k, v in longer.items() if k == "warmup_steps" or k in OPTIONS[name]}
    fine = rates(made(name, learning_rate=1.0, **fields), 100 * STEPS)
    assert np.abs(np.diff(fine)).max() < 2 * np.abs(np.diff(rates(config, STEPS))).max() / 100


@pytest.mark.parametrize("shape", ["linear", "exponential", "cosine", "sqrt"])
def test_decays_fall_from_one_to_the_end(shape):
    config = made("wsd", learning_rate=1.0, decay_shape=shape, decay_steps=20, final_fraction=0.04)
    found = rates(config, STEPS)[20:]
    middle = {"linear": 0.52, "exponential": 0.2, "cosine": 0.52, "sqrt": 1 - 0.96 * 0.5**0.5}
    assert found[0] == 1 and found[10] == pytest.approx(middle[shape])
    assert (np.diff(found) < 0).all() and found[-1] > 0.04


@pytest.mark.parametrize("shape", ["cosine", "inverse_sqrt"])
def test_an_infinite_schedule_has_its_papers_identities(shape):
    """Warm-up ends at the peak, cooldown at the constant; the geometric mean halves the decay."""
    names = dict(warmup_steps=10, cooldown_steps=50, decay_steps=20, constant_fraction=0.55)
    config = ScheduleConfig(
        1.0, "infinite", **names, cooldown_shape=shape, cooldown_alpha=4.0, final_fraction=0.1
    )
    found = rates(config, 100)
    assert found[10] == 1 and found[60] == pytest.approx(0.55)
    np.testing.assert_allclose(found[60:81], 0.55, rtol=1e-12)
    assert found[90] == pytest.approx(math.sqrt(0.55 * 0.1))
    h = lambda u: 1 / math.sqrt(1 + 4 * u) - 1
    half = 0.775 if shape == "cosine" else 1 - 0.45 * h(0.5) / h(1)
    assert found[35] == pytest.approx(half)
    # Without a decay it has no end: a longer run is the same.
    endless = ScheduleConfig(schedule="infinite", cooldown_steps=50, constant_fraction=0.55)
    assert endless.endless and not config.endless
    np.testing.assert_array_equal(rates(endless, 200), rates(endless, 300)[:200])


def test_rewarming_has_its_papers_rates():
    """A warm-up of 1% of 297 B tokens, a cosine that ends after 240 B, a tenth of the peak then."""
    config = ScheduleConfig(
        3e-4, phases_in="tokens", warmup_steps=2_970_000, end_step=240_000_000, final_fraction=0.1
    )
    config = in_steps(config, 1000)
    assert (config.warmup_steps, config.end_step, config.phases_in) == (2970, 240_000, "steps")
    found = rates(config, 297_000)
    assert found[2970] == pytest.approx(3e-4)
    assert found[(2970 + 240_000) // 2] == pytest.approx(0.55 * 3e-4, rel=1e-4)
    np.testing.assert_allclose(found[240_000:], 3e-5)
    assert rates(ScheduleConfig(3e-4, warmup_steps=0), 100)[0] == pytest.approx(3e-4)


def test_optax_has_the_same_schedules():
    t, at = np.arange(STEPS), lambda schedule: np.asarray(jax.vmap(schedule)(np.arange(STEPS)))
    plain = lambda name, **o: rates(made(name, warmup_steps=0, **o), STEPS)
    peers = {
        "linear": optax.linear_schedule(3e-3, 6e-4, STEPS),
        "cosine": optax.cosine_decay_schedule(3e-3, STEPS, 0.2),
        "multi_step": optax.piecewise_constant_schedule(3e-3, {12: 0.3, 30: 0.3}),
    }
    for name, peer in peers.items():
        np.testing.assert_allclose(plain(name), at(peer), rtol=1e-5)
    restarts = [
        dict(
            init_value=0.0, peak_value=3e-3 * 0.5**i, warmup_steps=0, decay_steps=n, end_value=6e-4
        )
        for i, n in enumerate((5, 10, 25))
    ]
    same = slice(0, 15)  # the third is another length
    np.testing.assert_allclose(
        plain("cosine_cycles")[same], at(optax.sgdr_schedule(restarts))[same], rtol=1e-5
    )
    decay = optax.exponential_decay(3e-3, 20, 0.2, transition_begin=20)
    found = plain("wsd", decay_steps=20, decay_shape="exponential")
    np.testing.assert_allclose(found, at(decay), rtol=1e-5)
    # The warm-up of optax begins with 0; ours is its next step.
    warm = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 8, 8 + STEPS)
    np.testing.assert_allclose(rates(made("constant"), 8), at(warm)[1:9], rtol=1e-5)
    triangle = scipy.signal.sawtooth(2 * np.pi * t / 12, width=0.5)
    found = plain("cyclical", cycle_peak=1.0)
    np.testing.assert_allclose(found, 6e-4 + 2.4e-3 * (triangle + 1) / 2, rtol=1e-12)


def test_cycles_begin_where_the_last_ones_end():
    """However uneven their growth, and far out, where a logarithm is rounded."""
    for growth in (1.0, 1.5, 2.0, 3.0):
        names = dict(warmup_steps=0, cycle_steps=2, cycle_growth=growth, cycle_peak=1.0)
        config = made("cosine_cycles", **names)
        starts = np.cumsum([0, *(2 * growth**i for i in range(8))])
        whole = [int(s) for s in starts if s == int(s) and s < 10**5]
        for found in (rates(config, 10**5), make_schedule(config, 10**5)(jnp.arange(10**5))):
            np.testing.assert_allclose(np.asarray(found)[whole], 3e-3, rtol=1e-5)


@pytest.mark.parametrize(("n", "growth"), [(41, 1.0), (47, 1.0), (55, 1.0), (100, 1.1), (700, 1.1)])
def test_a_run_restarts_with_the_array(n, growth):
    """In float32, as it is compiled, at every first update of a cycle and the last before it."""
    names = dict(warmup_steps=0, cycle_steps=n, cycle_growth=growth, cycle_peak=1.0)
    config = made("cosine_cycles", **names)
    found = jax.jit(jax.vmap(make_schedule(config, 4000)))(jnp.arange(4000))
    np.testing.assert_allclose(found, rates(config, 4000), rtol=1e-4)


def test_the_first_peak_ends_the_warm_up(tmp_path):
    assert first_peak(made("wsd"), STEPS) == W
    path = tmp_path / "mine.txt"
    path.write_text("".join(f"{min(t, 20 - t) / 10}\n" for t in range(20)))
    assert first_peak(ScheduleConfig(1.0, f"file:{path}"), 20) == 10
    assert first_peak(ScheduleConfig(1.0, "cyclical", cycle_steps=8), STEPS) == 4


def test_a_million_updates_are_an_array():
    found = rates(made("infinite"), 10**6)
    assert found.shape == (10**6,) and found.dtype == np.float64 and found[-1] < found[10**5]


def test_a_schedule_comes_from_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# factors\n0.5\n1.0  # the peak\n\n0.25\n")
    config = ScheduleConfig(2.0, f"file:{path}")
    np.testing.assert_array_equal(rates(config, 3), [1, 2, 0.5])
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(make_schedule(config, 2)))(jnp.arange(2)), [1, 2]
    )
    with pytest.raises(
        ConfigError, match="numbers for 3 updates, and train.steps = 4: train for 3"
    ):
        rates(config, 4)
    for text, line in (("1\nhalf\n", 2), ("-1\n", 1), ("nan\n", 1), ("1\n1e999\n", 2)):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"line {line} of .*mine.txt is"):
            rates(config, 1)
    with pytest.raises(ConfigError, match="other.txt cannot be read: No such file"):
        rates(ScheduleConfig(1.0, f"file:{tmp_path}/other.txt"), 1)
    with pytest.raises(ConfigError, match="schedule of a file has its own"):
        ScheduleConfig(1.0, f"file:{path}", warmup_steps=5)


def test_a_run_keeps_the_file_that_it_began_with(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("1\n0.5\n")
    config = OptimizerConfig(schedule=f"file:{path}")
    keep_schedule(config, 2, tmp_path, None)
    assert (tmp_path / "schedule.txt").read_text() == "1.0\n0.5\n"
    keep_schedule(config, 2, tmp_path, 1)
    path.write_text("1\n0.25\n")
    with pytest.raises(CheckpointError, match="update 1 is 0.25 of the peak, was 0.5"):
        keep_schedule(config, 2, tmp_path, 1)
    keep_schedule(config, 2, tmp_path, None)  # another run begins
    keep_schedule(OptimizerConfig(), 2, tmp_path, None)
    assert (tmp_path / "schedule.txt").read_text() == "1.0\n0.25\n"


def test_phases_in_tokens_are_whole_updates():
    config = default_config()
    config.data.update(batch_size=4, seq_len=100)
    config.optimizer.update(phases_in="tokens", warmup_steps=10_100, schedule="multi_step")
    with config.unlocked():
        config.optimizer.milestones = (1, 40_000)
    found = settings(config).optimizer
    assert (found.warmup_steps, found.milestones) == (25, (1, 100))
    assert isinstance(found, OptimizerConfig) and found.phases_in == "steps"
    config.optimizer.warmup_steps, config.optimizer.schedule = 400_000, "cosine"
    with pytest.raises(ConfigError, match=r"warmup_steps = 1000 .* \(in updates; .* 400 each\)"):
        settings(config)
    with pytest.raises(ConfigError, match="see schedules.in_steps"):
        rates(ScheduleConfig(phases_in="tokens"), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(schedule="cosin"), "'cosin' is unknown; did you mean 'cosine'.*infinite, file:PATH"),
        (
            dict(warmup_steps=50),
            "steps = 50 leaves .*train.steps = 40.* = 39 is the longest",
        ),
        (dict(warmup_steps=20, end_step=20), "nothing of optimizer.end_step = 20 .* = 19 is the"),
        (
            dict(schedule="wsd", warmup_steps=30, decay_steps=20),
            "30 and optimizer.decay_steps = 20 together exceed train.steps = 40: "
            "warmup_steps = 20 or decay_steps = 10 or train.steps = 50 would fit",
        ),
        (
            dict(schedule="infinite", cooldown_steps=50, decay_steps=5),
            "cooldown_steps = 50 and .* exceed .*: cooldown_steps = 35 or train.steps = 55 would",
        ),
        (dict(schedule="infinite"), "'infinite' needs optimizer.cooldown_steps > 0"),
        (dict(schedule="cyclical"), "'cyclical' needs optimizer.cycle_steps > 0"),
        (dict(schedule="multi_step"), "'multi_step' needs optimizer.milestones$"),
        (dict(schedule="multi_step", milestones=(4, 40)), "40 is not below .* 39 is the last"),
        (
            dict(schedule="rewarmed", rewarm_start=10, warmup_steps=10),
            "nothing of optimizer.rewarm_start = 10 .*warmup_steps = 9",
        ),
        (
            dict(schedule="wsd", decay_steps=5, decay_shape="exponential", final_fraction=0.0),
            "final_fraction = 0 is no end of an exponential decay",
        ),
        (
            dict(schedule="infinite", cooldown_steps=5, decay_steps=5, constant_fraction=0.0),
            "constant_fraction = 0 is no end of an exponential decay",
        ),
        (
            dict(schedule="rewarmed", rewarm_start=18, rewarm_steps=9, end_step=20),
            "together exceed optimizer.end_step = 20: .* or optimizer.end_step = 27 would fit",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(options, message):
    with pytest.raises(ConfigError, match=message):
        rates(ScheduleConfig(**options), STEPS)
