"""The counted loops compute attention, and their counts obey the papers' formulas."""

import numpy as np
import pytest

from tilescan.experiments.measurements import attention_counts as counts
from tilescan.ops import masks

D = 16
MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(10, 3),
    "butterfly": masks.BlockSparse(masks.butterfly(7, 2), 16),
}


def dense(q, k, v, mask):
    T, S = len(q), len(k)
    visible = mask(np.arange(T)[:, None] + S - T, np.arange(S)[None, :])
    scores = np.where(visible, q @ k.T * q.shape[1] ** -0.5, -np.inf)
    peak = scores.max(1, keepdims=True)
    weights = np.exp(scores - peak)
    total = weights.sum(1, keepdims=True)
    return weights @ v / total, (peak + np.log(total))[:, 0]


@pytest.mark.parametrize("loop", [counts.flash_1, counts.flash_2])
@pytest.mark.parametrize("blocks", [(16, 32), (7, 13), (128, 128), (1, 100)])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_both_loops_compute_attention(loop, blocks, mask):
    q, k, v = np.random.default_rng(0).normal(size=(3, 100, D))
    o, lse, _ = loop(q, k, v, mask, *blocks)
    o_dense, lse_dense = dense(q, k, v, mask)
    np.testing.assert_allclose(o, o_dense, atol=1e-13)
    np.testing.assert_allclose(lse, lse_dense, atol=1e-13)


def test_hand_value_is_the_same_for_every_split():
    # Logits (ln 1, ln 2, ln 5) and values 1, 2, 4: O = 25 / 8, L = ln 8.
    q, k = np.array([[1.0]]), np.log([[1.0], [2.0], [5.0]])
    v = np.array([[1.0], [2.0], [4.0]])
    for block_k in (1, 2, 3):
        for loop in (counts.flash_1, counts.flash_2):
            o, lse, _ = loop(q, k, v, masks.Full(), 1, block_k)
            assert o[0, 0] == pytest.approx(3.125) and lse[0] == pytest.approx(np.log(8))


@pytest.mark.parametrize("loop", [counts.flash_1, counts.flash_2])
def test_rows_that_see_nothing_are_zero(loop):
    q, k, v = np.random.default_rng(0).normal(size=(3, 8, D))
    mask = masks.BlockSparse(np.array([[True, False], [False, False]]), 4)
    o, lse, _ = loop(q, k, v, mask, 4, 4)
    assert np.all(o[4:] == 0) and np.all(np.isneginf(lse[4:])) and np.all(np.isfinite(o))


def test_counts_of_full_attention_follow_from_the_tiles():
    T, I, J = 96, 16, 32
    q, k, v = np.random.default_rng(0).normal(size=(3, T, D))
    tiles = (T // I) * (T // J)
    one = counts.flash_1(q, k, v, masks.Full(), I, J)[2]
    two = counts.flash_2(q, k, v, masks.Full(), I, J)[2]
    assert one.visits == two.visits == tiles
    assert one.matmul_flops == two.matmul_flops == 4 * T * T * D
    assert one.exps == T * T + 2 * T * (T // J) and two.exps == T * T + T * (T // J)
    assert one.rescales == 2 * T * D * (T // J) and two.rescales == T * D * (T // J)
    assert one.divisions == T * D * (T // J) and two.divisions == T * D
    assert one.reads == 2 * T * D + (T // J) * (2 * T * D + 2 * T)
    assert one.writes == (T // J) * (T * D + 2 * T) and two.writes == T * D + T
    assert two.reads == T * D + (T // I) * 2 * T * D


def test_causal_visits_the_lower_triangle_of_tiles():
    q, k, v = np.random.default_rng(0).normal(size=(3, 128, D))
    for n in (2, 4, 8):
        side = 128 // n
        assert counts.flash_2(q, k, v, masks.Causal(), side, side)[2].visits == n * (n + 1) // 2


def test_traffic_is_inverse_to_on_chip_memory():
    settings = {"length": 512, "head_dim": D}
    result = [counts.traffic({**settings, "on_chip": size}, 0) for size in (1024, 2048, 4096)]
    moved = [r["forward"] - 2 * 512 * D for r in result]  # K and V are read once at any size
    assert moved[0] == 2 * moved[1] == 4 * moved[2]
    assert result[0]["standard_forward"] == 4 * 512**2 + 4 * 512 * D
    assert result[0]["standard_forward_backward"] == 11 * 512**2 + 12 * 512 * D


def test_sparse_traffic_is_proportional_to_the_live_fraction():
    base = {"length": 256, "head_dim": D, "block": 32}
    dense, sparse = (counts.sparse_traffic({**base, "factors": f}, 0) for f in (3, 0))
    assert sparse["live_fraction"] == 1 / 8 and dense["live_fraction"] == 4 / 8
    assert dense["visits"] == 4 * sparse["visits"]
    assert dense["matmul_flops"] == 4 * sparse["matmul_flops"]


def test_block_sizes_are_the_papers():
    assert counts.block_sizes(98304, 64) == (64, 384)
    assert counts.block_sizes(1000, 64) == (4, 4)
