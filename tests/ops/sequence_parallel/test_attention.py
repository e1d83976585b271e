"""Attention with its sequence sharded over devices equals that of one device."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hidden_values import assert_hidden
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tilescan.ops import masks, reference
from tilescan.ops.sequence_parallel import ATTENTION, BALANCES, layouts
from tilescan.ops.sequence_parallel.kinds import TPU_ATTENTION_KINDS
from tilescan.ops.sequence_parallel.ring_attention import ring_attention, rounds
from tilescan.ops.sequence_parallel.ring_self_attention import ring_self_attention
from tilescan.ops.sequence_parallel.ulysses import ulysses_attention, usp_attention
from tilescan.training.collectives import collectives, sent_bytes

B, T, D = 2, 48, 8
LAYOUT = np.random.default_rng(1).random((12, 12)) < 0.4
MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(5, 2),
    "lambda": masks.Lambda(3, 7),
    "prefix": masks.Causal() | masks.Prefix(9),
    "blocks": masks.BlockSparse(LAYOUT, 4) & masks.Causal(),
}


def mesh_of(n):
    return jax.make_mesh((n,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:n])


def inputs(H, G, bias=None):
    """q, k, v, bias, and the cotangents of o and lse, in float64."""
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.standard_normal((B, T, heads, D)) for heads in (H, G, G, H))
    dlse = rng.standard_normal((B, T, H))
    return q, k, v, None if bias is None else rng.standard_normal(bias), do, dlse


def packed_ids():
    """Documents that begin inside shards and run over several."""
    return np.sort(np.random.default_rng(0).integers(0, 5, (B, T)), axis=1).astype(np.int32)


def on_devices(op, n, balance, mask):
    """attend(q, k, v, bias, ids) of whole arrays, computed by n devices."""
    order, back = layouts.order(T, n, balance), layouts.restore(T, n, balance)
    time = P(None, "sequence")

    def part(q, k, v, bias, ids):
        seen = mask if ids is None else mask & masks.Segments(ids)
        return op(q, k, v, mask=seen, bias=bias, balance=balance, return_lse=True)

    def attend(q, k, v, bias, ids):
        rows = None
        if bias is not None:
            rows = P(None, None, "sequence" if bias.shape[2] > 1 else None)
            for axis in (2, 3):
                bias = jnp.take(bias, order, axis=axis) if bias.shape[axis] > 1 else bias
        move = lambda x: None if x is None else x[:, order]
        out = jax.shard_map(
            part,
            mesh=mesh_of(n),
            in_specs=(time, time, time, rows, None if ids is None else time),
            out_specs=time,
            check_vma=False,
        )(move(q), move(k), move(v), bias, move(ids))
        return tuple(x[:, back] for x in out)

    return attend


def assert_equals_one_device(op, n, balance, mask, H=4, G=2, bias=None, packed=True):
    q, k, v, bias, do, dlse = inputs(H, G, bias)
    ids = packed_ids() if packed else None
    attend = on_devices(op, n, balance, mask)

    @jax.jit
    def run(q, k, v, bias, ids, do, dlse):
        (o, lse), pull = jax.vjp(lambda *x: attend(*x, ids), q, k, v, bias)
        return o, lse, *pull((do, dlse))

    with jax.enable_x64(True):
        got = run(q, k, v, bias, ids, do, dlse)
    seen = mask if ids is None else mask & masks.Segments(ids)
    want = reference.attention_and_gradients(q, k, v, do, dlse, mask=seen, bias=bias)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12), got, want)


# What a kind is tried with in every run; CELLS, all of it, are slow.
QUICK = [
    ("ring", 4, "zigzag", "causal", dict()),
    ("ulysses", 3, "zigzag", "prefix", dict(bias=(2, 4, T, T))),  # 4 heads on 3 devices
    ("usp", 4, "striped", "causal", dict()),
    ("all_gather", 4, "contiguous", "blocks", dict(bias=(1, 1, T, T))),
    ("ring_self_attention", 4, "contiguous", "full", dict(G=4)),
]
# Takes longest, and the ring is tried above.
LONG = ("ring", 3, "contiguous", "window", dict(bias=(1, 4, 1, T)))
# All but the kernel's transfers, which have no float64: tests of the kernels hold these.
CELLS = [
    (kind, n, balance, mask, dict(packed=packed))
    for (kind, balance, packed), n, mask in zip(
        itertools.product(
            [kind for kind in ATTENTION if kind not in TPU_ATTENTION_KINDS], BALANCES, (True, False)
        ),
        itertools.cycle((4, 8, 2, 6)),
        itertools.cycle(("causal", "lambda", "blocks", "window", "prefix", "full", "causal")),
        strict=False,
    )
]


def named(cell):
    kind, n, balance, mask, options = cell
    return f"{kind}-{n}-{balance}-{mask}-{'-'.join(map(str, options))}"


@pytest.mark.parametrize("cell", [*QUICK, pytest.param(LONG, marks=pytest.mark.slow)], ids=named)
def test_values_and_gradients_are_those_of_one_device(cell):
    kind, n, balance, mask, options = cell
    assert_equals_one_device(ATTENTION[kind], n, balance, MASKS[mask], **options)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=named)
def test_every_kind_balance_and_packing(cell):
    kind, n, balance, mask, options = cell
    assert_equals_one_device(ATTENTION[kind], n, balance, MASKS[mask], **options)


@pytest.mark.slow
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("mask", MASKS)
def test_a_ring_takes_every_mask(mask, balance):
    assert_equals_one_device(ring_attention, 4, balance, MASKS[mask], bias=(2, 4, T, T))


@pytest.mark.slow
@pytest.mark.parametrize("H, G, n", [(4, 4, 1), (6, 3, 4), (8, 1, 4), (5, 1, 8)])
def test_ulysses_with_heads_that_devices_do_not_divide(H, G, n):
    op = functools.partial(ulysses_attention)
    assert_equals_one_device(op, n, "contiguous", masks.Causal(), H=H, G=G, bias=(1, H, 1, T))


@pytest.mark.slow
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
def test_usp_with_every_size_of_group(group_size, balance):
    op = functools.partial(usp_attention, group_size=group_size)
    assert_equals_one_device(op, 8, balance, masks.Causal(), H=8, G=8, bias=(1, 8, T, T))


@pytest.mark.slow
def test_the_papers_reduction_gives_the_same_gradients():
    op = functools.partial(ring_self_attention, reduction="all_reduce")
    assert_equals_one_device(op, 4, "contiguous", masks.Full())


def test_orders_are_permutations_and_say_where_tokens_stand():
    for n, balance in itertools.product((1, 2, 3, 8), BALANCES):
        order = layouts.order(T, n, balance)
        assert sorted(order) == list(range(T))
        np.testing.assert_array_equal(order[layouts.restore(T, n, balance)], np.arange(T))
        rows = order.reshape(n, T // n)
        for p in range(n):
            for s in layouts.ranges(p, n, T // n, balance):
                want = s.start + s.stride * np.arange(s.length)
                np.testing.assert_array_equal(rows[p, s.row : s.row + s.length], want)


def test_zigzag_gives_every_device_as_many_visible_scores():
    seen = np.tril(np.ones((T, T), int)).sum(1)
    shares = {b: seen[layouts.order(T, 4, b)].reshape(4, -1).sum(1) for b in BALANCES}
    assert len(set(shares["zigzag"])) == 1
    assert np.ptp(shares["striped"]) < T and np.ptp(shares["contiguous"]) > 5 * T


def test_a_window_needs_few_rounds_and_a_causal_mask_all():
    count = lambda mask, balance="contiguous": rounds(mask, 8, 64, balance)
    assert count(masks.Causal()) == count(masks.Full()) == 8
    assert count(masks.SlidingWindow(63)) == 2
    assert count(masks.SlidingWindow(65)) == 3
    assert count(masks.SlidingWindow(10, 10)) == 8  # the next device's keys arrive last
    assert count(masks.SlidingWindow(63), "striped") == 8


def compiled(op, n, H=8, G=4, gradient=True, T=256):
    """The program of one device's attention, or gradient, in float32."""
    mesh, time = mesh_of(n), P(None, "sequence")
    where = jax.sharding.NamedSharding(mesh, time)
    x = [jax.ShapeDtypeStruct((1, T, heads, D), jnp.float32, sharding=where) for heads in (H, G, G)]
    call = jax.shard_map(op, mesh=mesh, in_specs=time, out_specs=time, check_vma=False)
    total = lambda q, k, v: jnp.sum(call(q, k, v))
    program = jax.grad(total, argnums=(0, 1, 2)) if gradient else call
    return jax.jit(program).trace(*x).lower().compile()


def test_what_devices_send_is_what_the_formulas_say():
    n, H, G = 4, 8, 4
    q, kv = 4 * 256 // n * H * D, 4 * 256 // n * G * D  # bytes of a device's q, and of its k
    sent = lambda op, **options: sent_bytes(collectives(compiled(op, n, H, G, **options).as_text()))
    forward = sent(ring_attention, gradient=False)
    assert forward == {"collective-permute": (n - 1) * 2 * kv}
    # Keys and values twice, their gradients once more than keys travel: home.
    both = sent(ring_attention)
    assert both == {"collective-permute": (n - 1) * 4 * kv + n * 2 * kv}
    heads = sent(ulysses_attention, gradient=False)
    assert heads == {"all-to-all": (2 * q + 2 * kv) * (n - 1) / n}


def test_a_ring_is_a_loop_whose_memory_does_not_grow_with_the_devices():
    """As many tokens on each device: a longer loop in as many bytes."""
    programs = {n: compiled(ring_attention, n, T=64 * n) for n in (3, 8)}
    found = {
        n: [c for c in collectives(p.as_text()) if c.kind == "collective-permute"]
        for n, p in programs.items()
    }
    assert len(found[3]) == len(found[8]) == 8
    assert {n: {c.times for c in cs} for n, cs in found.items()} == {3: {1, 2}, 8: {1, 7}}
    bytes_ = {n: p.memory_analysis().temp_size_in_bytes for n, p in programs.items()}
    assert bytes_[8] <= 1.05 * bytes_[3]


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (ring_attention, dict(balance="zigzag", T=36), "pad the sequence to 40"),
        (ring_attention, dict(balance="odd"), "must be one of contiguous, zigzag, striped"),
        (ring_self_attention, dict(logit_cap=5.0), "sequence_parallel='ring' does"),
        (ring_self_attention, dict(reduction="sum"), "reduce_scatter, all_reduce"),
        (usp_attention, dict(group_size=3), "must divide the 4 devices"),
        (ring_attention, dict(bias=np.zeros((1, 1, 1, 7), np.float32)), "does not broadcast"),
        (ulysses_attention, dict(mask=masks.Causal() | masks.Prefix(3), ids=True), "under |"),
    ],
)  # fmt: skip
def test_errors_say_what_would_be_right(op, change, message):
    change = dict(change)
    length, ids = change.pop("T", T), change.pop("ids", False)
    q = jnp.zeros((1, length, 4, D))
    if ids:
        change["mask"] |= masks.Segments(jnp.zeros((1, length // 4), jnp.int32))
    call = functools.partial(op, **change)
    time = P(None, "sequence")
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        jax.eval_shape(
            jax.shard_map(call, mesh=mesh_of(4), in_specs=time, out_specs=time, check_vma=False),
            q, q, q,
        )  # fmt: skip


# Rings merge results and so hide twice; what they leave to `ops.attention` is tested there.
@pytest.mark.parametrize(
    ("kind", "balance", "where"),
    [
        pytest.param("ring", "contiguous", "keys", marks=pytest.mark.slow),
        pytest.param("all_gather", "contiguous", "queries", marks=pytest.mark.slow),
        ("ring_self_attention", "striped", "keys"),
        ("ring_self_attention", "striped", "queries"),
        pytest.param("ring", "zigzag", "keys", marks=pytest.mark.slow),
        pytest.param("ring", "zigzag", "queries", marks=pytest.mark.slow),
        pytest.param("ulysses", "zigzag", "keys", marks=pytest.mark.slow),
        pytest.param("usp", "striped", "queries", marks=pytest.mark.slow),
    ],
)
def test_a_mask_hides_what_is_not_finite(kind, balance, where):
    mask = masks.Causal() & masks.Segments(packed_ids())
    run = packed_causal(kind, balance)
    assert_hidden(run, mask, (B, T, T, 4, 4, D), where, tolerance=1e-5)


@functools.cache
def packed_causal(kind, balance):
    """(q, k, v, do, dlse) -> (o, lse, dq, dk, dv) of a kind, one program for all poison."""
    attend = on_devices(ATTENTION[kind], 4, balance, masks.Causal())

    def run(q, k, v, do, dlse):
        (o, lse), pull = jax.vjp(lambda *x: attend(*x, None, packed_ids()), q, k, v)
        return o, lse, *pull((do, dlse))

    return run
