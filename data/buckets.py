"""Means of a loss by a token's position in its sequence: what longer contexts help or break."""

from collections.abc import Sequence

import numpy as np


def position_buckets(length: int, first: int = 16, factor: float = 2.0) -> np.ndarray:
    """Returns edges 0, first, first * factor, ... and `length`: int64, increasing.

    Raises:
      ValueError: a number below 1, or a factor of at most 1.
    """
    if length < 1 or first < 1:
        raise ValueError(f"length={length} and first={first} must be at least 1")
    if factor <= 1:
        raise ValueError(f"factor={factor} must be above 1")
    edges, edge = [0], float(first)
    while max(round(edge), edges[-1] + 1) < length:
        edges.append(max(round(edge), edges[-1] + 1))
        edge *= factor
    return np.asarray([*edges, length], np.int64)


def mean_by_position(
    losses: np.ndarray,
    positions: np.ndarray,
    edges: Sequence[int],
    weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (means, weights) [buckets] of losses by position, from edges[i] to edges[i+1] - 1.

    To join batches, add up means * weights and weights. Tokens outside all buckets are left out.

    Args:
      losses: one a token, any shape, e.g. [B, T].
      positions: integers of the same shape, or [T] if all rows have the same.
      edges: increasing; one more than there are buckets.
      weights: how much a token counts, of the losses' shape; None: 1 each.

    Returns:
      float64; the mean of a bucket of weight 0 is NaN.

    Raises:
      ValueError: shapes that do not agree, or edges that do not increase.
    """
    losses, edges = np.asarray(losses, np.float64), np.asarray(edges)
    if edges.ndim != 1 or len(edges) < 2 or (np.diff(edges) <= 0).any():
        raise ValueError(f"edges={edges.tolist()} must be at least two increasing numbers")
    try:
        positions = np.broadcast_to(positions, losses.shape)
        counts = np.broadcast_to(1.0 if weights is None else weights, losses.shape)
    except ValueError as error:
        raise ValueError(f"positions and weights must have the losses' shape: {error}") from error
    counts = np.asarray(counts, np.float64)

    # The bucket of each token, and sums over each bucket.
    bucket = np.searchsorted(edges, positions, side="right") - 1
    inside = (bucket >= 0) & (bucket < len(edges) - 1) & (counts > 0)
    total, weight = (
        np.bincount(bucket[inside], weights=values[inside], minlength=len(edges) - 1)
        for values in (np.where(inside, losses, 0.0) * counts, counts)
    )
    return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0), weight
