"""A kernel's walk over tiles against the kinds of all tiles."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilescan.ops import masks
from tilescan.pallas_kernels import tiles

BANDS = st.one_of(
    st.just(masks.Full()),
    st.just(masks.Causal()),
    st.builds(masks.SlidingWindow, st.integers(0, 60), st.integers(0, 40)),
    st.builds(lambda n: masks.Causal() | masks.Prefix(n), st.integers(0, 60)),
    st.builds(masks.Prefix, st.integers(0, 60)),
)


def visited(schedule, outer_tiles):
    """{(outer, inner): kind} of the steps that compute, and all inner tiles looked at."""
    found, order = {}, []
    tables = {name: jnp.asarray(table) for name, table in schedule.tables.items()}
    for outer in range(outer_tiles):
        for step in range(schedule.steps):
            inner, kind = schedule.lookup(0, jnp.int32(outer), jnp.int32(step), tables)
            order.append(int(inner))
            if int(kind) != tiles.EMPTY:
                assert (outer, int(inner)) not in found
                assert int(kind) in schedule.kinds
                found[outer, int(inner)] = int(kind)
            else:
                assert tiles.EMPTY in schedule.kinds
    return found, order


def expected(kinds, outer):
    kinds = kinds[0] if outer == "queries" else kinds[0].T
    return {(int(i), int(j)): int(kinds[i, j]) for i, j in np.argwhere(kinds != 0)}


def make(mask, queries, keys, offset, outer):
    band = mask.band()
    tile_mask = tiles.TileMask(mask.visible, mask.tile_summary, band.key_bounds, band.query_bounds)
    return tiles.interval_schedule(tile_mask, queries, keys, offset, outer=outer)


@settings(max_examples=25)
@given(
    BANDS,
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([8, 16, 24]),
    st.sampled_from([8, 16]),
    st.integers(-20, 40),
    st.sampled_from(["queries", "keys"]),
    st.booleans(),
)
def test_interval_walk_is_the_live_tiles(mask, T, S, block_q, block_k, offset, outer, traced):
    queries, keys = tiles.Axis(T, block_q), tiles.Axis(S, block_k)
    schedule = make(mask, queries, keys, jnp.int32(offset) if traced else offset, outer)
    found, _ = visited(schedule, (queries if outer == "queries" else keys).tiles)
    kinds = np.asarray(masks.tile_kinds(mask, T, S, block_q, block_k, offset))
    assert found == expected(kinds, outer)


@pytest.mark.parametrize("outer", ["queries", "keys"])
@pytest.mark.parametrize("traced", [False, True])
def test_list_walk_is_the_live_tiles(outer, traced):
    mask = masks.Lambda(3, 20) | masks.BlockSparse(np.eye(5, dtype=bool), 20)
    kinds = masks.tile_kinds(mask, 100, 100, 16, 8)
    schedule = tiles.list_schedule(jnp.asarray(kinds) if traced else kinds, 0, outer=outer)
    assert schedule.steps == (
        kinds.shape[2 if outer == "queries" else 1]
        if traced
        else (kinds != 0).sum(2 if outer == "queries" else 1).max()
    )
    found, _ = visited(schedule, kinds.shape[1 if outer == "queries" else 2])
    assert found == expected(kinds, outer)


def test_idle_steps_fetch_nothing():
    axis = tiles.Axis(64, 8)
    schedule = make(masks.Causal(), axis, axis, 0, "queries")
    _, order = visited(schedule, axis.tiles)
    # Row i waits on tile 0 and then walks tiles 0..i.
    assert order == [max(0, j - (7 - i)) for i in range(8) for j in range(8)]


def test_a_window_shrinks_the_grid():
    axis = tiles.Axis(4096, 128)
    assert make(masks.SlidingWindow(127), axis, axis, 0, "queries").steps == 2
