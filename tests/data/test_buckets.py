"""Means by position, against a loop."""

import numpy as np
import pytest

from tilescan.data.buckets import mean_by_position, position_buckets


def test_means_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    losses, weights = rng.random((4, 50)), rng.integers(0, 3, (4, 50)) / 2
    positions = rng.integers(0, 60, (4, 50))
    edges = [2, 10, 30, 45]
    means, counted = mean_by_position(losses, positions, edges, weights)
    for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        chosen = [
            (losses[b, t], weights[b, t])
            for b in range(4)
            for t in range(50)
            if low <= positions[b, t] < high
        ]
        total = sum(weight for _, weight in chosen)
        assert counted[i] == pytest.approx(total)
        assert means[i] == pytest.approx(sum(loss * weight for loss, weight in chosen) / total)


def test_one_row_of_positions_serves_all_and_nan_that_does_not_count_stays_out():
    losses = np.asarray([[1.0, 2.0, np.nan, 4.0], [3.0, 4.0, 5.0, np.nan]])
    weights = np.asarray([[1, 1, 0, 1], [1, 1, 1, 0]])
    means, counted = mean_by_position(losses, np.arange(4), [0, 2, 4, 9], weights)
    assert counted.tolist() == [4, 2, 0]
    assert means[:2].tolist() == [2.5, 4.5] and np.isnan(means[2])
    plain, counted = mean_by_position(losses[:, :2], np.arange(2), [0, 1, 2])
    assert plain.tolist() == [2.0, 3.0] and counted.tolist() == [2, 2]


def test_edges_double():
    assert position_buckets(100).tolist() == [0, 16, 32, 64, 100]
    assert position_buckets(16).tolist() == [0, 16]
    assert position_buckets(5, first=1, factor=1.2).tolist() == [0, 1, 2, 3, 4, 5]
    assert position_buckets(8, first=20).tolist() == [0, 8]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="must be at least two increasing numbers"):
        mean_by_position(np.zeros(3), np.arange(3), [0, 2, 2])
    with pytest.raises(ValueError, match="must have the losses' shape"):
        mean_by_position(np.zeros((2, 3)), np.arange(4), [0, 2])
    with pytest.raises(ValueError, match="factor=1 must be above 1"):
        position_buckets(8, factor=1)
