"""The stream of pairs: what counts can be known, lags are bounded, splits don't overlap."""

import numpy as np
import pytest

from tilescan.data.tasks.base import row_hashes
from tilescan.data.tasks.recall_stream import distant_recall, recall_stream

KEYS, VALUES = 12, 5


def replay(tokens, weights, targets, window):
    """Checks a row against a dictionary that is filled while reading; the lags that occurred."""
    known, order, lags = {}, [], []
    for t in range(0, len(tokens), 2):
        key, value = tokens[t : t + 2]
        assert weights[t + 1] == 0
        if key == KEYS + VALUES:
            assert value == key and weights[t] == 0
            continue
        assert key < KEYS <= value < KEYS + VALUES
        if weights[t]:
            assert targets[t] == value == known[key]
            lags.append(order[::-1].index(key) + 1)
        known[key] = value
        order.append(key)
    assert not lags or max(lags) <= window
    return lags


@pytest.mark.parametrize("hard", [False, True])
def test_repeated_keys_have_their_last_value(hard):
    task = recall_stream(length=120, keys=KEYS, values=VALUES, window=3)
    batch = task.sample(np.random.default_rng(0), 8, hard)
    assert batch["tokens"].max() == KEYS + VALUES == task.vocab_size - 1
    lags = [
        lag
        for row in zip(batch["tokens"], batch["weights"], batch["targets"], strict=True)
        for lag in replay(*row, window=3 if hard else 60)
    ]
    assert 0.3 < len(lags) / (8 * 60) < 0.6  # half of those that are no blank
    assert (max(lags) > 3) == (not hard)


def test_splits_have_no_row_in_common():
    task = recall_stream(length=16, keys=KEYS, values=VALUES)
    train, test = (set(row_hashes(task.rows(s, 200, (1,), True))) for s in ("train", "test"))
    assert not train & test


def test_the_asked_key_came_once_at_its_depth():
    tokens, value = distant_recall(np.random.default_rng(1), 10, 42, KEYS, VALUES)
    assert tokens.shape == (10, 42) and len(set(tokens[:, -1])) > 1
    for i, row in enumerate(tokens):
        (at,) = np.flatnonzero(row[:-1] == row[-1])
        assert at == 1 + 2 * (2 * i + 1)  # 20 pairs, 10 rows: every second one
        assert row[at + 1] == value[i] and row[0] == KEYS + VALUES
        assert row.max() <= KEYS + VALUES and (row[2:-1:2] >= KEYS).all()
        assert ((row[1:-1:2] < KEYS) | (row[1:-1:2] == KEYS + VALUES)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(length=7), "length=7 must be even"),
        (dict(keys=0), "keys=0"),
        (dict(blank=1.0), "blank=1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        recall_stream(**options)
    with pytest.raises(ValueError, match="length=3"):
        distant_recall(np.random.default_rng(0), 2, 3)
