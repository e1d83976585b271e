"""Tiled attention under forced tiles, and the identities that any order of its loops must hold."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from tilescan.ops import attention, attention_xla, masks, reference

NAMES = ("o", "lse", "dq", "dk", "dv", "dbias")
# Of the largest entry: float32 round-off. With bfloat16 the saved o is rounded to 2^-9, and the
# rows of dS inherit that through rowsum(dO O), a sum over P entries.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-2}


def normal(seed, *shape, dtype="float32"):
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(x.astype(jnp.dtype(dtype)))


def tensors(B, T, S, H, G, D, P, dtype="float32"):
    """q, k, v, and the cotangents of o and lse."""
    shapes = (B, T, H, D), (B, S, G, D), (B, S, G, P), (B, T, H, P)
    return *(normal(i, *s, dtype=dtype) for i, s in enumerate(shapes)), normal(9, B, T, H)


def assert_close(got, want, dtype="float32", names=NAMES):
    for name, a, b in zip(names, got, want, strict=True):
        if b is None:
            assert a is None
            continue
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, name
        finite = np.isfinite(b)
        np.testing.assert_array_equal(a[~finite], b[~finite], err_msg=name)
        error = np.abs(a[finite] - b[finite]).max(initial=0.0)
        limit = TOLERANCE["float32" if name == "lse" else dtype]
        assert error <= limit * max(1.0, np.abs(b[finite]).max(initial=0.0)), (name, error)


def gradients(f, q, k, v, do, dlse, bias=None, **options):
    """(o, lse, dq, dk, dv, dbias) of f, by its own rule of differentiation."""

    def run(q, k, v, bias):
        return f(q, k, v, bias=bias, return_lse=True, **options)

    @jax.jit
    def both(q, k, v, bias, do, dlse):
        (o, lse), pullback = jax.vjp(run, q, k, v, bias)
        return o, lse, *pullback((do, dlse))

    return both(q, k, v, bias, do, dlse)


BANDS = st.sampled_from(
    [
        masks.Full(),
        masks.Causal(),
        masks.SlidingWindow(5),
        masks.SlidingWindow(20, 3),
        masks.Causal() | masks.Prefix(11),
        masks.Lambda(3, 9),
        masks.SlidingWindow(None, 7) & masks.SlidingWindow(30, None),
    ]
)


@st.composite
def problems(draw):
    B, G = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))
    H = G * draw(st.sampled_from([1, 2, 4]))
    T, S = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    D, P = draw(st.sampled_from([(16, 16), (24, 40), (64, 8)]))
    mask = draw(BANDS)
    kind = draw(st.sampled_from(["plain", "segments", "blocks"]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    q_offset = draw(st.sampled_from([None, 0, -7, 25]))
    if kind == "segments":
        ids = [np.sort(rng.integers(0, 4, (B, n)).astype(np.int32), 1) for n in (T, S)]
        mask = mask & masks.Segments(*ids)
    elif kind == "blocks":
        block = draw(st.sampled_from([8, 16]))
        q_offset = max(0, S - T) if q_offset is None else max(0, q_offset)
        layout = rng.random((-(-(q_offset + T) // block), -(-S // block))) < 0.4
        mask = mask & masks.BlockSparse(layout, block)
    bias = None
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([1, n])) for n in (B, H, T, S)]
        bias = normal(8, *shape)
    return dict(
        tensors=tensors(B, T, S, H, G, D, P, draw(st.sampled_from(["float32", "bfloat16"]))),
        options=dict(mask=mask, bias=bias, logit_cap=draw(st.sampled_from([None, 2.0]))),
        scale=draw(st.sampled_from([D**-0.5, 0.3])),
        q_offset=S - T if q_offset is None else q_offset,
        traced=draw(st.booleans()) and kind != "blocks",
        tile=draw(st.sampled_from([(16, 16), (8, 32), (32, 8), (64, 64)])),
    )


def check_tiles(problem):
    q, k, v, do, dlse = problem["tensors"]
    options, scale, q_offset = problem["options"], problem["scale"], problem["q_offset"]
    mask, bias, logit_cap = options["mask"], options["bias"], options["logit_cap"]
    tile = tile_of(problem["tile"], q.shape[1], k.shape[1])

    def run(arrays, bias, mask, offset):
        q, k, v, do, dlse = arrays
        offset = offset if problem["traced"] else q_offset
        constants = dict(scale=scale, logit_cap=logit_cap, tile=tile)
        o, lse = attention_xla.forward(q, k, v, bias, mask, offset, **constants)
        grads = attention_xla.backward(q, k, v, bias, mask, offset, o, lse, do, dlse, **constants)
        return o, lse, *grads

    got = jax.jit(run)((q, k, v, do, dlse), bias, mask, jnp.int32(q_offset))
    want = reference.attention_and_gradients(
        q, k, v, do, dlse, scale=scale, q_offset=q_offset, **options
    )
    assert [x.dtype for x in got[:5]] == [q.dtype, jnp.float32, q.dtype, q.dtype, q.dtype]
    assert_close(got, want, dtype=q.dtype.name)


@pytest.mark.slow
@hypothesis.settings(max_examples=3, phases=[hypothesis.Phase.generate])
@hypothesis.given(problems())
def test_tiles_give_the_dense_numbers(problem):
    check_tiles(problem)


@pytest.mark.slow
@hypothesis.settings(max_examples=40, phases=[hypothesis.Phase.generate])
@hypothesis.given(problems())
def test_tiles_give_the_dense_numbers_in_many_problems(problem):
    check_tiles(problem)


def tile_of(tile, T, S):
    return min(tile[0], T), min(tile[1], S)


def test_references_agree():
    """The differentiable reference, and the one by formulas."""
    arrays = tensors(2, 9, 13, 4, 2, 8, 8)
    options = dict(mask=masks.SlidingWindow(4), bias=normal(8, 1, 4, 1, 13), logit_cap=2.0)
    got = gradients(reference.attention, *arrays, **options)
    assert_close(got, reference.attention_and_gradients(*arrays, **options))


@pytest.mark.slow
def test_loop_orders_agree():
    """FlashAttention's order, FlashAttention-2's and the dense formula, values and gradients."""
    q, k, v, do, dlse = tensors(1, 50, 50, 1, 1, 8, 8)
    visible = np.tril(np.ones((50, 50), bool))
    head = lambda x: x[0, :, 0]
    results = []
    for order in (reference.flash_attention_1, reference.flash_attention_2):
        f = lambda q, k, v, order=order: order(q, k, v, visible, 16, 8)
        o, pullback = jax.jit(functools.partial(jax.vjp, f))(*map(head, (q, k, v)))
        results.append((o, *jax.jit(pullback)(head(do))))
    o, _, *grads, _ = reference.attention_and_gradients(q, k, v, do, 0 * dlse, mask=masks.Causal())
    want = tuple(map(head, (o, *grads)))
    for got in results:
        assert_close(got, want, names=("o", "dq", "dk", "dv"))


def test_row_constants_shift_lse_alone():
    q, k, v, *_ = tensors(1, 12, 12, 2, 2, 16, 16)
    o, lse = map(np.asarray, attention(q, k, v, return_lse=True))
    shift = np.asarray(normal(8, 1, 2, 12, 1))
    moved, moved_lse = attention(q, k, v, bias=jnp.asarray(shift), return_lse=True)
    np.testing.assert_allclose(moved, o, atol=2e-6)
    np.testing.assert_allclose(moved_lse, lse + shift[..., 0].swapaxes(1, 2), atol=2e-6)


def test_logits_gradients_sum_to_zero_along_keys():
    """A bias is added to the logits, so its gradient is theirs."""
    q, k, v, do, dlse = tensors(1, 30, 30, 2, 2, 16, 16)
    bias, do, dlse = normal(8, 1, 2, 30, 30), np.asarray(do), np.asarray(dlse)

    @jax.jit
    def dbias(do, dlse):
        run = lambda bias: attention(q, k, v, bias=bias, return_lse=True)
        return jax.vjp(run, bias)[1]((do, dlse))[0]

    found = np.asarray(dbias(do, 0 * dlse))
    assert np.abs(found).max() > 1e-3
    np.testing.assert_allclose(found.sum(-1), 0.0, atol=1e-5)
    # The cotangent of lse comes in whole: the weights that multiply it sum to one.
    extra = np.asarray(dbias(do, dlse)).sum(-1)
    np.testing.assert_allclose(extra, dlse.transpose(0, 2, 1), atol=1e-5)


def test_powers_of_two():
    x = -np.float32([*np.linspace(0, 126, 20001), 127, 500, np.inf, np.nan])
    got = np.asarray(jax.jit(attention_xla.exp2)(x))
    x, got, of_nan = x[:-1], got[:-1], got[-1]
    # Without fused multiply-adds, as in a quick compilation, 2.7e-7; with them 2.5e-7.
    np.testing.assert_allclose(got[:-3], np.exp2(np.asarray(x[:-3], np.float64)), rtol=3e-7)
    np.testing.assert_array_equal(got[-3:], 0.0)
    assert got[0] == 1.0 and np.isnan(of_nan)


@pytest.mark.parametrize("split", [(1, 2), pytest.param((1, 1), marks=pytest.mark.slow), (1, 3)])
def test_hand_value(split, monkeypatch):
    """Logits ln 1, ln 2, ln 5 and values 1, 2, 4: o = 25 / 8 and lse = ln 8, however tiled."""
    monkeypatch.setattr(attention_xla, "tile_sizes", lambda *_: split)
    q = np.ones((1, 1, 1, 1), np.float32)
    k = np.log(np.float32([1, 2, 5])).reshape(1, 3, 1, 1)
    v = np.float32([1, 2, 4]).reshape(1, 3, 1, 1)
    run = functools.partial(attention_xla.forward, scale=1.0, logit_cap=None)
    o, lse = jax.jit(lambda *x: run(*x, None, masks.Full(), 2))(q, k, v)
    np.testing.assert_allclose([o.item(), lse.item()], [3.125, np.log(8)], rtol=1e-6)


def test_products_of_forward_and_backward():
    """2 products a tile forward, 5 backward: FlashAttention-2 counts backward as 2.5 forward."""
    q, k, v, do, dlse = tensors(1, 64, 64, 1, 1, 8, 8)

    def products(f, *arrays):
        return str(jax.make_jaxpr(f)(*arrays)).count("dot_general[")

    constants = dict(scale=1.0, logit_cap=None)
    forward = lambda q, k, v: attention_xla.forward(q, k, v, None, masks.Full(), 0, **constants)
    backward = lambda o, lse, do, dlse: attention_xla.backward(
        q, k, v, None, masks.Full(), 0, o, lse, do, dlse, **constants
    )
    assert (products(forward, q, k, v), products(backward, do, dlse, do, dlse)) == (2, 5)


def test_traced_segments_skip_the_tiles_that_known_ones_do():
    ids = np.sort(np.random.default_rng(0).integers(0, 6, (3, 256)).astype(np.int32), axis=1)
    mask = masks.Causal() & masks.Segments(ids)
    tiles = attention_xla._Tiles(256, 256, 32, 32, 0, backward=False)
    order, n_full, n_live = tiles.walk(mask)
    traced = jax.jit(tiles.walk)(mask)
    np.testing.assert_array_equal(traced[1], n_full)
    np.testing.assert_array_equal(traced[2], n_live)
    assert n_live.sum() < 3 * 36 * 0.7  # causal alone leaves 36 of 64 tiles a sequence
    for b, i in np.ndindex(n_live.shape):
        n = n_live[b, i]
        np.testing.assert_array_equal(traced[0][b, i, :n], order[b, i, :n])
