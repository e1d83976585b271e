"""What learning curves say, by curves whose answer is known."""

import pytest

from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.measurements import learning_curves


def record(exact, accuracy=(), decay_steps=0, seed=0):
    """Validated every 10 of 60 steps of 10 rows (and before the first), less the decay."""
    count = max(len(exact), len(accuracy))
    result = {
        "examples": [100 * i for i in range(count)],
        "validation_exact": list(exact),
        "validation_accuracy": list(accuracy or exact),
    }
    train = {"train.steps": 60 + decay_steps, "data.batch_size": 10}
    train |= {"optimizer.decay_steps": decay_steps} if decay_steps else {}
    return Record("paper", f"cell-{seed}", "", {"train": train}, seed, result, 1.0, {})


def test_examples_are_those_of_each_seed_and_the_fastest_is_compared():
    runs = Records([record([0.0, 0.5, 0.9]), record([0.0, 0.9, 0.8], seed=1)])
    assert learning_curves.needed(runs, 0.9) == [200, 100]
    assert learning_curves.times_as_many(runs, 0.9, 50) == (2.0, False)


def test_a_share_that_no_seed_reaches_needs_more_than_the_budget():
    runs = Records([record([0.0, 0.5, 0.6]), record([0.0, 0.1, 0.2], seed=1)])
    assert learning_curves.needed(runs, 0.9) == [None, None]
    assert learning_curves.times_as_many(runs, 0.9, 50) == (4.0, True)


@pytest.mark.parametrize("decay_steps", [0, 10])
def test_late_gain_compares_the_last_two_thirds_before_the_decay(decay_steps):
    # Before the first step, two validations a third, and what the decay adds.
    curve = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7] + [1.0] * (decay_steps // 10)
    flat = [0.0, 0.1, 0.2, 0.5, 0.5, 0.5, 0.5] + [1.0] * (decay_steps // 10)
    runs = Records([record(curve, decay_steps=decay_steps)])
    assert learning_curves.late_gain(runs) == pytest.approx(0.6 - 0.35)
    both = Records([*runs, record(flat, decay_steps=decay_steps, seed=1)])
    assert learning_curves.late_gain(both) == pytest.approx((0.6 - 0.35) / 2)
