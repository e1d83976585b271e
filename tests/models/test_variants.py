"""Several variants of a mixer in one pattern, such as two windows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.blocks import Block
from tilescan.models.stream_bp import stream_hidden

T, V = 21, 17
FIELDS = dict(vocab_size=V, d_model=16, repeats=1, n_heads=2, mlp_dim=24)
TWO_WINDOWS = dict(
    pattern=("local_attention:3", "mlp", "local_attention:6", "attention:nope"),
    mixers={"attention:nope": {"position": "none", "n_kv_heads": 1}},
)
TOKENS = jax.random.randint(jax.random.key(1), (2, T), 0, V)


def made(**fields):
    model = LanguageModel(LanguageModelConfig(**FIELDS, **(TWO_WINDOWS | fields)))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS))["params"]
    return model, params


def reference_layer(x, block, *, left, rotate, heads=2):
    """x + attention(norm(x)) by the whole matrix of scores and a mask written out, in NumPy."""
    norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    h = norm(x, np.asarray(block["norm"]["scale"], np.float64))
    project = lambda name: np.einsum(
        "bte,ehd->bthd", h, np.asarray(block["mixer"][name]["kernel"], np.float64)
    )
    q, k, v = project("query"), project("key"), project("value")
    k, v = (np.repeat(a, heads // a.shape[2], axis=2) for a in (k, v))
    if rotate:
        angles = np.arange(T)[:, None] * 10000.0 ** (-2 * np.arange(q.shape[3] // 2) / q.shape[3])
        cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
        turn = lambda a, b: np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        q, k = (turn(*np.split(a, 2, axis=-1)) for a in (q, k))
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[3])
    scores = np.where((j <= i) & (i - j <= left), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    o = np.einsum("bhts,bshd->bthd", weights, v)
    return x + np.einsum(
        "bthd,hde->bte", o, np.asarray(block["mixer"]["out"]["kernel"], np.float64)
    )


def test_each_layer_has_its_own_mask():
    """Without the MLP, so that all of the model is attention, written out."""
    pattern = ("local_attention:3", "local_attention:6", "attention:nope")
    model, params = made(pattern=pattern)
    layers = jax.tree.map(lambda a: a[0], params["backbone"]["layers"])
    assert set(layers) == {"local_attention_0", "local_attention_1", "attention_2"}
    x = np.asarray(params["backbone"]["embed"]["embedding"], np.float64)[TOKENS]
    x = reference_layer(x, layers["local_attention_0"], left=2, rotate=True)
    x = reference_layer(x, layers["local_attention_1"], left=5, rotate=True)
    x = reference_layer(x, layers["attention_2"], left=T, rotate=False)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    want = x @ np.asarray(params["backbone"]["embed"]["embedding"], np.float64).T
    got, _ = jax.jit(model.apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
def test_decoding_equals_reading_at_once():
    model, params = made()
    want, _ = jax.jit(model.apply)({"params": params}, TOKENS)
    step = jax.jit(lambda state, tokens: model.apply({"params": params}, tokens, state=state))
    logits, state = step(model.init_state(2, T), TOKENS[:, :9])
    found = [logits]
    for t in range(9, T):
        logits, state = step(state, TOKENS[:, t : t + 1])
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), want, atol=2e-5)


@pytest.mark.slow  # test_language_model.py has two layers of one window
@pytest.mark.parametrize(
    ("windows", "reach"),
    [
        ((3, 6), 7), ((6, 3), 7), ((1, 4), 3), ((2, 2), 2),
    ],
)  # fmt: skip
def test_windows_add_up_and_nothing_sees_the_future(windows, reach):
    """By the gradient of one token's output: it depends on the last sum(window - 1) and itself."""
    pattern = tuple(f"local_attention:{window}" for window in windows)
    model, params = made(pattern=pattern, mixers={})
    at = 15

    def output(embedded):
        x = embedded
        for i, block in enumerate(pattern):
            own = params["backbone"]["layers"][f"local_attention_{i}"]
            own = jax.tree.map(lambda a: a[0], own)
            x, _ = Block(model.config, block).apply({"params": own}, x)
        return jnp.sum(x[:, at] * weight)

    weight = jax.random.normal(jax.random.key(3), (2, 16))
    slope = jax.grad(output)(jax.random.normal(jax.random.key(2), (2, T, 16)))
    seen = np.flatnonzero(np.abs(slope).max(axis=(0, 2)))
    np.testing.assert_array_equal(seen, np.arange(at - reach, at + 1))


@pytest.mark.slow  # half a minute of compiling; test_stream_bp has two windows too
def test_variants_stream_and_have_gradients():
    model, params = made()
    ids = jnp.asarray([[1] * 8 + [2] * 13, [1] * 21])
    weight = jax.random.normal(jax.random.key(4), (2, T, 16))

    def loss(hidden, params):
        return jnp.sum(hidden(params) * weight)

    whole = lambda p: model.apply({"params": p}, TOKENS, segment_ids=ids, method="hidden")[0]
    chunks = lambda p: stream_hidden(model, p, TOKENS, chunks=3, segment_ids=ids)
    want, got = (jax.jit(jax.value_and_grad(functools.partial(loss, f)))(params)
                 for f in (whole, chunks))  # fmt: skip
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))
