"""LanguageModel and SequenceClassifier: identities that hold whatever the numbers are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tilescan.models import (
    LOGICAL_AXES,
    LanguageModel,
    LanguageModelConfig,
    SequenceClassifier,
    abstract_params,
    count_params,
    init_params,
    unroll_params,
)
from tilescan.ops import masks, reference

FIELDS = dict(vocab_size=31, d_model=24, repeats=2, n_heads=4, max_len=64)
SMALL = LanguageModelConfig(**FIELDS)
DEEP = LanguageModelConfig(vocab_size=31, d_model=64, repeats=4, n_heads=4)
GPT2 = dict(
    position="learned", norm="layernorm", mlp="gelu_tanh", attention_bias=True, mlp_bias=True
)
CONFIGS = {
    "llama": dict(n_kv_heads=2, tie_embeddings=False),
    "gpt2": GPT2,
    "window": dict(pattern=("local_attention:5", "mlp"), n_kv_heads=1),
    "hybrid": dict(pattern=("local_attention:3", "mlp", "attention"), post_norm=True),
    "alibi": dict(position="alibi", qk_norm=True),
    "sinks": dict(
        pattern=("local_attention", "mlp"),
        mixers={"local_attention": {"window": 4, "sinks": 2}},
        logit_cap=5.0,
    ),
}
TOKENS = np.random.default_rng(1).integers(0, 31, (2, 19)).astype(np.int32)


def make(name: str, **changes):
    config = LanguageModelConfig(**(FIELDS | CONFIGS.get(name, {}) | changes))
    return LanguageModel(config), init(name)


@functools.cache
def init(name: str):
    """Random parameters; biases and scales too, so that forgetting one would show."""
    config = LanguageModelConfig(**(FIELDS | CONFIGS.get(name, {})))
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        one = "scale" in jax.tree_util.keystr(path)
        return (one + 0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))


@functools.cache
def compiled(model):
    """The model's call, compiled once for shapes: tests share models, and shapes where they can."""
    return jax.jit(model.apply)


def set_length(state, lengths):
    """The state of "llama" with as many tokens in each row, for calls of the same program."""
    lengths = np.asarray(lengths, np.int32)
    cache = state.layers[0]._replace(length=np.tile(lengths[None], (2, 1)))
    return state._replace(layers=(cache, None), position=lengths)


def run(model, params, tokens=TOKENS, **inputs):
    return np.asarray(compiled(model)({"params": params}, tokens, **inputs)[0])


@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hybrid", "alibi", "sinks"))],
)
def test_in_pieces_equals_at_once(name):
    model, params = make(name)
    whole = run(model, params)
    assert whole.shape == (2, 19, 31) and whole.dtype == jnp.float32
    step, state, parts = compiled(model), model.init_state(2, 19), []
    for i, j in [(0, 10)] + [(i, i + 1) for i in range(10, 19)]:
        logits, state = step({"params": params}, TOKENS[:, i:j], state=state)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)
    np.testing.assert_array_equal(state.position, [19, 19])


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_packed_equals_separate(name):
    """Also where the positions are not given: they start again with each segment."""
    model, params = make(name)
    ids = np.asarray([[1] * 7 + [2] * 10 + [0] * 2] * 2)
    packed = run(model, params, segment_ids=ids)
    first, second = run(model, params), run(model, params, np.roll(TOKENS, -7, axis=1))
    np.testing.assert_allclose(packed[:, :7], first[:, :7], atol=2e-5)
    np.testing.assert_allclose(packed[:, 7:17], second[:, :10], atol=2e-5)


@pytest.mark.slow
def test_packed_documents_in_pieces():
    """A call may end in the middle of a document."""
    model, params = make("llama")
    ids = np.asarray([[1] * 7 + [2] * 10 + [3] * 2] * 2)
    packed = run(model, params, segment_ids=ids)[:, :18]
    step, state, parts = compiled(model), model.init_state(2, 18), []
    for a in (0, 9):
        part = slice(a, a + 9)
        logits, state = step(
            {"params": params}, TOKENS[:, part], state=state, segment_ids=ids[:, part]
        )
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), packed, atol=2e-5)


@pytest.mark.slow  # test_window_ends_where_it_says changes a token and nothing before it moves
@pytest.mark.parametrize("name", ["hybrid", "gpt2"])
def test_causal_by_gradient(name):
    """The vector of token 8 moves no score before it, and the scores from it on."""
    model, params = make(name)
    fresh = TOKENS % 30
    fresh[:, 8] = 30  # and nowhere else

    def totals(row):
        embed = params["backbone"]["embed"]["embedding"]
        p = {**params, "backbone": {**params["backbone"]}}
        p["backbone"]["embed"] = {"embedding": jnp.asarray(embed).at[30].set(row)}
        logits = model.apply({"params": p}, fresh)[0][:, :, :30]
        return jnp.sum(jnp.sin(logits), axis=(0, 2))

    row = params["backbone"]["embed"]["embedding"][30]
    size = np.abs(jax.jit(jax.jacrev(totals))(row)).max(axis=1)
    np.testing.assert_array_equal(size[:8], 0)
    assert (size[8:11] > 1e-6).all()


def test_window_ends_where_it_says():
    """Two layers of window 5 see 8 tokens back, not 9."""
    model, params = make("window")
    base = run(model, params)
    other = TOKENS.copy()
    other[:, 4] = (other[:, 4] + 1) % 31
    changed = run(model, params, other)
    moved = np.abs(base - changed).max(axis=(0, 2)) > 0
    np.testing.assert_array_equal(np.flatnonzero(moved), np.arange(4, 13))


@pytest.mark.parametrize("name", ["llama"])
def test_scanned_equals_unrolled(name):
    model, params = make(name)
    unrolled = LanguageModel(dataclasses.replace(model.config, scan_layers=False))
    other = unroll_params(model.config, params)
    shapes = jax.eval_shape(unrolled.init, jax.random.key(0), TOKENS)["params"]
    assert jax.tree.structure(nn.unbox(shapes)) == jax.tree.structure(other)
    np.testing.assert_allclose(run(unrolled, other), run(model, params), atol=1e-5)
    logits = run(unrolled, other, state=unrolled.init_state(2, 19))
    np.testing.assert_allclose(logits, run(model, params), atol=1e-5)


@pytest.mark.slow
def test_remat_changes_no_number():
    def value_and_grad(remat):
        model, params = make("llama", remat=remat)
        loss = lambda p: jnp.mean(jnp.sin(model.apply({"params": p}, TOKENS)[0]))
        return jax.jit(jax.value_and_grad(loss))(params)

    expected = value_and_grad("none")
    for remat in ("full", "dots_no_batch", "offload"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            value_and_grad(remat),
            expected,
        )


@functools.cache
def at_start(seed):
    return init_params(DEEP, seed)


def test_initial_parameters():
    """Residual outputs start smaller by the root of the number of blocks; scores start small."""
    model, params = LanguageModel(DEEP), at_start(8)
    block = params["backbone"]["layers"]["attention_0"]["mixer"]
    assert abs(np.std(block["query"]["kernel"]) * 8 - 1) < 0.05
    assert abs(np.std(block["out"]["kernel"]) * 8 * 8**0.5 - 1) < 0.05
    layers = block["query"]["kernel"]
    assert np.abs(layers[0] - layers[1]).max() > 0.1  # each layer draws its own
    assert np.abs(run(model, params)).max() < 2


def test_parameters_at_the_start_are_the_seeds():
    tokens, got = jnp.zeros((3, 5), jnp.int32), at_start(7)
    want = nn.unbox(jax.jit(LanguageModel(DEEP).init)(jax.random.key(7), tokens))["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(DEEP))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), got)
    other = at_start(8)["backbone"]["embed"]["embedding"]
    assert np.abs(other - got["backbone"]["embed"]["embedding"]).max() > 0.01


def test_counts_of_parameters():
    model, params = make("llama")
    V, E, H, G, D, F = 31, 24, 4, 2, 6, 64
    layer = E * (H + 2 * G) * D + H * D * E + 3 * E * F + 2 * E
    assert count_params(params) == 2 * layer + 2 * V * E + E
    model, params = make("gpt2")
    layer = 4 * (E * E + E) + (E * 4 * E + 4 * E) + (4 * E * E + E) + 4 * E
    assert count_params(params) == 2 * layer + V * E + 64 * E + 2 * E


def test_bfloat16_computes_close_to_float32():
    model, params = make("llama")
    low = LanguageModel(dataclasses.replace(model.config, dtype="bfloat16"))
    exact, rounded = run(model, params), run(low, params)
    assert rounded.dtype == jnp.float32
    assert low.init_state(1, 4).layers[0].k.dtype == jnp.bfloat16
    error = np.sqrt(np.mean((exact - rounded) ** 2) / np.mean(exact**2))
    assert 1e-5 < error < 0.03


def test_every_parameter_names_its_axes():
    for name, changes in CONFIGS.items():
        model, _ = make(name)
        boxed = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        is_box = lambda x: isinstance(x, nn.Partitioned)
        for leaf in jax.tree.leaves(boxed, is_leaf=is_box):
            assert is_box(leaf), changes
            assert len(leaf.names) == len(leaf.value.shape)
            assert set(leaf.names) <= set(LOGICAL_AXES)
        kernel = boxed["backbone"]["layers"]
        kernel = next(v for k, v in kernel.items() if "attention" in k)["mixer"]["query"]["kernel"]
        assert kernel.names == ("layers", "embed", "heads", "head_dim")


def test_unknown_tokens_give_nan_and_full_caches_too():
    model, params = make("llama")
    tokens = TOKENS.copy()
    tokens[0, 5] = 31
    logits = run(model, params, tokens)
    assert np.isnan(logits[0, 5:]).all() and np.isfinite(logits[1]).all()
    step, state = compiled(model), set_length(model.init_state(2, 19), [17, 17])
    for i in range(3):
        logits, state = step({"params": params}, TOKENS[:, i : i + 1], state=state)
        assert np.isnan(logits).all() == (i == 2)


@pytest.mark.parametrize(
    "T", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 9))]
)  # few queries and many take different paths
def test_rows_of_different_length_go_on_each_for_itself(T):
    """Setting a row's length back (speculative decoding does) forgets its last tokens."""
    model, params = make("llama")
    step, lengths = compiled(model), np.asarray([6, 10], np.int32)
    _, state = step({"params": params}, TOKENS[:, :10], state=model.init_state(2, 19))
    state = set_length(state, lengths)
    following = np.stack([TOKENS[0, 6 : 6 + T], TOKENS[1, 10 : 10 + T]])
    logits, state = step({"params": params}, following, state=state)
    whole = run(model, params)
    np.testing.assert_allclose(logits[0], whole[0, 6 : 6 + T], atol=2e-5)
    np.testing.assert_allclose(logits[1], whole[1, 10 : 10 + T], atol=2e-5)
    np.testing.assert_array_equal(state.position, lengths + T)


@pytest.mark.slow
def test_a_mask_of_ones_own():
    mask = masks.Causal() & masks.SlidingWindow(2, 0)
    model, params = make("llama", mixers={"attention": {"mask": mask}})
    narrow, _ = make("llama", pattern=("local_attention:3", "mlp"))
    renamed = dict(params["backbone"]["layers"])
    renamed["local_attention_0"] = renamed.pop("attention_0")
    other = {**params, "backbone": {**params["backbone"], "layers": renamed}}
    np.testing.assert_allclose(run(model, params), run(narrow, other), atol=1e-5)


@pytest.mark.slow
def test_an_attention_of_ones_own():
    """The definition by its name and as a function; decoding by few tokens has its own op."""
    model, params = make("hybrid")
    want = run(model, params)
    for own in ("reference", reference.attention):
        model, _ = make("hybrid", attention_implementation=own)
        np.testing.assert_allclose(run(model, params), want, atol=2e-5)
    zero = lambda q, k, v, **options: jnp.zeros_like(q)
    model, _ = make("hybrid", attention_implementation=zero)
    assert not np.allclose(run(model, params), want, atol=1e-3)


def test_bidirectional_model_sees_the_future():
    model, params = make("", causal=False)
    other = TOKENS.copy()
    other[:, -1] -= 1
    moved = run(model, params) - run(model, params, other)
    assert (np.abs(moved).max(axis=(0, 2)) > 0).all()


@pytest.mark.parametrize("pooling", ["mean", pytest.param("last", marks=pytest.mark.slow)])
def test_classifier_ignores_padding(pooling):
    config = dataclasses.replace(SMALL, causal=False)
    model = SequenceClassifier(config, n_classes=3, pooling=pooling)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape, scale=0.3).astype(x.dtype)
    params = jax.tree.map(draw, nn.unbox(shapes))
    real = np.asarray([[1] * 12 + [0] * 7] * 2)
    apply = jax.jit(model.apply)
    padded = apply(params, TOKENS, segment_ids=real)
    short = apply(params, TOKENS[:, :12])
    assert padded.shape == (2, 3) and padded.dtype == jnp.float32
    np.testing.assert_allclose(padded, short, atol=1e-5)
    whole = apply(params, TOKENS, segment_ids=np.ones_like(real))
    assert np.abs(padded - whole).max() > 1e-3


@pytest.mark.parametrize(
    "inputs,message",
    [
        (dict(tokens=np.zeros((19,), int)), r"tokens must be integers \[batch, time\]"),
        (dict(tokens=np.zeros((2, 3), np.float32)), "got float32"),
        (dict(segment_ids=np.ones((19, 2), int)), r"segment_ids must be \[batch, time\] = \(2, 1"),
        (dict(positions=np.ones((2, 18), int)), r"positions must be .*got \(2, 18\)"),
        (dict(tokens=np.zeros((1, 65), int)), "learned positions for max_len=64"),
    ],
)
def test_wrong_inputs_are_named(inputs, message):
    model, params = make("gpt2")
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, **(dict(tokens=TOKENS) | inputs))


def test_a_prompt_longer_than_the_cache_is_refused():
    model, params = make("llama")
    with pytest.raises(ValueError, match="19 new tokens don't fit a cache of max_len=18"):
        model.apply({"params": params}, TOKENS, state=model.init_state(2, 18))


def test_pooling_is_checked():
    with pytest.raises(ValueError, match="pooling='max' is unknown; it can be 'mean' or 'last'"):
        SequenceClassifier(SMALL, 2, pooling="max").init(jax.random.key(0), TOKENS)


def test_real_inputs_take_the_place_of_tokens():
    """One-hot vectors give what an embedding with the linear map's rows gives."""
    fields = FIELDS | dict(tie_embeddings=False, n_kv_heads=2)
    of_tokens = LanguageModel(LanguageModelConfig(**fields))
    of_vectors = LanguageModel(LanguageModelConfig(**fields, input_features=31))
    params, ids = init("llama"), np.asarray([[1] * 7 + [2] * 12] * 2)
    rows = params["backbone"]["embed"]["embedding"]
    embed = {"kernel": 2 * rows, "bias": -rows.mean(0)}
    vector_params = params | {"backbone": params["backbone"] | {"embed": embed}}
    shifted = params["backbone"] | {"embed": {"embedding": 2 * rows - rows.mean(0)[None]}}
    want = run(of_tokens, params | {"backbone": shifted}, segment_ids=ids)
    one_hot = np.eye(31, dtype=np.float32)[TOKENS]
    got = run(of_vectors, vector_params, one_hot, segment_ids=ids)
    np.testing.assert_allclose(got, want, atol=1e-5)
    shapes = jax.eval_shape(of_vectors.init, jax.random.key(0), one_hot)["params"]
    assert shapes["backbone"]["embed"]["kernel"].names == ("inputs", "embed")
    assert jax.tree.map(jnp.shape, nn.unbox(shapes)) == jax.tree.map(jnp.shape, vector_params)


@pytest.mark.slow
def test_a_classifier_reads_real_inputs():
    config = dataclasses.replace(SMALL, input_features=3, causal=False)
    model = SequenceClassifier(config, n_classes=4)
    x = np.random.default_rng(2).standard_normal((2, 9, 3), np.float32)
    real = np.arange(9) < np.asarray([[5], [9]])
    params, apply = jax.jit(model.init)(jax.random.key(0), x), jax.jit(model.apply)
    scores = apply(params, x, segment_ids=real.astype(np.int32))
    np.testing.assert_allclose(scores[0], apply(params, x[:1, :5])[0], atol=1e-5)


def test_bad_real_inputs_are_named():
    config = dataclasses.replace(SMALL, input_features=3)
    with pytest.raises(ValueError, match="input_features=3 leaves no embedding to tie"):
        LanguageModel(config).init(jax.random.key(0), jnp.ones((2, 5, 3)))
    model = LanguageModel(dataclasses.replace(config, tie_embeddings=False))
    for bad in (TOKENS, jnp.ones((2, 5, 4)), jnp.ones((2, 5, 3), jnp.int32)):
        with pytest.raises(ValueError, match=r"input_features=3.*\[batch, time, 3\], got"):
            model.init(jax.random.key(0), bad)
    with pytest.raises(ValueError, match=r"segment_ids must be \[batch, time\] = \(2, 5\)"):
        model.init(jax.random.key(0), jnp.ones((2, 5, 3)), segment_ids=jnp.ones((2, 5, 3), int))
    with pytest.raises(ValueError, match="input_features=0 must be at least 1"):
        dataclasses.replace(SMALL, input_features=0)


def test_heads_must_fit_only_where_there_is_attention():
    config = LanguageModelConfig(vocab_size=7, d_model=10, n_heads=8, pattern=("mlp",))
    assert config.head_dim == 1


def test_a_configuration_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"takes a .*not a .*; write LanguageModelConfig\(\*\*conf"):
        LanguageModel({"vocab_size": 8})
    with pytest.raises(TypeError, match="SequenceClassifier takes a Lang.*, not a str"):
        SequenceClassifier("small", 2)
