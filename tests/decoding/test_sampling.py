"""Sampling: the distribution, and that prefill and steps are the parallel forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tilescan.decoding.sampling import filter_logits, generate, stream
from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.ops import masks

V = 23
CONFIGS = {
    "llama": dict(n_kv_heads=2),
    "gpt2": dict(
        position="learned",
        norm="layernorm",
        mlp="gelu_tanh",
        attention_bias=True,
        mlp_bias=True,
        tie_embeddings=False,
    ),
    "window": dict(pattern=("local_attention:4", "mlp"), n_kv_heads=1),
}
PROMPT = np.random.default_rng(3).integers(0, V, (3, 9)).astype(np.int32)
LENGTHS = np.asarray([9, 4, 1])


@functools.cache
def make(name: str):
    config = LanguageModelConfig(
        vocab_size=V, d_model=16, repeats=2, n_heads=4, max_len=32, **CONFIGS[name]
    )
    model = LanguageModel(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), PROMPT)["params"]
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape, scale=0.5).astype(np.float32)
    return model, jax.tree.map(draw, nn.unbox(shapes))


@functools.cache
def forward(name: str):
    model, params = make(name)
    return jax.jit(lambda tokens: model.apply({"params": params}, tokens)[0])


def greedy_by_forward(name, prompt, n, width):
    """The slow definition: the whole text again for each token (padded: one compilation)."""
    text = list(map(int, prompt))
    for _ in range(n):
        padded = np.asarray([text + [0] * (width - len(text))])
        text.append(int(np.argmax(forward(name)(padded)[0], axis=-1)[len(text) - 1]))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "window"))]
)
def test_greedy_is_the_parallel_forward(name):
    """Also for prompts of different lengths in one batch."""
    model, params = make(name)
    out = generate(model, params, PROMPT, max_new_tokens=6, lengths=LENGTHS)
    for row, length, tokens in zip(PROMPT, LENGTHS, out.tokens, strict=True):
        assert list(tokens) == greedy_by_forward(name, row[:length], 6, 15)
    np.testing.assert_array_equal(out.lengths, [6, 6, 6])


@pytest.mark.slow
def test_stops_at_the_end_of_text_and_streams_the_same():
    model, params = make("llama")
    free = generate(model, params, PROMPT, max_new_tokens=6).tokens
    assert list(free[0]) == greedy_by_forward("llama", PROMPT[0], 6, 15)
    eos = int(free[0, 2])
    out = generate(model, params, PROMPT, max_new_tokens=6, eos=eos)
    for row, unstopped, length in zip(out.tokens, free, out.lengths, strict=True):
        found = np.flatnonzero(unstopped == eos)
        end = found[0] + 1 if len(found) else 6
        assert length == end
        np.testing.assert_array_equal(row[:end], unstopped[:end])
        assert (row[end:] == eos).all()
    streamed = list(stream(model, params, PROMPT, max_new_tokens=6, eos=eos))
    assert len(streamed) == out.lengths.max()
    np.testing.assert_array_equal(np.stack(streamed, 1), out.tokens[:, : len(streamed)])


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbors_and_the_key_decides():
    model, params = make("llama")
    draw = functools.partial(
        generate, model, params, max_new_tokens=20, temperature=1.5, lengths=LENGTHS
    )
    a = draw(PROMPT, key=jax.random.key(0))
    b = draw(np.where([[0], [1], [0]], 0, PROMPT), key=jax.random.key(0))
    np.testing.assert_array_equal(a.tokens[::2], b.tokens[::2])
    assert (a.tokens != draw(PROMPT, key=jax.random.key(1)).tokens).any()


def test_sampled_tokens_follow_the_models_distribution():
    """First tokens of 4,000 rows against the forward's softmax: chi-square; logprobs as well."""
    model, params = make("gpt2")
    prompt = np.tile(PROMPT[:1, :2], (4000, 1))
    out = generate(
        model,
        params,
        prompt,
        max_new_tokens=1,
        temperature=2.0,
        top_k=8,
        key=jax.random.key(5),
    )
    text = np.pad(PROMPT[:1, :2], ((0, 0), (0, 13)))
    p = np.exp(reference(np.asarray(forward("gpt2")(text))[0, 1], 2.0, 8, None))
    counts = np.bincount(out.tokens[:, 0], minlength=V)
    assert counts[p == 0].sum() == 0
    from scipy import stats  # a second of importing

    assert stats.chisquare(counts[p > 0], 4000 * p[p > 0] / p.sum()).pvalue > 1e-3
    np.testing.assert_allclose(np.exp(out.logprobs[:, 0]), p[out.tokens[:, 0]], atol=1e-5)


def reference(logits, temperature, top_k, top_p):
    """The definition, one token after another, in float64."""
    logits = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-logits, kind="stable")
    kept = list(order[:top_k])
    if top_p is not None:
        p = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
        total, nucleus = 0.0, []
        for token, q in zip(kept, p, strict=True):
            nucleus.append(token)
            total += q
            if total >= top_p:
                break
        kept = nucleus
    out = np.full(len(logits), -np.inf)
    out[kept] = logits[kept] - np.log(np.exp(logits[kept]).sum())
    return out


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k,top_p", [(None, None), (5, None), (1, None), (None, 0.7), (6, 0.5)])
def test_filtered_distribution(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(4, V)) * 2
    ours = filter_logits(jnp.asarray(logits, jnp.float32), temperature, top_k, top_p)
    for row, expected in zip(ours, logits, strict=True):
        np.testing.assert_allclose(row, reference(expected, temperature, top_k, top_p), atol=1e-4)


def test_ties_and_extremes_of_the_nucleus():
    run = lambda x, *settings: jax.jit(lambda x: filter_logits(x, 1.0, *settings))(np.float32(x))
    logits = np.log([[0.25, 0.25, 0.25, 0.25]])
    np.testing.assert_array_equal(run(logits, 2)[0] > -np.inf, [1, 1, 0, 0])
    # A p smaller than any probability leaves the most probable token.
    tiny = run([[0.0, 3.0, 1.0, 2.0]], None, 1e-9)
    np.testing.assert_array_equal(tiny, [[-np.inf, 0.0, -np.inf, -np.inf]])
    # Of two halves the first one reaches a half.
    half = run([[0.0, 0.0, -np.inf, -np.inf]], None, 0.5)
    np.testing.assert_array_equal(half, [[0.0, -np.inf, -np.inf, -np.inf]])
    whole = run(logits, None, 1.0)
    np.testing.assert_allclose(whole, logits, atol=1e-6)


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(temperature=-1.0), "temperature=-1.0 must be 0"),
        (dict(temperature=1.0), "temperature=1.0 needs key"),
        (dict(top_k=0), "top_k=0 must be between 1 and vocab_size=23"),
        (dict(top_k=24), "top_k=24 must be between 1 and vocab_size=23"),
        (dict(top_p=0.0), r"top_p=0.0 must be in \(0, 1\]"),
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(max_new_tokens=24), "33 tokens, but the model has positions for max_len=32"),
        (dict(lengths=[9, 4, 0]), "lengths must be .* between 1 and the prompt's 9"),
        (dict(lengths=[9, 4]), r"lengths must be \[3\] numbers"),
        (dict(prompt=PROMPT[0]), r"prompt must be \[batch, time\]"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    model, params = make("gpt2")
    settings = dict(max_new_tokens=2, prompt=PROMPT) | settings
    with pytest.raises(ValueError, match=message):
        generate(model, params, settings.pop("prompt"), **settings)


def test_masks_that_count_from_the_start_refuse_ragged_prompts():
    config = LanguageModelConfig(
        vocab_size=V,
        d_model=16,
        repeats=1,
        n_heads=2,
        mixers={"attention": {"mask": masks.Lambda(2, 4)}},
    )
    with pytest.raises(ValueError, match="depends on distances alone; with Lambda"):
        generate(LanguageModel(config), {}, PROMPT, max_new_tokens=2, lengths=LENGTHS)
