"""What exact attention costs by counting: tiles, memory traffic and operations, without a chip.

The loops of FlashAttention (arXiv 2205.14135, algorithm 1) and FlashAttention-2 (arXiv 2307.08691,
algorithm 1) in NumPy, each step counted as it is done. They compute attention as well, so a test
holds them to the dense result: what is counted is a correct algorithm.

Letters: T queries and S keys of one head, D head dim; tiles of I queries and J keys.
"""

import dataclasses

import numpy as np

from tilescan.ops import masks


@dataclasses.dataclass
class Counts:
    """Operations and traffic of one head.

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
        """Operations outside matrix products that the two papers differ in."""
        return self.exps + self.rescales + self.divisions

    @property
    def traffic(self) -> int:
        """Elements moved between large and on-chip memory."""
        return self.reads + self.writes


def block_sizes(on_chip: int, head_dim: int) -> tuple[int, int]:
    """(I, J) of the paper for `on_chip` elements: J = ceil(M / 4D), I = min(J, D)."""
    block_k = -(-on_chip // (4 * head_dim))
    return min(block_k, head_dim), block_k


def flash_1(q, k, v, mask, block_q: int, block_k: int):
    """FlashAttention: keys in the outer loop, O and its statistics read and written at each visit.

    Args:
      q, k, v: [T, D], [S, D], [S, D], NumPy.
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
            rows = slice(i * block_q, min((i + 1) * block_q, T))
            count.reads += 2 * q[rows].size + 2 * len(o[rows])  # Q_i, O_i, l_i, m_i
            weights, tile_peak = _weights(q, k, mask, rows, columns, count)
            new_peak = np.maximum(peak[rows], tile_peak)
            old_factor = np.exp(peak[rows] - _finite(new_peak))
            new_factor = np.exp(tile_peak - _finite(new_peak))
            count.exps += old_factor.size + new_factor.size
            new_total = old_factor * total[rows] + new_factor * weights.sum(1)
            product = weights @ v[columns]
            count.matmul_flops += 2 * weights.size * D
            scaled = (total[rows] * old_factor)[:, None] * o[rows] + new_factor[:, None] * product
            count.rescales += 2 * scaled.size
            o[rows] = scaled / np.where(new_total == 0, 1, new_total)[:, None]
            count.divisions += scaled.size
            total[rows], peak[rows] = new_total, new_peak
            count.writes += q[rows].size + 2 * len(o[rows])  # O_i, l_i, m_i
    return o, _log(total) + peak, count


def flash_2(q, k, v, mask, block_q: int, block_k: int):
    """FlashAttention-2: queries in the outer loop, O stays on chip and is divided once.

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
            columns = slice(j * block_k, min((j + 1) * block_k, S))
            count.reads += 2 * k[columns].size  # K_j and V_j
            weights, new_peak = _weights(q, k, mask, rows, columns, count, peak)
            factor = np.exp(peak - _finite(new_peak))
            count.exps += factor.size
            total = factor * total + weights.sum(1)
            acc = factor[:, None] * acc + weights @ v[columns]
            count.matmul_flops += 2 * weights.size * D
            count.rescales += acc.size
            peak = new_peak
        o[rows] = acc / np.where(total == 0, 1, total)[:, None]
        count.divisions += acc.size
        lse[rows] = _log(total) + peak
        count.writes += acc.size + len(acc)  # O_i and L_i, once
    return o, lse, count


def standard_traffic(length: int, head_dim: int, backward: bool = False) -> int:
    """Elements that standard attention moves per head (paper's algorithms 0 and 3), S and P stored.

    Forward: S is written and read, P is written and read. Backward: P is read twice, dP written
    and read, dS written and read twice.
    """
    square, long = length**2, length * head_dim
    forward = 4 * square + 4 * long
    return forward + (7 * square + 8 * long if backward else 0)


def flash_backward_traffic(length: int, head_dim: int, block_k: int) -> int:
    """Elements that FlashAttention's backward pass moves per head (paper's algorithm 4).

    For each tile of keys: K, V in; for all queries Q, O, dO, dQ, l and m in, dQ out; dK, dV out.
    """
    visits = -(-length // block_k)
    long = length * head_dim
    return 4 * long + visits * (5 * long + 2 * length)


def _weights(q, k, mask, rows, columns, count: Counts, floor=None):
    """exp(scores - maximum) of one tile and the maximum, which is at least `floor`."""
    scores = q[rows] @ k[columns].T * q.shape[1] ** -0.5
    count.visits += 1
    count.matmul_flops += 2 * scores.size * q.shape[1]
    # The last query stands beside the last key.
    positions = np.arange(rows.start, rows.stop)[:, None] + k.shape[0] - q.shape[0]
    visible = mask(positions, np.arange(columns.start, columns.stop)[None, :])
    scores = np.where(visible, scores, -np.inf)
    peak = scores.max(1)
    peak = peak if floor is None else np.maximum(peak, floor)
    count.exps += scores.size
    return np.exp(scores - _finite(peak)[:, None]), peak


def _finite(peak):
    """Rows that have seen no key yet have no maximum: 0 stands in, so that nothing is NaN."""
    return np.where(np.isneginf(peak), 0.0, peak)


def _log(total):
    with np.errstate(divide="ignore"):
        return np.log(total)
