"""Attention of a chunk of a sequence that devices share chunk by chunk."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tilescan.ops import masks, reference
from tilescan.ops.sequence_parallel import ATTENTION, layouts, shard_attention
from tilescan.ops.sequence_parallel.layouts import Runs
from tilescan.ops.sequence_parallel.ring_attention import ring_attention

B, H, G, D = 2, 4, 2, 8
BOUNDS = (0, 24, 48, 60)  # the last run is shorter
LAYOUT = np.eye(15, dtype=bool) | (np.random.default_rng(1).random((15, 15)) < 0.4)
MASKS = {
    "causal": masks.Causal(),
    "full": masks.Full(),
    "window": masks.Causal() & masks.SlidingWindow(9),
    "lambda": masks.Lambda(3, 7),
    "prefix": masks.Causal() | masks.Prefix(30),
    "blocks": masks.BlockSparse(LAYOUT, 4) & masks.Causal(),
}


def a_chunk(op, n, chunk, mask, first, packed):
    """(o, lse, gradients) of a chunk's queries and the keys from run `first` on, and of one device.

    Keys end with the chunk under a causal mask, and with the sequence else.
    """
    T, last = BOUNDS[-1], chunk + 2 if mask not in (MASKS["full"], MASKS["prefix"]) else 4
    queries, keys = Runs(BOUNDS[chunk : chunk + 2]), Runs(BOUNDS[first:last])
    rng = np.random.default_rng(0)
    sample = lambda runs, *shape: rng.normal(size=(B, runs.bounds[-1] - runs.bounds[0], *shape))
    q, k, v = sample(queries, H, D), sample(keys, G, D), sample(keys, G, D)
    do, dlse = sample(queries, H, D), sample(queries, H)
    bias = rng.normal(size=(1, H, 1, k.shape[1]))
    ids = np.sort(rng.integers(0, 4, (B, T)), axis=1).astype(np.int32)
    of = lambda runs: ids[:, runs.bounds[0] : runs.bounds[-1]]
    seen = mask & masks.Segments(of(queries), of(keys)) if packed else mask
    # Of masks that keys are left out of, none depends on where the sequence begins.
    offset = queries.bounds[0] - keys.bounds[0]
    want = reference.attention_and_gradients(
        q, k, v, do, dlse, bias=bias, mask=seen, q_offset=offset
    )

    def sharded(q, k, v, bias):
        orders = [
            layouts.order(x.shape[1], n, runs) - runs.bounds[0]
            for x, runs in ((q, queries), (k, keys))
        ]
        q_ids, kv_ids = of(queries)[:, orders[0]], of(keys)[:, orders[1]]

        def part(q, k, v, bias, q_ids, kv_ids):
            seen = mask & masks.Segments(q_ids, kv_ids) if packed else mask
            return op(q, k, v, bias=bias, mask=seen, balance=(queries, keys), return_lse=True)

        mesh = jax.make_mesh((n,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:n])
        time = P(None, "sequence")
        specs = time, time, time, P(), time, time
        call = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=time, check_vma=False)
        k, v, bias = k[:, orders[1]], v[:, orders[1]], bias[..., orders[1]]
        out = call(q[:, orders[0]], k, v, bias, q_ids, kv_ids)
        return tuple(x[:, np.argsort(orders[0])] for x in out)

    @jax.jit
    def run(*arrays):
        out, pull = jax.vjp(sharded, *arrays)
        return *out, *pull((do, dlse))

    return run(q, k, v, bias), want


CELLS = [
    ("ring", 4, 2, "causal", 0, False),
]
SLOW = [
    ("ring", 4, 2, "causal", 0, True),
    ("all_gather", 4, 1, "prefix", 0, True),
    *((kind, 3, 2, "window", 1, True) for kind in ("ring", "all_gather", "ulysses")),
] + [
    (kind, n, chunk, mask, 0, packed)
    for (kind, mask), n, chunk, packed in zip(
        itertools.product(("ring", "all_gather", "ulysses", "usp"), MASKS),
        itertools.cycle((4, 2, 3, 6)),
        itertools.cycle((2, 1, 0, 2, 1)),
        itertools.cycle((True, True, False)),
        strict=False,
    )
]


@pytest.mark.parametrize("cell", CELLS + [pytest.param(c, marks=pytest.mark.slow) for c in SLOW])
def test_a_chunk_is_that_of_one_device(cell):
    kind, n, chunk, mask, first, packed = cell
    with jax.enable_x64(True):
        got, want = a_chunk(ATTENTION[kind], n, chunk, MASKS[mask], first, packed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-11), got, want)


def test_runs_are_dealt_in_equal_parts():
    order = layouts.order(10, 2, Runs((0, 4, 10)))
    np.testing.assert_array_equal(order, [0, 1, 4, 5, 6, 2, 3, 7, 8, 9])
    np.testing.assert_array_equal(order[layouts.restore(10, 2, Runs((0, 4, 10)))], np.arange(10))
    with pytest.raises(ValueError, match=r"runs of \(5, 5\) tokens must be multiples of 2 devices"):
        layouts.check(10, 2, Runs((0, 5, 10)))


def test_runs_that_all_queries_see_are_one_call():
    """Of a causal mask the past, of a window the middle of it; the chunk itself is another."""
    keys, queries = Runs(tuple(range(0, 80, 16))), Runs((48, 64))
    pairs = lambda mask: shard_attention.pairs(mask, 4, 4, (queries, keys), 16)
    assert pairs(masks.Causal()) == (((0, 1, 2), (3,)),)
    assert pairs(masks.Causal() & masks.SlidingWindow(32)) == (((1,), (2,), (3,)),)
    assert pairs(masks.Causal() & masks.SlidingWindow(47)) == (((0,), (1, 2), (3,)),)
    assert pairs(masks.Full()) == (((0, 1, 2, 3),),)


def test_more_keys_than_queries_need_orders_of_both():
    q, k = jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 4, 2, 4))
    mesh = jax.make_mesh((2,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:2])
    time = P(None, "sequence")
    call = jax.shard_map(ring_attention, mesh=mesh, in_specs=time, out_specs=time, check_vma=False)
    with pytest.raises(ValueError, match="both must be one shard of the sequence"):
        call(q, k, k)
