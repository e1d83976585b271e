"""Masks against their elementwise definition: tiles, bounds, kernels, pytrees, errors."""

import dataclasses
import itertools
import operator
import time

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental import pallas as pl

from tilescan.ops.mask_bands import Band
from tilescan.ops.masks import (
    EMPTY,
    FULL,
    PARTIAL,
    And,
    BlockSparse,
    Causal,
    Full,
    Lambda,
    Mask,
    Or,
    Prefix,
    Segments,
    SlidingWindow,
    as_array,
    butterfly,
    live_tiles,
    picture,
    segments_of,
    split_segments,
    tile_kinds,
    validate,
    within_live_tiles,
)

# --- strategies -------------------------------------------------------------------------------


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Banded(Mask):
    """Any band, also those that few compositions of masks reach."""

    inner: Band

    def band(self):
        return self.inner


bound = st.none() | st.integers(0, 12)
bands = st.one_of(
    st.builds(Banded, st.builds(Band, bound, bound, st.integers(0, 15), bound)),
    st.just(Full()),
    st.just(Causal()),
    st.builds(SlidingWindow, bound, bound),
    st.builds(Prefix, st.integers(0, 25)),
)
layouts = st.builds(
    lambda seed, rows, columns, block, density: BlockSparse(
        np.random.default_rng(seed).random((rows, columns)) < density, block
    ),
    st.integers(0, 99),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 7),
    st.sampled_from([0.1, 0.5, 0.9]),
)
primitives = bands | layouts | st.builds(Lambda, st.integers(0, 9), st.integers(1, 9))


def composed(leaves):
    operators = st.sampled_from([lambda a, b: a & b, lambda a, b: a | b])
    return st.recursive(
        leaves, lambda m: st.builds(lambda f, a, b: f(a, b), operators, m, m), max_leaves=4
    )


@st.composite
def problems(draw, masks):
    """(mask, T, S, block_q, block_k, q_offset): lengths that differ, blocks that divide nothing."""
    T, S = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    block_q, block_k = draw(st.integers(1, 11)), draw(st.integers(1, 11))
    return draw(masks), T, S, block_q, block_k, draw(st.none() | st.integers(-5, 35))


def random_segments(T, S, seed=0, batch=2, ordered=True):
    rng = np.random.default_rng(seed)
    q_ids, kv_ids = rng.integers(0, 4, (batch, T)), rng.integers(0, 4, (batch, S))
    if ordered:
        q_ids, kv_ids = np.sort(q_ids), np.sort(kv_ids)
    return Segments(q_ids.astype(np.int32), kv_ids.astype(np.int32))


def true_kinds(mask, T, S, block_q, block_k, q_offset=None):
    """tile_kinds by looking at every element."""
    seen = np.asarray(as_array(mask, T, S, q_offset)).reshape(-1, T, S)
    kinds = np.zeros((len(seen), -(-T // block_q), -(-S // block_k)), np.int8)
    for m, i, j in np.ndindex(*kinds.shape):
        tile = seen[m, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
        padded = (j + 1) * block_k > S
        kinds[m, i, j] = (FULL if tile.all() and not padded else PARTIAL) if tile.any() else EMPTY
    return kinds


# --- the elementwise definition ---------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.integers(-9, 20), st.integers(0, 20), st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)
)
def test_elementwise_definitions(i, j, a, b, w):
    """Each primitive on plain integers says what its docstring says."""
    assert Full()(i, j)
    assert Causal()(i, j) == (j <= i)
    assert SlidingWindow(a, b)(i, j) == (i - a <= j <= i + b)
    assert SlidingWindow(None, b)(i, j) == (j <= i + b)
    assert SlidingWindow(a, None)(i, j) == (i - a <= j)
    assert Prefix(a)(i, j) == (j < a)
    assert Lambda(a, w)(i, j) == (j <= i and (j < a or i - j < w))
    assert (Causal() | Prefix(a))(i, j) == (j <= i or j < a)
    assert (SlidingWindow(a, b) & Prefix(w))(i, j) == (i - a <= j <= i + b and j < w)


def test_block_sparse_expands_its_layout():
    layout = np.array([[1, 0], [1, 1], [0, 1]], bool)
    whole = as_array(BlockSparse(layout, 3), 9, 6, q_offset=0)
    np.testing.assert_array_equal(whole, np.kron(layout, np.ones((3, 3), bool)))
    outside = BlockSparse(layout, 3)(np.array([-1, 9, 0]), np.array([0, 0, 6]))
    assert not outside.any()


def test_segments_by_row_of_the_queries():
    mask = Causal() & Segments(np.array([[1, 2]]), np.array([[1, 1, 2, 2]]))
    expected = [[True, True, False, False], [False, False, True, True]]
    np.testing.assert_array_equal(as_array(mask, 2, 4), [expected])  # queries stand at 2 and 3
    np.testing.assert_array_equal(as_array(mask, 2, 4, q_offset=0)[0], [[1, 0, 0, 0], [0] * 4])
    assert as_array(Segments(np.array([[1, 1, 2]])), 3, 3).sum() == 5


def test_default_offset_aligns_the_ends():
    np.testing.assert_array_equal(as_array(Causal(), 2, 4), np.tri(2, 4, 2, bool))
    np.testing.assert_array_equal(as_array(Causal(), 4, 2), np.tri(4, 2, -2, bool))
    last_row = as_array(SlidingWindow(2), 7, 7)[-1:]
    np.testing.assert_array_equal(as_array(SlidingWindow(2), 1, 7), last_row)


def numpy_and_jax(problem, with_segments):
    mask, T, S, _, _, q_offset = problem
    mask = mask & random_segments(T, S) if with_segments else mask
    offset = S - T if q_offset is None else q_offset
    expected = as_array(mask, T, S, offset)
    actual = jax.jit(lambda offset: as_array(mask, T, S, offset))(np.int32(offset))
    assert isinstance(expected, np.ndarray)
    assert actual.dtype == expected.dtype == bool
    np.testing.assert_array_equal(actual, expected)


@settings(max_examples=6)
@given(problems(composed(primitives)), st.booleans())
def test_numpy_and_jax_agree(problem, with_segments):
    numpy_and_jax(problem, with_segments)


@pytest.mark.slow
@settings(max_examples=100)
@given(problems(composed(primitives)), st.booleans())
def test_numpy_and_jax_agree_on_many_masks(problem, with_segments):
    numpy_and_jax(problem, with_segments)


# --- tiles ------------------------------------------------------------------------------------


def exact_tiles(problem):
    """Primitives, and those compositions that are bands, are exact."""
    mask = problem[0]
    kinds = tile_kinds(*problem)
    assert isinstance(kinds, np.ndarray) and kinds.dtype == np.int8
    expected = true_kinds(*problem)
    if mask.band() is not None or not isinstance(mask, (And, Or)):
        np.testing.assert_array_equal(kinds, expected)
    else:
        assert ((kinds == expected) | (kinds == PARTIAL)).all()


@settings(max_examples=80)
@given(problems(primitives | composed(bands)))
def test_tile_kinds_exact(problem):
    exact_tiles(problem)


@pytest.mark.slow
@settings(max_examples=300)
@given(problems(primitives | composed(bands)))
def test_tile_kinds_exact_for_many_masks(problem):
    exact_tiles(problem)


SEGMENTED = st.sampled_from(["none", "ordered", "any"])


def conservative_tiles(problem, segments):
    """Nothing live is called empty, nothing partial full; in compositions and with Segments."""
    mask, T, S, *rest = problem
    if segments != "none":
        mask = mask & random_segments(T, S, ordered=segments == "ordered")
    kinds, expected = tile_kinds(mask, T, S, *rest), true_kinds(mask, T, S, *rest)
    assert kinds.shape == expected.shape
    assert ((kinds == expected) | (kinds == PARTIAL)).all()


@settings(max_examples=80)
@given(problems(composed(primitives)), SEGMENTED)
def test_tile_kinds_conservative(problem, segments):
    conservative_tiles(problem, segments)


@pytest.mark.slow
@settings(max_examples=300)
@given(problems(composed(primitives)), SEGMENTED)
def test_tile_kinds_conservative_for_many_masks(problem, segments):
    conservative_tiles(problem, segments)


def traced_and_static(problem, with_segments):
    """A traced offset and traced ids give the same table as static ones."""
    mask, T, S, block_q, block_k, q_offset = problem
    mask = mask & random_segments(T, S) if with_segments else mask
    traced = jax.jit(lambda m, offset: tile_kinds(m, T, S, block_q, block_k, offset))
    offset = S - T if q_offset is None else q_offset
    np.testing.assert_array_equal(traced(mask, offset), tile_kinds(mask, *problem[1:]))


@settings(max_examples=6)
@given(problems(composed(primitives)), st.booleans())
def test_tile_kinds_traced(problem, with_segments):
    traced_and_static(problem, with_segments)


@pytest.mark.slow
@settings(max_examples=60)
@given(problems(composed(primitives)), st.booleans())
def test_tile_kinds_traced_of_many_masks(problem, with_segments):
    traced_and_static(problem, with_segments)


def test_ordered_segments_are_exact():
    ids = np.repeat([1, 2, 3, 4], [5, 1, 12, 6])[None]
    problem = Segments(ids), 24, 24, 4, 3
    np.testing.assert_array_equal(tile_kinds(*problem), true_kinds(*problem))


def test_known_table_and_counts():
    kinds = tile_kinds(Causal(), 4, 4, 2, 2)
    np.testing.assert_array_equal(kinds, [[[PARTIAL, EMPTY], [FULL, PARTIAL]]])
    assert live_tiles(kinds) == 3
    n = 64  # a window of 8 blocks' keys: the diagonal, 7 full ones and one partial below it
    kinds = tile_kinds(SlidingWindow(8 * 16), n * 16, n * 16, 16, 16)
    assert live_tiles(kinds) == sum(min(i, 8) + 1 for i in range(n))
    assert (kinds == FULL).sum() == sum(min(i, 7) for i in range(n))


def test_padding_of_the_last_key_tile_is_partial():
    np.testing.assert_array_equal(
        tile_kinds(Full(), 5, 5, 4, 4), [[[FULL, PARTIAL], [FULL, PARTIAL]]]
    )


@pytest.mark.parametrize("mask", [Full(), Causal() & SlidingWindow(5), Segments(np.zeros((1, 2)))])
def test_a_mask_has_no_truth_value(mask):
    """`Causal() and SlidingWindow(5)` would be the window alone."""
    with pytest.raises(TypeError, match="masks compose with & and |, not with `and`"):
        mask and SlidingWindow(5)
    with pytest.raises(TypeError, match="has no truth value"):
        not mask  # noqa: B018


def test_composition_keeps_batch_of_segments():
    segments = Segments(np.array([[1, 1, 2, 2], [1, 1, 1, 1]]))
    kinds = tile_kinds(Full() & segments | Prefix(0), 4, 4, 2, 2)
    np.testing.assert_array_equal(kinds, [[[2, 0], [0, 2]], [[2, 2], [2, 2]]])


def test_a_million_tokens():
    """2048 x 2048 tiles in well under a second, whatever the mask."""
    length, block = 2**20, 512
    layout = BlockSparse(butterfly(2048), 512)
    for mask in (Causal() & SlidingWindow(4096), Causal() & layout, Lambda(4, 4096)):
        start = time.perf_counter()
        kinds = tile_kinds(mask, length, length, block, block)
        assert time.perf_counter() - start < 2  # 0.1 s alone; generous for a busy machine
        assert kinds.shape == (1, 2048, 2048)
    first, last = Causal().key_bounds(np.int32(length - block), np.int32(length - 1), length)
    assert (first, last) == (0, length - 1)


def test_picture():
    np.testing.assert_array_equal(
        picture(Causal(), 4, 4, 2, 2), [[3, 2, 0, 0], [3, 3, 0, 0], [5, 5, 3, 2], [5, 5, 3, 3]]
    )


# --- ranges in closed form --------------------------------------------------------------------


def exact_bounds(problem):
    """The range of every tile is its live keys (queries), with no hole and none missing."""
    mask, T, S, block_q, block_k, q_offset = problem
    offset = S - T if q_offset is None else q_offset
    if mask.band() is None:
        assert isinstance(mask, (And, Or))
        assert mask.key_bounds(0, 0, S) is mask.query_bounds(0, 0, 0, 0) is None
        return
    seen = as_array(mask, T, S, offset)
    for low in range(0, T, block_q):
        high = min(low + block_q, T) - 1
        first, last = mask.key_bounds(offset + low, offset + high, S)
        live = seen[low : high + 1].any(axis=0)
        np.testing.assert_array_equal(live, (first <= np.arange(S)) & (np.arange(S) <= last))
    for low in range(0, S, block_k):
        high = min(low + block_k, S) - 1
        first, last = mask.query_bounds(low, high, offset, offset + T - 1)
        positions = offset + np.arange(T)
        live = seen[:, low : high + 1].any(axis=1)
        np.testing.assert_array_equal(live, (first <= positions) & (positions <= last))


@settings(max_examples=80)
@given(problems(composed(bands)))
def test_key_and_query_bounds(problem):
    exact_bounds(problem)


@pytest.mark.slow
@settings(max_examples=300)
@given(problems(composed(bands)))
def test_key_and_query_bounds_of_many_masks(problem):
    exact_bounds(problem)


def test_band_of_compositions():
    """Of all compositions of three masks: where there is a band, it is the same mask."""
    leaves = [
        Causal(),
        SlidingWindow(2),
        SlidingWindow(1, 3),
        SlidingWindow(None, 1),
        SlidingWindow(3, None),
        Prefix(3),
        Prefix(6),
    ]
    operators = (operator.and_, operator.or_)
    i, j = np.arange(-2, 12)[:, None], np.arange(10)[None, :]
    seen = {mask: mask(i, j) for mask in leaves}
    with_band = 0
    for a, b, c, f, g in itertools.product(leaves, leaves, leaves, operators, operators):
        mask = g(f(a, b), c)
        band = mask.band()
        if band is not None:
            with_band += 1
            whole = g(f(seen[a], seen[b]), seen[c])
            assert (Banded(band)(i, j) == whole).all(), repr(mask)
    assert with_band > 700  # of 1372: losing bands would make compositions slow, not wrong


@pytest.mark.parametrize(
    "mask",
    [
        Full(),
        Causal(),
        SlidingWindow(5),
        SlidingWindow(None, 3),
        Causal() & SlidingWindow(4, 9),
        Causal() | Prefix(7),
        (Causal() | Prefix(7)) & SlidingWindow(6, None),
        SlidingWindow(3) | SlidingWindow(0, 4),
        Prefix(5) & Causal(),
    ],
    ids=repr,
)
def test_bounds_traced_and_vectorised(mask):
    """The masks that kernels bound in closed form; int, numpy and traced give the same."""
    starts = np.arange(0, 40, 8, dtype=np.int32)
    for name, arguments in (
        ("key_bounds", (starts, starts + 7, 40)),
        ("query_bounds", (starts, starts + 7, 0, 39)),
    ):
        bounds = getattr(mask, name)
        whole = np.stack(bounds(*arguments))
        assert whole.shape == (2, 5)
        np.testing.assert_array_equal(
            jax.jit(lambda *a, f=bounds: jnp.stack(f(*a)))(*arguments), whole
        )
        one_by_one = [bounds(int(s), int(s) + 7, *arguments[2:]) for s in starts]
        np.testing.assert_array_equal(np.stack(one_by_one, axis=1), whole)


def test_masks_without_a_range():
    holes = [
        Lambda(1, 2),
        BlockSparse(butterfly(4), 2),
        Segments(np.zeros((1, 4), int)),
        SlidingWindow(2) | Prefix(3),
        Causal() & Segments(np.zeros((1, 4), int)),
    ]
    assert all(m.key_bounds(0, 3, 8) is None for m in holes)


# --- inside kernels ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        Full(),
        Causal(),
        SlidingWindow(3, 2),
        Prefix(5),
        Lambda(2, 4),
        Causal() | Prefix(6),
        (Causal() | Prefix(6)) & Lambda(1, 9),
        (SlidingWindow(5) | Prefix(2)) & Segments(np.repeat([1, 2], 8)[None].astype(np.int32)),
    ],
    ids=repr,
)
def test_visible_inside_a_pallas_kernel(mask):
    """`visible` of 2D index tiles needs no gather and captures no array."""
    T, block = 16, 8

    def kernel(q_ids, k_ids, out):
        rows = jax.lax.broadcasted_iota(jnp.int32, (block, block), 0) + pl.program_id(0) * block
        columns = jax.lax.broadcasted_iota(jnp.int32, (block, block), 1) + pl.program_id(1) * block
        seen = mask.visible(rows, columns, q_ids[...][:, None], k_ids[...][None, :])
        out[...] = seen.astype(jnp.int32)

    segments = segments_of(mask)
    ids = jnp.zeros(T, jnp.int32) if segments is None else jnp.asarray(segments.q_ids[0])
    call = pl.pallas_call(
        kernel,
        grid=(T // block, T // block),
        in_specs=[
            pl.BlockSpec((block,), lambda i, j: (i,)),
            pl.BlockSpec((block,), lambda i, j: (j,)),
        ],
        out_specs=pl.BlockSpec((block, block), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((T, T), jnp.int32),
        interpret=True,
    )
    np.testing.assert_array_equal(call(ids, ids), as_array(mask, T, T).reshape(T, T))


@given(st.integers(0, 99), st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 8]), st.booleans())
def test_within_live_tiles(seed, block_q, block_k, union):
    """On tiles within its blocks a layout is dropped, and partial tiles stay the same."""
    layout = BlockSparse(np.random.default_rng(seed).random((3, 3)) < 0.5, 8)
    mask = SlidingWindow(9, 3) | layout if union else layout & SlidingWindow(9, 3)
    simple = within_live_tiles(mask, block_q, block_k)
    assert simple == SlidingWindow(9, 3)
    kinds = tile_kinds(mask, 24, 24, block_q, block_k)[0]
    whole, rest = as_array(mask, 24, 24), as_array(simple, 24, 24)
    for i, j in np.argwhere(kinds == PARTIAL):
        tile = np.s_[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
        np.testing.assert_array_equal(whole[tile], rest[tile])


def test_within_live_tiles_refuses_what_it_cannot_know():
    layout = BlockSparse(butterfly(4), 8)
    assert within_live_tiles(layout, 8, 8) == Full()
    assert within_live_tiles(Causal(), 7, 5) == Causal()
    assert within_live_tiles(layout & Causal() & Prefix(3), 4, 8, 16) == Causal() & Prefix(3)
    assert within_live_tiles(layout & Causal(), 16, 8) is None
    assert within_live_tiles(layout & Causal(), 8, 8, q_offset=3) is None
    assert within_live_tiles(layout & Causal() | Prefix(3), 8, 8) is None


# --- values, pytrees --------------------------------------------------------------------------


def test_equality_hash_and_repr():
    layout = butterfly(4)
    assert Causal() == Causal() != Full()
    assert SlidingWindow(3) == SlidingWindow(3, 0) != SlidingWindow(3, 1)
    assert BlockSparse(layout, 8) == BlockSparse(layout.copy(), 8) != BlockSparse(layout, 4)
    mask = Causal() & SlidingWindow(3) | BlockSparse(layout, 8)
    same = Causal() & SlidingWindow(3) | BlockSparse(layout.copy(), 8)
    assert mask == same and hash(mask) == hash(same) and len({mask, same}) == 1
    assert Causal() & Prefix(2) != Causal() | Prefix(2)
    assert repr(mask) == (
        "(Causal() & SlidingWindow(left=3, right=0)) | BlockSparse(12 live of 4x4 blocks, block=8)"
    )
    segments = Segments(np.zeros((2, 5), np.int32))
    assert repr(segments) == "Segments(q_ids=int32[2, 5], kv_ids=None)"
    assert segments == segments != Segments(np.zeros((2, 5), np.int32))
    with pytest.raises(TypeError, match="unhashable"):
        hash(Causal() & segments)


def test_masks_are_immutable():
    layout = np.eye(3, dtype=bool)
    mask = BlockSparse(layout, 2)
    layout[:] = True
    assert mask.layout.sum() == 3
    with pytest.raises(ValueError, match="read-only"):
        mask.layout[0, 0] = False
    with pytest.raises(AttributeError):
        SlidingWindow(3).left = 4


def test_composition_is_flat_and_knows_full():
    assert Causal() & Prefix(1) & Prefix(2) == And((Causal(), Prefix(1), Prefix(2)))
    assert Causal() | (Prefix(1) | Prefix(2)) == Or((Causal(), Prefix(1), Prefix(2)))
    assert Full() & Causal() == Causal() & Full() == Causal()
    assert Full() | Causal() == Causal() | Full() == Full()


def test_pytrees_through_jit():
    """Only segment ids are leaves; all else is static, so equal masks share one compilation."""
    assert jax.tree.leaves(Causal() & BlockSparse(butterfly(4), 8) | Lambda(1, 2)) == []
    traces = []

    @jax.jit
    def count(mask):
        traces.append(mask)
        return as_array(mask, 6, 6, jnp.int32(0)).sum()

    layout = np.eye(3, dtype=bool)
    assert count(Causal() & BlockSparse(layout, 2)) == 9
    assert count(Causal() & BlockSparse(layout.copy(), 2)) == 9
    assert len(traces) == 1
    for ids, total in (([1, 1, 1, 2, 2, 2], 12), ([1, 1, 1, 1, 1, 1], 21)):
        assert count(Causal() & Segments(jnp.array([ids]))) == total
    assert len(traces) == 2
    mask = Causal() & Segments(jnp.ones((2, 6), jnp.int32)) | Prefix(2)
    leaves, structure = jax.tree.flatten(mask)
    assert len(leaves) == 1 and repr(jax.tree.unflatten(structure, leaves)) == repr(mask)
    assert isinstance(jax.tree.map(lambda x: x + 1, mask), Mask)


def test_segments_of_and_split():
    segments = Segments(np.zeros((1, 4), int))
    assert segments_of(Causal()) is None
    assert segments_of(Causal() & (Prefix(2) | segments)) is segments
    assert segments_of((Causal() & segments) | (Prefix(1) & segments)) is segments
    assert split_segments(Causal()) == (Causal(), None)
    assert split_segments(segments) == (Full(), segments)
    assert split_segments(Causal() & segments & Prefix(2)) == (Causal() & Prefix(2), segments)
    nested = Causal() & (Prefix(2) | segments)
    assert split_segments(nested) == (nested, None)


# --- butterfly --------------------------------------------------------------------------------


@pytest.mark.parametrize("n,factors", [(8, None), (16, None), (16, 2), (64, 3)])
def test_butterfly_rows(n, factors):
    """Each row has its diagonal block and one per factor, at the distances 1, 2, 4... by XOR."""
    layout = butterfly(n, factors)
    used = int(np.log2(n)) if factors is None else factors
    assert (layout.sum(axis=1) == 1 + used).all() and (layout == layout.T).all()
    assert set(np.flatnonzero(layout[5])) == {5} | {5 ^ 2**k for k in range(used)}


def test_butterfly_sizes():
    assert butterfly(6).shape == (6, 6) and butterfly(1).all()
    with_global = butterfly(16, 2, global_size=3)
    assert with_global[:3].all() and with_global[:, :3].all()
    np.testing.assert_array_equal(with_global[3:, 3:], butterfly(16, 2)[3:, 3:])


# --- bad input --------------------------------------------------------------------------------

IDS = np.ones((2, 8), np.int32)


@pytest.mark.parametrize(
    "make,error,message",
    [
        (
            lambda: SlidingWindow(-1),
            ValueError,
            "SlidingWindow: left=-1 must be at least 0, or None",
        ),
        (lambda: SlidingWindow(2, -3), ValueError, "right=-3 must be at least 0"),
        (lambda: SlidingWindow(2.5), TypeError, "left=2.5 must be an integer or None"),
        (lambda: Prefix(-2), ValueError, "Prefix: n=-2 must be at least 0"),
        (lambda: Prefix(None), TypeError, "n=None must be an integer"),
        (lambda: Lambda(-1, 4), ValueError, "Lambda: sinks=-1 must be at least 0"),
        (lambda: Lambda(1, 0), ValueError, "Lambda: window=0 must be at least 1"),
        (lambda: BlockSparse(np.ones((2, 2), bool), 0), ValueError, "block=0 must be at least 1"),
        (lambda: BlockSparse(np.ones((2, 2)), 4), ValueError, r"float64\[2, 2\]; it must be bool"),
        (
            lambda: BlockSparse(np.ones(3, bool), 4),
            ValueError,
            r"bool\[3\]; it must be bool \[ceil",
        ),
        (lambda: butterfly(0), ValueError, "n_blocks=0 must be at least 1"),
        (lambda: butterfly(4, -1), ValueError, "n_factors=-1 must be at least 0"),
        (lambda: Causal() & np.ones((2, 2), bool), TypeError, "does not support ufuncs"),
        (lambda: np.ones((2, 2), bool) | Causal(), TypeError, "unsupported operand"),
        (lambda: tile_kinds(Causal(), 8, 8, 0, 4), ValueError, "block_q=0 must be at least 1"),
        (lambda: tile_kinds(Causal(), 0, 8, 4, 4), ValueError, "T=0 must be at least 1"),
        (lambda: tile_kinds(Segments(IDS), 4, 8, 4, 4), ValueError, "kv_ids is needed, since T=4"),
        (
            lambda: tile_kinds(Segments(IDS), 9, 9, 4, 4),
            ValueError,
            r"q_ids has shape \[2, 8\]; it must be \[B, T\] = \[B, 9\]",
        ),
        (lambda: as_array(Segments(IDS), 4, 4), ValueError, r"it must be \[B, T\] = \[B, 4\]"),
        (lambda: Segments(IDS).visible(0, 0), ValueError, "visible: q_segments and k_segments"),
        (
            lambda: Segments(IDS).tile_summary(0, 1, 0, 1),
            ValueError,
            "tile_summary: q_segments and k_segments",
        ),
        (
            lambda: segments_of(Segments(IDS) & Segments(IDS + 0)),
            ValueError,
            "can hold one Segments only",
        ),
    ],
)
def test_errors_when_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "mask,shape,error,message",
    [
        ("causal", (2, 8, 8), TypeError, r"mask is a str; it must be a mask of ops.masks, such as"),
        (np.ones((8, 8), bool), (2, 8, 8), TypeError, "mask is a ndarray"),
        (Segments(IDS), (2, 8, 9), ValueError, "kv_ids is needed, since T=8 queries and S=9 keys"),
        (Segments(IDS), (3, 8, 8), ValueError, r"q_ids has shape \[2, 8\]; .*\[B, T\] = \[3, 8\]"),
        (Segments(IDS, IDS), (2, 8, 9), ValueError, r"kv_ids has shape \[2, 8\]; .*= \[2, 9\]"),
        (Segments(IDS * 1.0), (2, 8, 8), TypeError, "q_ids is float64; it must be an array of int"),
        (Segments(IDS, "ids"), (2, 8, 8), TypeError, "kv_ids is str; it must be an array of int"),
        (
            Causal() & BlockSparse(np.ones((2, 3), bool), 4),
            (2, 8, 8),
            ValueError,
            r"layout has shape \[2, 3\]; for T=8 queries from position 0, S=8 keys and block=4 it "
            r"must be \[2, 2\]",
        ),
        (BlockSparse(np.ones((1, 2), bool), 4), (1, 8, 8), ValueError, r"must be \[2, 2\]"),
        (BlockSparse(np.ones((2, 1), bool), 4), (1, 8, 4), ValueError, "pass q_offset=0 or larger"),
        (
            Causal() | Segments(IDS) | Segments(IDS + 0),
            (2, 8, 8),
            ValueError,
            "can hold one Segments only",
        ),
    ],
    ids=lambda x: repr(x)[:40],
)
def test_errors_of_validate(mask, shape, error, message):
    with pytest.raises(error, match=message):
        validate(mask, *shape)


def test_validate_accepts():
    validate(Causal() & SlidingWindow(3) | Prefix(100), 2, 8, 80)
    validate(Segments(IDS, np.ones((2, 5), np.int64)), 2, 8, 5)
    layout = BlockSparse(butterfly(4), 4)
    validate(layout, 1, 13, 13)
    validate(layout, 1, 1, 16)  # one query of the whole sequence
    validate(layout, 1, 16, 13, q_offset=0)
    jax.jit(lambda offset: validate(layout, 1, 1, 16, offset))(jnp.int32(3))
