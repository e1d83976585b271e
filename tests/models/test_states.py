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

B, E, ROOM = 2, 12, 40
MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(4),
    "both sides": masks.SlidingWindow(4, 3),
    "prefix": masks.Causal() | masks.Prefix(7),
    "sinks": masks.Lambda(2, 5),
}
RECURRENT, QUICK = tuple(filter(is_recurrent, MIXERS)), ("mamba2", "h3")
IDS = {
    "none": None,
    "zero": np.zeros((B, 26), np.int32),
    "negative": np.full((B, 26), -1, np.int32),
    "documents": np.repeat([[0, -1, 5], [-(2**31), 2, 0]], [9, 7, 10], axis=1).astype(np.int32),
}


@functools.cache
def mixer_and_params(mask, position="rope"):
    mixer = Attention(n_heads=2, n_kv_heads=1, head_dim=8, mask=MASKS[mask], position=position)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, 26, E)), jnp.float32)
    params = nn.unbox(mixer.init(jax.random.key(0), x))
    return mixer, params, x


def poisoned(state, start):
    """The state with NaN, and id 0, in all slots from `start` on."""
    empty = jnp.arange(ROOM) >= start
    hide = lambda x: jnp.where(empty[None, :, None, None], jnp.nan, x)
    ids = jnp.where(empty[None], 0, state.segment_ids)
    return state._replace(k=hide(state.k), v=hide(state.v), segment_ids=ids)


def assert_equals_one_call(mask, ids, chunks, position="rope", poison=False):
    """A chunk reads what came before it and itself, as at the end of a call without a state."""
    mixer, params, x = mixer_and_params(mask, position)
    call = jax.jit(mixer.apply)
    state, start = mixer.init_state(B, ROOM), 0
    for n in chunks:
        end = start + n
        pick = lambda a, first, end=end: None if a is None else jnp.asarray(a)[:, first:end]
        state = poisoned(state, start) if poison else state
        y, state = call(params, pick(x, start), state=state, segment_ids=pick(ids, start))
        want, _ = call(params, pick(x, 0), segment_ids=pick(ids, 0))
        np.testing.assert_allclose(y, want[:, start:], atol=2e-6)
        np.testing.assert_array_equal(state.length, end)
        start = end


def slowly(*values):
    return [pytest.param(*value, marks=pytest.mark.slow) for value in values]


# Up to 8 tokens are split over keys, more over queries.
@pytest.mark.parametrize(
    "mask", ["full", "both sides", "prefix", *slowly(("causal",), ("window",), ("sinks",))]
)
def test_chunks_of_any_mask(mask):
    assert_equals_one_call(mask, None, (9, 3), poison=True)


@pytest.mark.parametrize(
    ("mask", "ids"),
    [
        ("full", "zero"),
        ("causal", "documents"),
        *slowly(*itertools.product(("full", "causal", "both sides"), ("negative", "documents"))),
    ],
)
def test_ids_of_any_value(mask, ids):
    assert_equals_one_call(mask, IDS[ids], (10, 4, 12), poison=True)


@pytest.mark.parametrize("mask", ["full", *slowly(("causal",))])
def test_alibi_counts_from_the_state_on(mask):
    assert_equals_one_call(mask, None, (9, 3), position="alibi")


@pytest.mark.parametrize(
    ("mask", "ids"),
    [
        ("full", "none"),
        *slowly(*itertools.product(("full", "causal", "both sides"), ("none", "zero"))),
    ],
)
def test_forgotten_tokens_are_not_seen(mask, ids):
    """Rows are set back by different lengths, and read on together and row by row."""
    mixer, params, x = mixer_and_params(mask)
    call, ids = jax.jit(mixer.apply), IDS[ids]
    pick = lambda start, n: None if ids is None else jnp.asarray(ids)[:, start : start + n]
    _, long = call(params, x[:, :20], state=mixer.init_state(B, ROOM), segment_ids=pick(0, 20))
    long = long._replace(v=long.v.at[0, 5:20].set(jnp.nan), length=jnp.asarray([5, 12]))
    for n in (3, 9):
        y, _ = call(params, x[:, 17 : 17 + n], state=long, segment_ids=pick(0, n))
        for row, kept in enumerate((5, 12)):
            joined = jnp.concatenate([x[:, :kept], x[:, 17 : 17 + n]], axis=1)
            want, _ = call(params, joined, segment_ids=pick(0, kept + n))
            np.testing.assert_allclose(y[row], want[row, kept:], atol=2e-6)


@pytest.mark.parametrize("ids", [None, 0, *slowly((-1,), (3,))])
def test_a_model_that_reads_both_ways(ids):
    config = LanguageModelConfig(vocab_size=20, d_model=16, n_heads=2, repeats=2, causal=False)
    model, tokens = LanguageModel(config), jnp.arange(9)[None]
    params = nn.unbox(model.init(jax.random.key(0), tokens))
    ids = None if ids is None else jnp.full((1, 9), ids)
    want, _ = model.apply(params, tokens, segment_ids=ids)
    got, _ = model.apply(params, tokens, segment_ids=ids, state=model.init_state(1, ROOM))
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_keeps_its_dtypes_and_follows_the_calls_positions(dtype):
    """Whatever integers a call brings: a loop's carry may not change."""
    pattern = ("attention", "local_attention:4", *RECURRENT)
    config = LanguageModelConfig(
        vocab_size=20, d_model=16, n_heads=2, pattern=pattern, repeats=1, dtype=jnp.dtype(dtype),
        mixers={"mamba2": {"head_dim": 16}},
    )  # fmt: skip
    model = LanguageModel(config)
    tokens = jnp.zeros((B, 3), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    state = model.init_state(B, ROOM)
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype.name), tree)
    for kind in (None, "uint8"):
        extra = {} if kind is None else dict.fromkeys(
            ("segment_ids", "positions"), jnp.zeros((B, 3), kind)
        )  # fmt: skip
        run = lambda params, extra=extra: model.apply(params, tokens, state=state, **extra)
        _, new = jax.eval_shape(run, params)
        assert shapes(new) == shapes(state)


def test_positions_of_a_call_are_counted_on_from():
    config = LanguageModelConfig(vocab_size=20, d_model=16, n_heads=2, repeats=1)
    model = LanguageModel(config)
    tokens = jnp.arange(6)[None]
    params = nn.unbox(model.init(jax.random.key(0), tokens))
    given = jnp.asarray([[253, 254, 255]], jnp.uint8)
    _, state = model.apply(params, tokens[:, :3], state=model.init_state(1, 9), positions=given)
    np.testing.assert_array_equal(state.position, [256])
    got, _ = model.apply(params, tokens[:, 3:], state=state)
    want, _ = model.apply(params, tokens, positions=jnp.arange(253, 259)[None])
    np.testing.assert_allclose(got, want[:, 3:], atol=1e-5)
    with pytest.raises(TypeError, match="positions must be integers .*got float32"):
        model.apply(params, tokens, positions=jnp.zeros((1, 6)))


@pytest.mark.parametrize(
    "kind", [*QUICK, *slowly(*((kind,) for kind in RECURRENT if kind not in QUICK))]
)
def test_a_new_segment_forgets_even_nan(kind):
    """What a recurrent state and its convolution's window hold of the segment before."""
    options = {"mamba2": {"head_dim": 16, "state_dim": 8, "state_window": 5}}
    own = {kind: options[kind]} if kind in options else {}
    config = LanguageModelConfig(vocab_size=20, d_model=16, pattern=(kind,), repeats=1, mixers=own)
    mixer = make_mixer(config, kind)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 16)), jnp.float32)
    params = mixer.init(jax.random.key(0), x)
    fresh = mixer.init_state(2, 6)
    broken = jax.tree.map(
        lambda a: jnp.full_like(a, jnp.nan if jnp.issubdtype(a.dtype, jnp.inexact) else 3), fresh
    )
    call = jax.jit(lambda state, ids: mixer.apply(params, x, state=state, segment_ids=ids))
    want, got = (call(state, jnp.full((2, 6), 4)) for state in (fresh, broken))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), got, want)
    y, _ = call(broken, jnp.asarray([[3] * 6, [4] * 6]))  # the first row goes on
    assert np.isnan(y[0]).any() and np.isfinite(y[1]).all()
