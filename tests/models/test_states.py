"""Caches and states: empty slots, forgotten tokens and ids of any value are never confused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.attention import Attention
from tilescan.models.blocks import make_mixer
from tilescan.models.mixers import MIXERS, is_recurrent
from tilescan.models.positions import token_positions
from tilescan.ops import masks

B, T, E, ROOM = 2, 26, 12, 40
X = np.random.default_rng(0).standard_normal((B, T, E), np.float32)
# Up to 8 tokens are split over keys, more over queries.
CHUNKS = (10, 4, 10)
MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(4),
    "both sides": masks.SlidingWindow(4, 3),
    "prefix": masks.Causal() | masks.Prefix(7),
    "sinks": masks.Lambda(2, 5),
}
RECURRENT, QUICK = tuple(filter(is_recurrent, MIXERS)), ("mamba2",)
IDS = {
    "none": None,
    "zero": np.zeros((B, T), np.int32),
    "negative": np.full((B, T), -1, np.int32),
    "documents": np.repeat([[0, -1, 5], [-(2**31), 2, 0]], [9, 7, 10], axis=1).astype(np.int32),
}


def draw(module, x):
    """Random parameters."""
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: 0.3 * rng.standard_normal(a.shape).astype(a.dtype), shapes)


@functools.cache
def attention(mask, position="rope"):
    """An attention layer and its call of given parameters, compiled once for a shape."""
    mixer = Attention(n_heads=2, n_kv_heads=1, head_dim=8, mask=MASKS[mask], position=position)
    return mixer, functools.partial(jax.jit(mixer.apply), draw(mixer, X))


def without_a_state(mask, rows, ids, ends, position="rope"):
    """What a call gives for the first tokens of each row, `ends` of them."""
    _, call = attention(mask, position)
    # One length for all: what follows is of a segment of its own.
    ids = np.zeros((B, T), np.int32) if ids is None else ids
    ids = np.where(np.arange(T) < np.asarray(ends).reshape(-1, 1), ids, 77)
    return np.asarray(call(rows, segment_ids=ids)[0])


@jax.jit
def poisoned(state, start):
    """The state with NaN, and id 0, in all slots from `start` on."""
    empty = jnp.arange(ROOM) >= start
    hide = lambda x: jnp.where(empty[None, :, None, None], jnp.nan, x)
    ids = jnp.where(empty[None], 0, state.segment_ids)
    return state._replace(k=hide(state.k), v=hide(state.v), segment_ids=ids)


def assert_equals_one_call(mask, ids, position="rope", poison=False):
    """A chunk reads what came before it and itself, as at the end of a call without a state."""
    mixer, call = attention(mask, position)
    state, start = mixer.init_state(B, ROOM), 0
    for n in CHUNKS:
        end = start + n
        state = poisoned(state, start) if poison else state
        part = None if ids is None else ids[:, start:end]
        y, state = call(X[:, start:end], state=state, segment_ids=part)
        want = without_a_state(mask, X, ids, end, position)[:, start:end]
        np.testing.assert_allclose(y, want, atol=2e-6)
        np.testing.assert_array_equal(state.length, end)
        start = end


def slowly(*values):
    return [pytest.param(*value, marks=pytest.mark.slow) for value in values]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask", ["full", *slowly(("prefix",), ("both sides",), ("causal",), ("window",), ("sinks",))]
)
def test_chunks_of_any_mask(mask):
    assert_equals_one_call(mask, None, poison=True)


@pytest.mark.parametrize(
    ("mask", "ids"),
    [
        ("both sides", "documents"),
        *slowly(("full", "zero")),
        *slowly(*itertools.product(("full", "both sides"), ("negative",))),
        *slowly(("full", "documents"), ("causal", "negative"), ("causal", "documents")),
    ],
)
def test_ids_of_any_value(mask, ids):
    assert_equals_one_call(mask, IDS[ids], poison=True)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["full", *slowly(("causal",))])
def test_alibi_counts_from_the_state_on(mask):
    assert_equals_one_call(mask, None, position="alibi")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "ids"),
    [
        ("full", "none"),
        *slowly(*itertools.product(("causal", "both sides"), ("none", "zero")), ("full", "zero")),
    ],
)
def test_forgotten_tokens_are_not_seen(mask, ids):
    """Rows are set back by different lengths, and read on together and row by row."""
    mixer, call = attention(mask)
    ids, kept, long = IDS[ids], (5, 12), mixer.init_state(B, ROOM)
    pick = lambda n: None if ids is None else ids[:, :n]
    for start in (0, 10):
        _, long = call(X[:, start : start + 10], state=long, segment_ids=pick(10))
    v = np.array(long.v)
    v[0, 5:20] = np.nan
    long = long._replace(v=v, length=np.asarray(kept, np.int32))
    for n in (4, 10):
        new = X[:, 16 : 16 + n]
        y, _ = call(new, state=long, segment_ids=pick(n))
        rows, ends = np.zeros_like(X), np.asarray(kept) + n
        for row, (k, end) in enumerate(zip(kept, ends, strict=True)):
            rows[row, :end] = np.concatenate([X[row, :k], new[row]])
        want = without_a_state(mask, rows, ids, ends)
        for row, (k, end) in enumerate(zip(kept, ends, strict=True)):
            np.testing.assert_allclose(y[row], want[row, k:end], atol=2e-6)


@functools.cache
def model_of(causal):
    """A language model and its call of given parameters, compiled once for a shape."""
    config = LanguageModelConfig(
        vocab_size=20, d_model=16, n_heads=2, pattern=("attention",), repeats=2, causal=causal
    )
    model = LanguageModel(config)
    params = draw(model, np.zeros((1, 9), np.int32))
    return model, functools.partial(jax.jit(model.apply), params)


@pytest.mark.slow
@pytest.mark.parametrize("ids", [0, *slowly((None,), (-1,), (3,))])
def test_a_model_that_reads_both_ways(ids):
    model, call = model_of(causal=False)
    tokens = np.arange(9)[None]
    ids = None if ids is None else np.full((1, 9), ids)
    want, _ = call(tokens, segment_ids=ids)
    got, _ = call(tokens, segment_ids=ids, state=model.init_state(1, ROOM))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_positions_begin_anew_in_a_segment_of_any_id():
    ids = jnp.asarray([[-1, -1, 4, 4, 0, -1, -1]])
    np.testing.assert_array_equal(token_positions(1, 7, ids), [[0, 1, 0, 1, 0, 0, 1]])
    for last, want in ((4, [0, 1, 2]), (-1, [5, 6, 7])):
        state = jnp.asarray([5]), jnp.asarray([last])
        np.testing.assert_array_equal(token_positions(1, 3, jnp.full((1, 3), -1), *state), [want])
        start = jnp.asarray([0]), jnp.asarray([last])  # before the first token there is no segment
        np.testing.assert_array_equal(
            token_positions(1, 3, jnp.full((1, 3), 7), *start), [[0, 1, 2]]
        )


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("bfloat16", "uint8"), *slowly(("float32", None), ("bfloat16", None), ("float32", "uint8"))],
)
def test_a_state_keeps_its_dtypes_and_follows_the_calls_positions(dtype, kind):
    """Whatever integers a call brings: a loop's carry may not change."""
    pattern = ("attention", "local_attention:4", *RECURRENT)
    config = LanguageModelConfig(
        vocab_size=20, d_model=16, n_heads=2, pattern=pattern, repeats=1, dtype=jnp.dtype(dtype),
        mixers={"mamba2": {"head_dim": 16}},
    )  # fmt: skip
    model = LanguageModel(config)
    tokens = jnp.zeros((B, 3), jnp.int32)
    integers = {} if kind is None else dict.fromkeys(
        ("segment_ids", "positions"), jnp.zeros((B, 3), kind)
    )  # fmt: skip

    def run():
        state = model.init_state(B, ROOM)
        (_, new), _ = model.init_with_output(jax.random.key(0), tokens, state=state, **integers)
        return state, new

    state, new = jax.eval_shape(run)
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype.name), tree)
    assert shapes(new) == shapes(state)


@pytest.mark.slow
def test_positions_of_a_call_are_counted_on_from():
    model, call = model_of(causal=True)
    tokens, given = np.arange(6)[None], np.asarray([[253, 254, 255]], np.uint8)
    _, state = call(tokens[:, :3], state=model.init_state(1, 9), positions=given)
    np.testing.assert_array_equal(state.position, [256])
    got, _ = call(tokens[:, 3:], state=state)
    want, _ = call(tokens, positions=np.arange(253, 259)[None])
    np.testing.assert_allclose(got, want[:, 3:], atol=1e-5)
    with pytest.raises(TypeError, match="positions must be integers .*got float32"):
        call(tokens, positions=jnp.zeros((1, 6)))


@pytest.mark.parametrize(
    "kind", [*QUICK, *slowly(*((kind,) for kind in RECURRENT if kind not in QUICK))]
)
def test_a_new_segment_forgets_even_nan(kind):
    """What a recurrent state and its convolution's window hold of the segment before."""
    options = {"mamba2": {"head_dim": 16, "state_dim": 8, "state_window": 5}}
    own = {kind: options[kind]} if kind in options else {}
    config = LanguageModelConfig(vocab_size=20, d_model=16, pattern=(kind,), repeats=1, mixers=own)
    mixer = make_mixer(config, kind)
    x = np.tile(X[:, :6], 2)[..., :16]
    params, fresh = draw(mixer, x), mixer.init_state(2, 6)
    broken = jax.tree.map(
        lambda a: np.full(a.shape, np.nan if jnp.issubdtype(a.dtype, jnp.inexact) else 3, a.dtype),
        fresh,
    )
    call = jax.jit(lambda state, ids: mixer.apply(params, x, state=state, segment_ids=ids))
    want, got = (call(state, np.full((2, 6), 4)) for state in (fresh, broken))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), got, want)
    y, _ = call(broken, np.asarray([[3] * 6, [4] * 6]))  # the first row goes on
    assert np.isnan(y[0]).any() and np.isfinite(y[1]).all()
