"""A sweep makes a cell for each point; predicates tell a refutation from a missing measurement."""

from tilescan.experiments.harness import claims
from tilescan.experiments.harness.cells import sweep


def test_a_sweep_is_a_grid_of_settings_and_seeds():
    made = sweep("{a}-{b}-s{seed}", max, {"kind": "k"}, seeds=(0, 1), seconds=3, a=(1, 2), b="xy")
    ids = ["1-x-s0", "1-x-s1", "1-y-s0", "1-y-s1", "2-x-s0", "2-x-s1", "2-y-s0", "2-y-s1"]
    assert [cell.id for cell in made] == ids
    assert made[3].settings == {"kind": "k", "a": 1, "b": "y"} and made[3].seed == 1
    assert {cell.seconds for cell in made} == {3}


def test_settings_and_seconds_may_depend_on_the_point_and_points_be_left_out():
    made = sweep(
        "{a}-{b}",
        max,
        lambda a, b: {"sum": a + b},
        seconds=lambda a, b: 10 * a,
        where=lambda a, b: a != b,
        a=(1, 2),
        b=(1, 2),
    )
    assert [cell.id for cell in made] == ["1-2", "2-1"]
    assert made[1].settings == {"sum": 3, "a": 2, "b": 1}
    assert [cell.seconds for cell in made] == [10, 20]


def test_every_condition_must_hold_and_none_is_not_measured():
    assert claims.every([True, True]) is True
    assert claims.every(n < 2 for n in (1, 2)) is False
    assert claims.every([]) is None


def test_numbers_near_a_target_and_at_most_a_bound():
    assert claims.near([1.99, 2.01], 2, 0.01) and claims.near([], 2, 0.01) is None
    assert claims.near([2.0, 2.03], 2, 0.01) is False
    verdict = claims.at_most("c", {"a": 1e-6, "b": 2e-6}, 2e-6)
    assert verdict == claims.Verdict("c", True, "a 1.0e-06, b 2.0e-06")
    verdict = claims.at_most("c", {1: 0.5}, 0.4, "{1:.0%} on {0}")
    assert verdict == claims.Verdict("c", False, "50% on 1")
    assert claims.at_most("c", {}, 1.0).holds is None
