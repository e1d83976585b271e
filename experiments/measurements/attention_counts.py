"""The cost of exact attention by counting: tiles, memory traffic and FLOPs, without a device.

The loops of FlashAttention (arXiv 2205.14135, algorithm 1) and FlashAttention-2 (arXiv 2307.08691,
algorithm 1) in NumPy, each step counted as it is done. They compute attention as well, so a test
compares them with the dense result: what is counted is a correct algorithm.

Dimensions: T queries and S keys of one head, D head dim; tiles of I queries and J keys.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from tilescan.ops import masks


@dataclasses.dataclass
class Counts:
    """FLOPs and traffic of one head.

    Attributes:
      visits: tiles of scores that were computed.
      matmul_flops: multiplications and additions in matrix products.
      exps: exponentials.
      rescales: multiplications that correct the output for a new maximum.
      divisions: divisions of elements of the output.
      reads, writes: elements between large and on-chip memory.
    """

    visits: int = 0
    matmul_flops: int = 0
    exps: int = 0
    rescales: int = 0
    divisions: int = 0
    reads: int = 0
    writes: int = 0

    @property
    def other_ops(self) -> int:
        """FLOPs outside matrix products in which the two papers differ."""
        return self.exps + self.rescales + self.divisions

    @property
    def traffic(self) -> int:
        """Elements moved between large and on-chip memory."""
        return self.reads + self.writes


def block_sizes(on_chip: int, head_dim: int) -> tuple[int, int]:
    """Returns the paper's (I, J) for M = `on_chip` elements: J = ceil(M / 4D), I = min(J, D)."""
    block_k = -(-on_chip // (4 * head_dim))
    return min(block_k, head_dim), block_k


def flash_1(
    q: Float[np.ndarray, "T D"],
    k: Float[np.ndarray, "S D"],
    v: Float[np.ndarray, "S D"],
    mask: masks.Mask,
    block_q: int,
    block_k: int,
) -> tuple[Float[np.ndarray, "T D"], Float[np.ndarray, " T"], Counts]:
    """Computes FlashAttention: keys in the outer loop, O and its statistics moved at each visit.

    Args:
      q, k, v: float64.
      mask: of `ops.masks`, without Segments.
      block_q, block_k: I and J.

    Returns:
      (o [T, D], lse [T], Counts).
    """
    T, D = q.shape
    S = k.shape[0]
    kinds = masks.tile_kinds(mask, T, S, block_q, block_k)[0]
    o, total, peak = np.zeros((T, D)), np.zeros(T), np.full(T, -np.inf)
    count = Counts()
    for j in range(kinds.shape[1]):
        columns = slice(j * block_k, min((j + 1) * block_k, S))
        count.reads += 2 * k[columns].size  # K_j and V_j
        for i in range(kinds.shape[0]):
            if kinds[i, j] == masks.EMPTY:
                continue
            # The tile's weights, relative to its own maximum.
            rows = slice(i * block_q, min((i + 1) * block_q, T))
            count.reads += 2 * q[rows].size + 2 * len(o[rows])  # Q_i, O_i, l_i, m_i
            weights, tile_peak = _weights(q, k, mask, rows, columns, count)
            # Old and new sums relative to the new maximum.
            new_peak = np.maximum(peak[rows], tile_peak)
            old_factor = np.exp(peak[rows] - _finite(new_peak))
            new_factor = np.exp(tile_peak - _finite(new_peak))
            count.exps += old_factor.size + new_factor.size
            new_total = old_factor * total[rows] + new_factor * weights.sum(1)
            # O_i is rescaled, added to and divided at every visit.
            product = weights @ v[columns]
            count.matmul_flops += 2 * weights.size * D
            scaled = (total[rows] * old_factor)[:, None] * o[rows] + new_factor[:, None] * product
            count.rescales += 2 * scaled.size
            o[rows] = scaled / np.where(new_total == 0, 1, new_total)[:, None]
            count.divisions += scaled.size
            total[rows], peak[rows] = new_total, new_peak
            count.writes += q[rows].size + 2 * len(o[rows])  # O_i, l_i, m_i
    return o, _log(total) + peak, count


def flash_2(
    q: Float[np.ndarray, "T D"],
    k: Float[np.ndarray, "S D"],
    v: Float[np.ndarray, "S D"],
    mask: masks.Mask,
    block_q: int,
    block_k: int,
) -> tuple[Float[np.ndarray, "T D"], Float[np.ndarray, " T"], Counts]:
    """Computes FlashAttention-2: queries in the outer loop, O stays on chip and is divided once.

    Arguments and result as for `flash_1`.
    """
    T, D = q.shape
    S = k.shape[0]
    kinds = masks.tile_kinds(mask, T, S, block_q, block_k)[0]
    o, lse = np.zeros((T, D)), np.zeros(T)
    count = Counts()
    for i in range(kinds.shape[0]):
        rows = slice(i * block_q, min((i + 1) * block_q, T))
        acc = np.zeros_like(o[rows])
        total, peak = np.zeros(len(acc)), np.full(len(acc), -np.inf)
        count.reads += q[rows].size  # Q_i, once
        for j in range(kinds.shape[1]):
            if kinds[i, j] == masks.EMPTY:
                continue
            # The tile's weights, relative to the maximum so far.
            columns = slice(j * block_k, min((j + 1) * block_k, S))
            count.reads += 2 * k[columns].size  # K_j and V_j
            weights, new_peak = _weights(q, k, mask, rows, columns, count, peak)
            # The accumulator is rescaled and added to, and not divided.
            factor = np.exp(peak - _finite(new_peak))
            count.exps += factor.size
            total = factor * total + weights.sum(1)
            acc = factor[:, None] * acc + weights @ v[columns]
            count.matmul_flops += 2 * weights.size * D
            count.rescales += acc.size
            peak = new_peak
        # One division for each element of O_i.
        o[rows] = acc / np.where(total == 0, 1, total)[:, None]
        count.divisions += acc.size
        lse[rows] = _log(total) + peak
        count.writes += acc.size + len(acc)  # O_i and L_i, once
    return o, lse, count


def replay(
    loop: Callable[..., tuple], length: int, head_dim: int, mask: masks.Mask, *tile: int, seed: int
) -> Counts:
    """Returns the counts of `flash_1` or `flash_2` on one head of random numbers.

    Args:
      loop: one of the two.
      length: T = S.
      head_dim: D.
      mask: as of the loops.
      *tile: I and J.
      seed: of the numbers.
    """
    q, k, v = np.random.default_rng(seed).normal(size=(3, length, head_dim))
    return loop(q, k, v, mask, *tile)[2]


def standard_traffic(length: int, head_dim: int, backward: bool = False) -> int:
    """Returns the elements that standard attention moves per head (algorithms 0 and 3).

    S and P are stored. Forward: each is written and read. Backward: P is read twice, dP written and
    read, dS written and read twice.
    """
    square, long = length**2, length * head_dim
    forward = 4 * square + 4 * long
    return forward + (7 * square + 8 * long if backward else 0)


def flash_backward_traffic(length: int, head_dim: int, block_k: int) -> int:
    """Returns the elements that FlashAttention's backward pass moves per head (algorithm 4).

    For each tile of keys: K, V in; for all queries Q, O, dO, dQ, l and m in, dQ out; dK, dV out.
    """
    visits = -(-length // block_k)
    long = length * head_dim
    return 4 * long + visits * (5 * long + 2 * length)


def loops(settings: Mapping[str, Any], seed: int) -> dict[str, dict[str, int]]:
    """Counts both loops on one head; a cell's measurement.

    Settings: length, head_dim, causal, block_q, block_k. Returns {"fa1", "fa2": the numbers of
    `Counts`}.
    """
    length, head_dim, *tile = (settings[k] for k in ("length", "head_dim", "block_q", "block_k"))
    mask = masks.Causal() if settings["causal"] else masks.Full()
    found = {}
    for name, loop in (("fa1", flash_1), ("fa2", flash_2)):
        count = replay(loop, length, head_dim, mask, *tile, seed=seed)
        numbers = vars(count) | {"other_ops": count.other_ops, "traffic": count.traffic}
        found[name] = {key: int(value) for key, value in numbers.items()}
    return found


def causal_tiles(settings: Mapping[str, Any], seed: int) -> dict[str, int]:
    """Counts the tiles of a causal mask, as the op's mask algebra tells them apart.

    Settings: side (tiles a side), block (queries and keys of a tile). Returns {"all", "live",
    "partial"}; a partial tile is live and needs the mask of its elements.
    """
    length, block = settings["side"] * settings["block"], settings["block"]
    kinds = masks.tile_kinds(masks.Causal(), length, length, block, block)
    return {
        "all": kinds.size,
        "live": int(masks.live_tiles(kinds)),
        "partial": int(np.sum(kinds == masks.PARTIAL)),
    }


def traffic(settings: Mapping[str, Any], seed: int) -> dict[str, int]:
    """Counts the elements that FlashAttention and standard attention move; a cell's measurement.

    Settings: length, head_dim, on_chip (elements of on-chip memory).
    """
    length, head_dim = settings["length"], settings["head_dim"]
    block_q, block_k = block_sizes(settings["on_chip"], head_dim)
    count = replay(flash_1, length, head_dim, masks.Full(), block_q, block_k, seed=seed)
    backward = flash_backward_traffic(length, head_dim, block_k)
    return {
        "block_q": block_q,
        "block_k": block_k,
        "visits": count.visits,
        "forward": count.traffic,
        "forward_backward": count.traffic + backward,
        "standard_forward": standard_traffic(length, head_dim),
        "standard_forward_backward": standard_traffic(length, head_dim, backward=True),
    }


def sparse_traffic(settings: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Counts the elements that block-sparse FlashAttention moves forward; a cell's measurement.

    Settings: length, head_dim, block (side of the layout's blocks and of the tiles), factors (of
    the butterfly).
    """
    length, head_dim, block = settings["length"], settings["head_dim"], settings["block"]
    layout = masks.butterfly(-(-length // block), settings["factors"])
    mask = masks.BlockSparse(layout, block)
    count = replay(flash_1, length, head_dim, mask, block, block, seed=seed)
    return {
        "live_fraction": float(layout.mean()),
        "visits": count.visits,
        "forward": count.traffic,
        "matmul_flops": count.matmul_flops,
    }


def _weights(q, k, mask, rows, columns, count: Counts, floor=None):
    """Returns exp(scores - maximum) of one tile and the maximum, which is at least `floor`."""
    scores = q[rows] @ k[columns].T * q.shape[1] ** -0.5
    count.visits += 1
    count.matmul_flops += 2 * scores.size * q.shape[1]
    # The last query is aligned with the last key.
    positions = np.arange(rows.start, rows.stop)[:, None] + k.shape[0] - q.shape[0]
    visible = mask(positions, np.arange(columns.start, columns.stop)[None, :])
    scores = np.where(visible, scores, -np.inf)
    peak = scores.max(1)
    peak = peak if floor is None else np.maximum(peak, floor)
    count.exps += scores.size
    return np.exp(scores - _finite(peak)[:, None]), peak


def _finite(peak):
    """Returns maxima with 0 for those of rows that have seen no key, so that nothing is NaN."""
    return np.where(np.isneginf(peak), 0.0, peak)


def _log(total):
    with np.errstate(divide="ignore"):
        return np.log(total)
