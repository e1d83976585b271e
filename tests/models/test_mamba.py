"""Mamba and Mamba-2 against the blocks as they are defined, step by step in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tilescan.decoding import generate
from tilescan.models import LanguageModel, LanguageModelConfig, count_params
from tilescan.models.mamba import Mamba
from tilescan.models.mamba2 import Mamba2
from tilescan.models.state_window import window_sums

M = 16
MAMBA = dict(d_model=M, state_dim=3)
MAMBA2 = dict(d_model=M, state_dim=5, head_dim=4, n_groups=2)
X = np.random.default_rng(0).standard_normal((2, 21, M), np.float32)


def softplus(x):
    return np.logaddexp(0, x)


def silu(x):
    return x / (1 + np.exp(-x))


@functools.cache
def random_params(mixer):
    """Random parameters: biases and scales away from 0 and 1, and steps from small to large."""
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), jnp.asarray(X))["params"]
    rng = np.random.default_rng(1)
    draw = lambda leaf: (0.4 * rng.standard_normal(leaf.shape)).astype(np.float32)
    return jax.tree.map(draw, nn.unbox(shapes))


@functools.cache
def compiled(mixer):
    return jax.jit(mixer.apply)


def run(mixer, x=X, **inputs):
    return compiled(mixer)({"params": random_params(mixer)}, x, **inputs)[0]


def convolve(x, p):
    """silu of the causal depthwise convolution of x [T, E]."""
    kernel, T = p["kernel"], len(x)
    padded = np.concatenate([np.zeros((len(kernel) - 1, x.shape[1])), x])
    y = sum(kernel[j] * padded[j : j + T] for j in range(len(kernel)))
    return silu(y + p.get("bias", 0))


def mamba(p, x, mixer):
    """One sequence [T, M] through the mixer, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    E, N, R = mixer.expand * M, mixer.state_dim, p["dt_proj"]["kernel"].shape[0]
    xz = x @ p["in_proj"]["kernel"] + p["in_proj"].get("bias", 0)
    u, z = convolve(xz[:, :E], p["conv"]), xz[:, E:]
    dt, B, C = np.split(u @ p["x_proj"]["kernel"], (R, R + N), axis=1)
    dt = softplus(dt @ p["dt_proj"]["kernel"] + p["dt_bias"])
    A, h, ys = -np.exp(p["A_log"]), np.zeros((E, N)), []
    for t in range(len(x)):
        h = np.exp(dt[t][:, None] * A) * h + (dt[t] * u[t])[:, None] * B[t]
        ys.append(h @ C[t] + p["D"] * u[t])
    return (np.stack(ys) * silu(z)) @ p["out_proj"]["kernel"] + p["out_proj"].get("bias", 0)


def mamba2(p, x, mixer, first=lambda t: 0):
    """The same of Mamba-2; the state before y_t is that of steps first(t), ..., t from nothing."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    E, N, G, P = mixer.expand * M, mixer.state_dim, mixer.n_groups, mixer.head_dim
    H, T = E // P, len(x)
    zxbcdt = x @ p["in_proj"]["kernel"] + p["in_proj"].get("bias", 0)
    z, xBC, dt = np.split(zxbcdt, (E, 2 * E + 2 * G * N), axis=1)
    u, B, C = np.split(convolve(xBC, p["conv"]), (E, E + G * N), axis=1)
    u, B, C = u.reshape(T, H, P), B.reshape(T, G, N), C.reshape(T, G, N)
    B, C = (np.repeat(a, H // G, axis=1) for a in (mixer.b_scale * B, C))
    dt = softplus(dt + p["dt_bias"]) * mixer.dt_scale
    if mixer.dt_limit:
        dt = np.clip(dt, *mixer.dt_limit)
    decay = np.exp(-dt * np.exp(p["A_log"])) * mixer.decay_scale
    ys = np.empty((T, H, P))
    for t in range(T):
        h = np.zeros((H, P, N))
        for i in range(first(t), t + 1):
            h = decay[i][:, None, None] * h
            h += (dt[i][:, None] * u[i])[:, :, None] * B[i][:, None]
        ys[t] = np.einsum("hpn,hn->hp", h, C[t]) + p["D"][:, None] * u[t]
    y = (ys.reshape(T, E) * silu(z)).reshape(T, G, E // G)
    y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + mixer.norm_eps)
    y = y.reshape(T, E) * p["norm"]["scale"]
    return y @ p["out_proj"]["kernel"] + p["out_proj"].get("bias", 0)


@pytest.mark.parametrize(
    "options", [{}, dict(expand=1, conv_width=2, conv_bias=False, use_bias=True, dt_rank=4)]
)
def test_mamba_is_its_definition(options):
    mixer = Mamba(**MAMBA | options)
    want = np.stack([mamba(random_params(mixer), x, mixer) for x in X.astype(np.float64)])
    np.testing.assert_allclose(run(mixer), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "options",
    [
        dict(expand=4, n_groups=1, conv_width=3, conv_bias=False, use_bias=True, norm_eps=0.1),
        dict(dt_limit=(0.5, 0.9), decay_scale=0.8, b_scale=0.75, dt_scale=0.5),
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {}, dict(dt_limit=(0.5, 0.9)), dict(decay_scale=0.8, b_scale=0.75, dt_scale=0.5),
            )
        ),
    ],
)  # fmt: skip
def test_mamba2_is_its_definition(options):
    mixer = Mamba2(**MAMBA2 | options)
    want = np.stack([mamba2(random_params(mixer), x, mixer) for x in X.astype(np.float64)])
    np.testing.assert_allclose(run(mixer), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("r", [7, *(pytest.param(r, marks=pytest.mark.slow) for r in (1, 2, 12))])
def test_a_window_is_a_scan_of_its_last_steps_alone(r):
    """With interventions too; the convolution is not windowed."""
    mixer = Mamba2(**MAMBA2, state_window=r, decay_scale=0.9)
    p, first = random_params(mixer), lambda t: max(0, t + 1 - r)
    want = np.stack([mamba2(p, x, mixer, first) for x in X.astype(np.float64)])
    np.testing.assert_allclose(run(mixer), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.slow
def test_a_window_longer_than_the_text_changes_nothing():
    windowed, plain = Mamba2(**MAMBA2, state_window=30), Mamba2(**MAMBA2)
    np.testing.assert_allclose(run(windowed), run(plain), atol=1e-6)


@pytest.mark.slow
def test_a_window_goes_on_in_the_next_call_and_ends_with_its_document():
    mixer = Mamba2(**MAMBA2, state_window=5)
    ids = jnp.asarray([[3] * 9 + [4] * 12, [1] * 2 + [2] * 3 + [1] * 16])
    whole = run(mixer, segment_ids=ids)
    step, parts, state = jax.jit(mixer.apply), [], mixer.init_state(2, 0)
    params = {"params": random_params(mixer)}
    for i, j in ((0, 9), (9, 12), (12, 21)):
        y, state = step(params, X[:, i:j], state=state, segment_ids=ids[:, i:j])
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(whole[:1, 9:], run(mixer, X[:1, 9:]), atol=1e-5)
    np.testing.assert_allclose(whole[1:, 5:], run(mixer, X[1:, 5:]), atol=1e-5)
    assert not jnp.allclose(whole, run(mixer), atol=1e-2)


def test_window_sums():
    a = np.random.default_rng(0).standard_normal((1, 23, 2)).astype(np.float32)
    for r in (1, 2, 3, 8, 11, 23):
        want = np.stack([a[:, i : i + r].sum(1) for i in range(24 - r)], axis=1)
        np.testing.assert_allclose(window_sums(jnp.asarray(a), r), want, atol=1e-5)


def test_traces_are_steps_decays_and_the_norm_of_the_state():
    mixer = Mamba2(**MAMBA2)
    params, state = {"params": random_params(mixer)}, mixer.init_state(2, 0)
    traced = jax.jit(functools.partial(mixer.apply, mutable=["intermediates"]))
    (_, new), traces = traced(params, X, state=state)
    traces = {name: value[0] for name, value in traces["intermediates"].items()}
    assert traces["dt"].shape == (2, 21, 8)
    A = -jnp.exp(random_params(mixer)["A_log"])
    np.testing.assert_allclose(
        traces["cumulative_log_decay"], np.cumsum(traces["dt"] * A[None, None], 1), rtol=1e-5
    )
    norms = np.sqrt(np.square(np.asarray(new.ssm)).sum((2, 3)))
    np.testing.assert_allclose(traces["state_norm"], norms, rtol=1e-5)
    # Through a scan over layers they come stacked.
    config = LanguageModelConfig(
        vocab_size=7,
        d_model=M,
        pattern=("mamba2",),
        repeats=3,
        mixers=dict(mamba2=dict(head_dim=8, state_dim=4)),
    )
    tokens = jnp.arange(10).reshape(2, 5) % 7
    params = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)
    assert set(params) == {"params"}
    traced = functools.partial(LanguageModel(config).apply, mutable=["intermediates"])
    _, traces = jax.eval_shape(traced, params, tokens)
    layers = traces["intermediates"]["backbone"]["layers"]["mamba2_0"]["mixer"]
    assert layers["dt"][0].shape == (3, 2, 5, 4)


@pytest.mark.parametrize("make", [lambda: Mamba(64, expand=4), lambda: Mamba2(64, head_dim=2)])
def test_initial_values(make):
    """The ranges that the two papers' models start from."""
    mixer = make()
    p = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 3, 64))))["params"]
    if isinstance(mixer, Mamba2):
        A = np.exp(p["A_log"])
        assert A.shape == (64,) and 1 <= A.min() < 3 and 14 < A.max() <= 16
    else:
        np.testing.assert_allclose(np.exp(p["A_log"]), np.tile(np.arange(1, 17), (256, 1)), 1e-5)
        assert 0.45 < np.abs(p["dt_proj"]["kernel"]).max() <= 4**-0.5 + 1e-6
    steps = softplus(np.asarray(p["dt_bias"], np.float64))
    assert 0.99e-3 <= steps.min() < 3e-3 and 0.05 < steps.max() <= 0.101
    assert abs(np.log(steps).mean() - np.log(1e-2)) < 0.5  # log-uniform
    np.testing.assert_array_equal(p["D"], 1)
    for name, bound in (
        ("in_proj", 64**-0.5),
        ("out_proj", p["out_proj"]["kernel"].shape[0] ** -0.5),
    ):
        w = np.abs(p[name]["kernel"])
        assert 0.98 * bound < w.max() <= 1.0001 * bound
        assert abs(w.mean() - bound / 2) < 0.02 * bound
    assert 0.48 < np.abs(p["conv"]["kernel"]).max() <= 0.5 and p["conv"]["bias"].any()


def test_decays_and_steps_stay_in_float32():
    mixer = Mamba2(**MAMBA2, param_dtype=jnp.bfloat16)
    p = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), X)["params"])
    assert all(p[name].dtype == jnp.float32 for name in ("A_log", "dt_bias", "D"))
    assert p["in_proj"]["kernel"].dtype == p["conv"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(head_dim=5), "head_dim=5 must divide expand .* = 32; for example head_dim=1"),
        (dict(n_groups=3), "n_groups=3 must divide the 8 heads"),
        (dict(decay_scale=1.5), r"decay_scale=1.5 must be in \(0, 1\]"),
        (dict(state_window=0), "state_window=0 must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(**MAMBA2 | options).init_state(1, 1)


@pytest.mark.slow
def test_a_hybrid_reads_on_from_its_state():
    config = LanguageModelConfig(
        vocab_size=31,
        d_model=M,
        n_heads=2,
        pattern=("mamba2", "attention", "mamba"),
        repeats=2,
        mixers=dict(mamba2=dict(head_dim=8, state_dim=4), mamba=dict(state_dim=2)),
    )
    model = LanguageModel(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 19), 0, 31)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    whole, _ = jax.jit(model.apply)(params, tokens)
    step, state, parts = jax.jit(model.apply), model.init_state(2, 19), []
    for i, j in [(0, 15)] + [(i, i + 1) for i in range(15, 19)]:
        logits, state = step(params, tokens[:, i:j], state=state)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)


@pytest.mark.slow
def test_prompts_of_different_lengths_are_continued_as_alone():
    """Padding before a prompt is a segment of its own, which leaves nothing in the state."""
    config = LanguageModelConfig(
        vocab_size=31,
        d_model=M,
        pattern=("mamba2", "mamba"),
        repeats=1,
        mixers=dict(mamba2=dict(head_dim=8, state_dim=4), mamba=dict(state_dim=2)),
    )
    model = LanguageModel(config)
    prompt = jax.random.randint(jax.random.key(1), (2, 9), 0, 31)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), prompt))["params"]
    params = jax.tree.map(lambda a: 3 * a, params)  # far from ties
    both = generate(model, params, prompt, max_new_tokens=6, temperature=0.0, lengths=[4, 9])
    for row, length in ((0, 4), (1, 9)):
        alone = generate(
            model, params, prompt[row : row + 1, :length], max_new_tokens=6, temperature=0.0
        )
        np.testing.assert_array_equal(both.tokens[row], alone.tokens[0])
    assert len(set(np.asarray(both.tokens).ravel())) > 2


def published(kind, d_model, layers, vocab_size):
    return LanguageModelConfig(
        vocab_size=vocab_size, d_model=d_model, pattern=(kind,), repeats=layers
    )


@pytest.mark.parametrize(
    ("kind", "vocab_size", "count"),
    [("mamba", 50280, 129_135_360), ("mamba2", 50288, 128_989_632)],
)
def test_the_published_130m_models_have_as_many_parameters(kind, vocab_size, count):
    model = LanguageModel(published(kind, 768, 24, vocab_size))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    assert count_params(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]) == count


@pytest.mark.parametrize(
    ("d_model", "layers", "millions"), [(768, 24, 4.85), (1024, 48, 12.9), (1536, 48, 19.35)]
)
def test_the_state_is_as_large_as_published(d_model, layers, millions):
    """N_S of arXiv 2410.07145: elements of all states, the convolutions' inputs included."""
    model = LanguageModel(published("mamba2", d_model, layers, 50288))
    state = jax.eval_shape(lambda: model.init_state(1, 1)).layers[0]
    assert abs((state.ssm.size + state.conv.size) / 1e6 - millions) < 0.05
