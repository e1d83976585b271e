"""A mask hides NaN and inf too: values and gradients of attention and of decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hidden_values import HIDING, assert_bias_hides, assert_hidden

from tilescan.ops import masks, reference
from tilescan.ops.attention import attention, decode_attention

IDS = np.sort(np.random.default_rng(3).integers(0, 5, (2, 200)), axis=1).astype(np.int32)
MASKS = {
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(20, 3),
    "prefix": masks.Causal() | masks.Prefix(90),
    "lambda": masks.Lambda(3, 30),
    "blocks": masks.BlockSparse(np.eye(7, dtype=bool), 32),
    "packed": masks.Causal() & masks.Segments(IDS),
    "padded": masks.Segments(IDS, np.where(IDS == 4, 9, IDS)),  # nobody sees the last document
}
# Static masks, whose tiles are walked as those of the causal masks below are, and documents that
# padded ones show too.
LIKE_OTHERS = ("causal", "window", "prefix", "lambda", "blocks", "packed")


@functools.cache
def with_gradients(op, name):
    """(q, k, v, do, dlse) -> (o, lse, dq, dk, dv), one function for the same arguments."""

    def run(q, k, v, do, dlse):
        f = lambda q, k, v: op(q, k, v, mask=MASKS[name], return_lse=True)
        (o, lse), pull = jax.vjp(f, q, k, v)
        return o, lse, *pull((do, dlse))

    return run


@functools.cache
def by_reference(name):
    return lambda q, k, v, *_: reference.attention(q, k, v, mask=MASKS[name], return_lse=True)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


WHERE = pytest.mark.parametrize("where", ["keys", "queries"])


@WHERE
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in LIKE_OTHERS else ()) for n in MASKS]
)
def test_attention(name, where):
    assert_hidden(with_gradients(attention, name), MASKS[name], (2, 200, 200, 4, 2, 16), where)


def capped_with_a_bias(*arrays, **options):
    return attention(*arrays, bias=jnp.asarray(normal(1, 1, 2, 1, 900)), logit_cap=3.0, **options)


@WHERE
def test_attention_over_several_tiles_with_a_bias(where):
    """T = 900 has full tiles, in which NaN reaches every row, and partial ones."""
    run = with_gradients(capped_with_a_bias, "causal")
    assert_hidden(run, masks.Causal(), (1, 900, 900, 2, 1, 16), where, tolerance=1e-5)


# Of the latter the first queries see nothing.
@WHERE
@pytest.mark.parametrize("T,S", [pytest.param(60, 150, marks=pytest.mark.slow), (150, 110)])
def test_attention_to_a_longer_or_shorter_past(T, S, where):
    run = with_gradients(attention, "causal")
    assert_hidden(run, masks.Causal(), (1, T, S, 2, 2, 16), where)


@WHERE
@pytest.mark.parametrize("name", [pytest.param("causal", marks=pytest.mark.slow), "padded"])
def test_reference(name, where):
    assert_hidden(by_reference(name), MASKS[name], (2, 200, 200, 4, 2, 16), where)


def test_reference_gradients_of_what_no_query_sees():
    arrays = normal(0, 3, 1, 30, 2, 8)
    ids = np.where(np.arange(30) < 20, 1, 2)[None]
    padding = (ids == 2)[:, :, None, None]
    f = lambda *x: (reference.attention(*x, mask=masks.Segments(ids))[:, :20] ** 2).sum()
    gradients = jax.jit(jax.grad(f, (0, 1, 2)))
    want, got = gradients(*arrays), gradients(*np.where(padding, np.float32(np.nan), arrays))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


OPS = pytest.mark.parametrize(
    "op", [attention, pytest.param(reference.attention, marks=pytest.mark.slow)],
    ids=["attention", "reference"],
)  # fmt: skip


@OPS
def test_what_a_bias_holds_where_the_mask_hides(op):
    q, k, v = normal(0, 3, 1, 100, 2, 8)
    bias = normal(1, 1, 2, 100, 100)
    hidden = ~np.tri(100, dtype=bool)
    f = lambda *x: (op(*x[:3], bias=x[3], mask=masks.Causal()) ** 2).sum()
    grad = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))
    want = grad(q, k, v, bias)
    for poison in (np.nan, np.inf, -np.inf):
        got = grad(q, k, v, np.where(hidden, np.float32(poison), bias))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)


@pytest.mark.parametrize("split", [pytest.param(16, marks=pytest.mark.slow), 1024])
def test_decoding(split):
    """Slots after the lengths, and those of another document."""
    T = 2
    q, k, v = normal(0, 3, T, 4, 8), normal(1, 3, 50, 2, 8), normal(2, 3, 50, 2, 8)
    lengths = np.asarray([3, 20, 50], np.int32)
    ids = np.where(np.arange(50) < 10, 0, 1)[None].repeat(3, 0)
    ids[0] = 1
    mask = masks.Causal() & masks.Segments(np.ones((3, T), int), ids)
    hidden = (ids == 0) | (np.arange(50)[None] >= lengths[:, None])
    f = lambda q, k, v: decode_attention(
        q, k, v, lengths=jnp.asarray(lengths), mask=mask, split=split, return_lse=True
    )

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(f, q, k, v)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    want = run(q, k, v)
    for poison in (np.nan, np.inf):
        bad = np.where(hidden[:, :, None, None], np.float32(poison), (k, v))
        got = run(q, *bad)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, want)
    # What is seen is not hidden: the row of that query is NaN.
    v[1, 15] = np.nan
    o, lse = map(np.asarray, run(q, k, v)[0])
    assert np.isnan(o[1]).all() and np.isnan(lse[1]).all() and np.isfinite(o[::2]).all()


def test_nan_of_any_bits_is_seen():
    """Memory that is all ones is NaN, of bits that arithmetic on exponents could make a number."""
    ones = np.full((1, 40, 2, 8), 0xFFFFFFFF, np.uint32).view(np.float32)
    x = normal(0, 1, 40, 2, 8)
    attend = jax.jit(attention)
    for args in ((ones, x, x), (x, ones, x), (x, x, ones)):
        for mask in (masks.Causal(), masks.Full()):
            assert np.isnan(attend(*args, mask=mask)).all()


@pytest.mark.parametrize(
    "bias_dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
@OPS
def test_a_bias_hides_keys_and_whole_rows(op, bias_dtype):
    def run(q, k, v, bias, do, dlse):
        f = lambda q, k, v, bias: op(q, k, v, bias=bias, return_lse=True)
        (o, lse), pull = jax.vjp(f, q, k, v, bias)
        return o, lse, *pull((do, jnp.where(jnp.isneginf(lse), 0.0, dlse)))

    assert_bias_hides(run, (2, 40, 50, 4, 2, 16), tolerance=4e-6, bias_dtype=bias_dtype)


@pytest.mark.parametrize("split", [pytest.param(n, marks=pytest.mark.slow) for n in (16, 40)])
def test_a_bias_hides_rows_in_decoding(split):
    q, k, v = (normal(i, 2, n, 2, 8) for i, n in enumerate((3, 40, 40)))
    bias = np.zeros((2, 1, 3, 40), np.float32)
    bias[:, :, 1, ::2] = bias[:, :, 2] = -np.inf
    want = jax.jit(functools.partial(attention, mask=masks.Causal(), return_lse=True))(
        q, k, v, bias=bias
    )
    want = tuple(map(np.asarray, want))
    assert not want[0][:, 2].any() and np.isneginf(want[1][:, 2]).all()

    @jax.jit
    def run(*x):
        f = lambda q, k, v, bias: decode_attention(
            q, k, v, bias=bias, lengths=jnp.asarray([40, 40]), split=split, return_lse=True
        )
        out, pull = jax.vjp(f, *x)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    for low in HIDING:
        other = np.where(bias < 0, low, 0).astype(np.float32)
        got, grads = run(q, k, v, other)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)
        assert all(np.isfinite(g).all() for g in grads)
        assert not np.asarray(grads[0])[:, 2].any()


def test_a_bias_of_minus_a_billion_is_a_number():
    q, k, v = normal(0, 3, 1, 20, 2, 8)
    bias = np.full((1, 1, 20, 20), -1e9, np.float32)
    want = np.broadcast_to(v.mean(1, keepdims=True), q.shape)
    for op in (attention, reference.attention):
        np.testing.assert_allclose(jax.jit(op)(q, k, v, bias=bias), want, atol=1e-6)
