"""Copying and recall by constructed queries, keys and values, against the theorems."""

import math

import pytest

from tilescan.experiments.measurements import copying


def test_required_scores_follow_the_theorems():
    settings = {"lengths": (3, 20), "tolerance": 0.1}
    attention = copying.required_score({**settings, "mechanism": copying.ATTENTION}, 0)
    assert attention["scores"] == pytest.approx(
        [math.log(n * (2 / 0.1 - 1)) for n in (3, 20)], rel=1e-3
    )
    state = copying.required_score({**settings, "mechanism": copying.STATE, "decay": 0.5}, 0)
    assert state["scores"] == pytest.approx([0.9 * 2.0**n for n in (3, 20)], rel=1e-3)


def test_a_state_recalls_all_items_while_keys_are_orthogonal():
    settings = {"state_dim": 8, "vocab": 5, "items": (8, 64), "trials": 4, "sharpness": 50.0}
    found = copying.recall(settings, 0)
    assert found[copying.STATE][0] == 1.0
    assert found[copying.STATE][1] < 0.9  # 64 items in 8 dimensions interfere
    assert found[copying.ATTENTION][0] == 1.0
