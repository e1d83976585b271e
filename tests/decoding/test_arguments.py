"""What `generate` and `stream` are given: dtypes, bounds, ends; what rows hold after their end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tilescan.decoding.sampling import generate, stream
from tilescan.models import LanguageModel, LanguageModelConfig

V, N = 200, 6
PROMPT = np.random.default_rng(3).integers(0, 100, (3, 5))
CONFIG = LanguageModelConfig(
    vocab_size=V,
    d_model=16,
    pattern=("attention",),
    repeats=1,
    n_heads=2,
    position="learned",
    max_len=32,
    tie_embeddings=False,
)
MODEL = LanguageModel(CONFIG)


def draw_params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
    return jax.tree.map(draw, nn.unbox(shapes))


PARAMS = draw_params()


def run(prompt=PROMPT, **settings):
    return generate(MODEL, PARAMS, prompt, **{"max_new_tokens": N, **settings})


@pytest.fixture(scope="module")
def free():
    return np.asarray(run().tokens)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, list])
def test_prompts_of_any_integers_are_the_same(free, dtype):
    prompt = PROMPT.tolist() if dtype is list else PROMPT.astype(dtype)
    np.testing.assert_array_equal(run(prompt).tokens, free)


def test_ids_beyond_int8_and_after_the_lengths(free):
    high = np.full_like(PROMPT, 199, np.uint8)
    np.testing.assert_array_equal(run(high).tokens, run(high.astype(int)).tokens)
    # What stands after a row's length is never looked at, be it an id or not.
    padded = np.pad(PROMPT, ((0, 0), (0, 2)), constant_values=-100)
    padded[1, 6] = V + 7
    np.testing.assert_array_equal(run(padded, lengths=[5, 5, 5]).tokens, free)


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint8, jnp.int32, jnp.asarray, np.asarray])
def test_integers_of_numpy_and_jax_are_integers(free, kind):
    eos = int(free[0, 2])
    ours = run(max_new_tokens=kind(N), eos=kind(eos) if eos < 128 else np.int64(eos))
    np.testing.assert_array_equal(ours.tokens, run(eos=eos).tokens)


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset, np.asarray, jnp.asarray])
def test_several_ends_and_what_stands_after_them(free, kind):
    """A row repeats the token that ended it; its log-probability there is 0."""
    ends = [int(free[0, 2]), int(free[1, 1]), 7]
    settings = dict(temperature=1e-3, key=jax.random.key(0))
    ours = run(eos=kind(ends), **settings)
    unstopped = run(**settings)
    np.testing.assert_array_equal(unstopped.tokens, free)
    lengths = []
    for row, whole in enumerate(free):
        found = np.flatnonzero(np.isin(whole, ends))
        end = found[0] + 1 if len(found) else N
        lengths.append(end)
        expected = [*whole[:end], *[whole[end - 1]] * (N - end)]
        np.testing.assert_array_equal(ours.tokens[row], expected)
        logprobs = np.where(np.arange(N) < end, unstopped.logprobs[row], 0)
        np.testing.assert_allclose(ours.logprobs[row], logprobs, atol=1e-5)
    np.testing.assert_array_equal(ours.lengths, lengths)
    assert len(set(lengths)) > 1 and min(lengths) < N
    streamed = np.stack(list(stream(MODEL, PARAMS, PROMPT, max_new_tokens=N, eos=kind(ends))), 1)
    np.testing.assert_array_equal(streamed, ours.tokens[:, : max(lengths)])


def test_every_step_draws_anew():
    """Nearly uniform draws: the same noise at each step would give one token again and again."""
    tokens = np.asarray(run(temperature=1e6, key=jax.random.key(7)).tokens)
    assert min(len(set(row)) for row in tokens) >= N - 2  # two in 200 are the same now and then
    assert len({tuple(row) for row in tokens}) == 3


def test_no_ends_are_none(free):
    np.testing.assert_array_equal(run(eos=[]).tokens, free)


@pytest.mark.slow
def test_each_row_has_its_own_temperature(free):
    key, t = jax.random.key(4), np.asarray([0.0, 3.0, 1e-40])
    mixed = run(temperature=t, key=key)
    np.testing.assert_array_equal(mixed.tokens[::2], free[::2])
    hot = run(temperature=3.0, key=key)
    np.testing.assert_array_equal(mixed.tokens[1], hot.tokens[1])
    np.testing.assert_allclose(mixed.logprobs[1], hot.logprobs[1], atol=1e-6)
    np.testing.assert_array_equal(mixed.logprobs[::2], np.zeros((2, N)))
    rows = run(temperature=3.0, key=key, top_p=np.asarray([1e-9, 1.0, 1e-9]))
    np.testing.assert_array_equal(rows.tokens[::2], free[::2])
    np.testing.assert_array_equal(rows.tokens[1], hot.tokens[1])


@pytest.mark.slow
def test_settings_may_be_traced(free):
    """Inside a jit of the user's; what is out of range there draws nothing."""

    @jax.jit
    def inside(params, prompt, temperature, key):
        return generate(MODEL, params, prompt, max_new_tokens=N, temperature=temperature, key=key)

    key = jax.random.key(4)
    np.testing.assert_array_equal(inside(PARAMS, PROMPT, 0.0, key).tokens, free)
    hot = inside(PARAMS, PROMPT, 3.0, key)
    np.testing.assert_array_equal(hot.tokens, run(temperature=3.0, key=key).tokens)
    wrong = inside(PARAMS, PROMPT, jnp.nan, key)
    np.testing.assert_array_equal(wrong.tokens, np.full((3, N), -1))
    np.testing.assert_array_equal(wrong.lengths, [0, 0, 0])
    assert np.isnan(wrong.logprobs).all()


@pytest.mark.parametrize(
    "bad,settings",
    [
        (np.nan, {}),
        pytest.param(
            np.inf,
            dict(temperature=1e-3, top_k=3, key=jax.random.key(0)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_scores_that_are_no_numbers_are_named(free, bad, settings):
    """A token whose vector is not finite: from it on its row has no scores, the others have."""
    once = [(row, i) for row, i in np.ndindex(3, N - 2) if (free == free[row, i]).sum() == 1]
    row, i = next(place for place in once if free[place] not in PROMPT)
    embedding = PARAMS["backbone"]["embed"]["embedding"].copy()
    embedding[free[row, i]] = bad
    params = {**PARAMS, "backbone": {**PARAMS["backbone"], "embed": {"embedding": embedding}}}
    settings = dict(max_new_tokens=N) | settings
    message = f"scores of new token {i + 1} of row {row} hold NaN or inf"
    with pytest.raises(FloatingPointError, match=message):
        generate(MODEL, params, PROMPT, **settings)
    steps, seen = stream(MODEL, params, PROMPT, **settings), []
    with pytest.raises(FloatingPointError, match=message):
        seen.extend(steps)
    np.testing.assert_array_equal(seen, free[:, : i + 1].T)
    drawn = jax.jit(lambda params: generate(MODEL, params, PROMPT, **settings))(params)
    broken = (np.arange(3) == row)[:, None] & (np.arange(N) > i)
    np.testing.assert_array_equal(drawn.tokens, np.where(broken, -1, free))
    np.testing.assert_array_equal(np.isnan(drawn.logprobs), broken)
    np.testing.assert_array_equal(drawn.lengths, N - broken.sum(1))


BAD = [
    (
        dict(prompt=[[1, V, 2]]),
        ValueError,
        r"prompt\[0, 1\]=200 is outside the vocabulary: .*0..199",
    ),
    (dict(prompt=[[1, 2], [3, -1]]), ValueError, r"prompt\[1, 1\]=-1 is outside the vocabulary"),
    (dict(prompt=np.asarray([[2**40]])), ValueError, r"prompt\[0, 0\]=1099511627776 is outside"),
    (dict(prompt=[[1, 2], [V, V]], lengths=[2, 1]), ValueError, r"prompt\[1, 0\]=200"),
    (dict(prompt=[[1.0, 2.0]]), TypeError, "prompt must hold token ids, .* integers, got float64"),
    (dict(prompt=np.ones((1, 2), np.float32)), TypeError, "prompt must hold .* got float32"),
    (dict(prompt=[[True, False]]), TypeError, "prompt must hold .* got bool"),
    (dict(prompt=[["a"]]), TypeError, "prompt must hold token ids"),
    (dict(prompt=[[1, 2], [3]]), ValueError, "rows differ in length: pad them"),
    (dict(prompt=np.zeros((2, 0), int)), ValueError, r"prompt must be \[batch, time\].*\(2, 0\)"),
    (dict(prompt=np.zeros((0, 2), int)), ValueError, r"prompt must be \[batch, time\].*\(0, 2\)"),
    (dict(prompt=[]), ValueError, r"prompt must be \[batch, time\]"),
    (dict(prompt=3), ValueError, r"prompt must be \[batch, time\]"),
    (dict(prompt=np.zeros((1, 40), int)), ValueError, "46 tokens, but .* max_len=32"),
    (dict(max_new_tokens=2.0), TypeError, "max_new_tokens=2.0 must be an integer"),
    (dict(max_new_tokens=np.float64(2)), TypeError, "max_new_tokens=.*2.0.* must be an integer"),
    (dict(max_new_tokens="2"), TypeError, "max_new_tokens='2' must be an integer"),
    (dict(max_new_tokens=None), TypeError, "max_new_tokens=None must be an integer"),
    (dict(max_new_tokens=True), TypeError, "max_new_tokens=True must be an integer"),
    (dict(max_new_tokens=np.bool_(True)), TypeError, "max_new_tokens=.* must be an integer"),
    (dict(max_new_tokens=jnp.asarray(True)), TypeError, "max_new_tokens=.* must be an integer"),
    (dict(max_new_tokens=[2]), TypeError, r"max_new_tokens=\[2\] must be an integer"),
    (dict(max_new_tokens=0), ValueError, "max_new_tokens=0 must be at least 1"),
    (dict(max_new_tokens=-3), ValueError, "max_new_tokens=-3 must be at least 1"),
    (dict(max_new_tokens=2**31), ValueError, "2147483653 tokens; positions count to"),
    (dict(temperature=float("nan")), ValueError, "temperature=nan must be 0 .* finite"),
    (dict(temperature=float("inf")), ValueError, "temperature=inf must be 0 .* finite"),
    (dict(temperature=[1.0, 2.0]), ValueError, r"temperature of shape \(2,\) .* shape \(3,\)"),
    (dict(temperature=[1.0, 0.0, 0.0]), ValueError, r"temperature=\[1.0, 0.0, 0.0\] needs key"),
    (dict(temperature="hot"), TypeError, "temperature='hot' must be a number"),
    (dict(top_p=float("nan")), ValueError, r"top_p=nan must be in \(0, 1\]"),
    (dict(top_k=2.0), TypeError, "top_k=2.0 must be an integer"),
    (dict(top_k=[1, 2, 3]), TypeError, r"top_k=\[1, 2, 3\] must be an integer"),
    (dict(eos=V), ValueError, "eos=200 holds 200, outside the vocabulary: ids are 0..199"),
    (dict(eos=-1), ValueError, "eos=-1 holds -1, outside the vocabulary"),
    (dict(eos=[3, V]), ValueError, r"eos=\[3, 200\] holds 200, outside"),
    (dict(eos="</s>"), TypeError, "eos='</s>' must be a token id, several of them, or None"),
    (dict(eos=["</s>"]), TypeError, r"eos=\['</s>'\] must be a token id"),
    (dict(eos=2.0), TypeError, "eos=2.0 must be a token id"),
    (dict(eos=np.asarray([2.0])), TypeError, "eos=(?s:.)* must be a token id"),
    (dict(eos=True), TypeError, "eos=True must be a token id"),
    (dict(eos=[[1], [2]]), TypeError, r"eos=\[\[1\], \[2\]\] must be a token id"),
    (dict(eos=np.asarray([[1], [2]])), TypeError, "eos=(?s:.)* must be a token id"),
    (dict(eos={"eos": 2}), TypeError, "eos=(?s:.)* must be a token id"),
    (dict(lengths=[5.0, 4.0, 1.0]), TypeError, "lengths must be integers, got float64"),
    (dict(lengths=[True, True, True]), TypeError, "lengths must be integers, got bool"),
    (dict(lengths=5), ValueError, r"lengths must be \[3\] numbers"),
    (dict(lengths=[[5], [5], [5]]), ValueError, r"lengths must be \[3\] numbers"),
    (dict(lengths=[5, 5, -1]), ValueError, "lengths must be .* between 1 and the prompt's 5"),
    (dict(temperature=1.0, key=0), TypeError, "key=0 must be a JAX random key"),
    (dict(key=np.ones(2)), TypeError, "key=.* must be a JAX random key"),
    (dict(temperature=1.0, key=jax.random.split(jax.random.key(0))), ValueError, "one key"),
]


@pytest.mark.parametrize("function", [generate, stream])
@pytest.mark.parametrize("settings,error,message", BAD)
def test_wrong_arguments_are_named(function, settings, error, message):
    """Also by `stream`, at the call."""
    settings = dict(prompt=PROMPT, max_new_tokens=N) | settings
    with pytest.raises(error, match=message):
        function(MODEL, PARAMS, settings.pop("prompt"), **settings)


def test_what_must_be_known_beforehand_is_named():
    for name, value in (("max_new_tokens", 2), ("top_k", 2), ("eos", 2), ("lengths", [5, 5, 4])):
        call = lambda value, name=name: run(**{name: value})
        with pytest.raises(TypeError, match=f"{name} (is|are) traced"):
            jax.jit(call)(jnp.asarray(value))


def test_a_model_of_vectors_is_refused():
    config = LanguageModelConfig(vocab_size=V, input_features=3, tie_embeddings=False)
    with pytest.raises(ValueError, match="input_features=3 reads vectors, not tokens"):
        generate(LanguageModel(config), {}, PROMPT, max_new_tokens=2)


@pytest.mark.slow
def test_keys_of_both_kinds_draw():
    old = run(temperature=1.0, key=jax.random.PRNGKey(1)).tokens
    np.testing.assert_array_equal(old, run(temperature=1.0, key=jax.random.key(1)).tokens)
