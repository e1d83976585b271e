"""Rows that go on over several steps."""

import numpy as np

from tilescan.training.carried_state import in_parts


def test_parts_follow_one_another_in_a_row():
    made = []

    def long_rows(step):
        made.append(step)
        return {"tokens": 100 * step + np.arange(12).reshape(1, 12)}

    part = in_parts(long_rows, length=4, carry=3)
    shown = np.concatenate([part(step)["tokens"] for step in range(6)], axis=1)
    np.testing.assert_array_equal(shown[0], [*range(12), *range(300, 312)])
    assert made == [0, 3]  # a long row is made once for its parts
