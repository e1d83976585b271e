"""The long convolution against float64 sums: any lengths, carried state, gates, both transforms."""

import functools
import importlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.ops.long_convolution import long_convolution

module = importlib.import_module("tilescan.ops.long_convolution")  # ops's attribute is the function
METHODS = ["fft", "matmul", "direct"]
NAMES = ("u", "kernel", "D", "pre_gate", "post_gate", "initial_state")


def inputs(B, T, K, E, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    u = (B, T, E)
    shapes = (u, (K, E), (E,), u, u, (B, K - 1, E))
    dtype = jnp.dtype(dtype)
    return {n: rng.standard_normal(s).astype(dtype) for n, s in zip(NAMES, shapes, strict=True)}


def reference(arrays, dy, dstate):
    """y, final_state, and the gradients of <dy, y> + <dstate, final_state>, by float64 sums."""
    a = {n: np.asarray(x, np.float64) for n, x in arrays.items()}
    u, k, D, pre, post, state = (a[n] for n in NAMES)
    T, K = u.shape[1], len(k)
    x = u * pre
    full = np.zeros((u.shape[0], T + K - 1, u.shape[2]))
    full[:, : K - 1] += state
    for t in range(T):
        full[:, t : t + K] += x[:, t, None] * k
    before = full[:, :T] + D * x
    g = np.concatenate([dy * post, dstate], axis=1)
    dx = np.stack([(g[:, t : t + K] * k).sum(1) for t in range(T)], 1) + D * g[:, :T]
    dk = np.stack([(g[:, j : j + T] * x).sum((0, 1)) for j in range(K)])
    dD = (g[:, :T] * x).sum((0, 1))
    gradients = (dx * pre, dk, dD, dx * u, dy * before, g[:, : K - 1])
    return before * post, full[:, T:], dict(zip(NAMES, gradients, strict=True))


@functools.partial(jax.jit, static_argnames="method")
def run(arrays, dy, dstate, method):
    out, pull = jax.vjp(lambda a: long_convolution(**a, method=method), arrays)
    return *out, pull((dy, dstate))[0]


def close(x, y, tolerance):
    x, y = np.asarray(x, np.float64), np.asarray(y)
    np.testing.assert_allclose(x, y, atol=tolerance * max(1.0, np.abs(y).max(initial=0.0)))


def assert_equals_the_definition(method, B, T, K):
    arrays = inputs(B, T, K, 3)
    rng = np.random.default_rng(1)
    dy, dstate = (np.float32(rng.standard_normal(s)) for s in ((B, T, 3), (B, K - 1, 3)))
    y, state, gradients = run(arrays, dy, dstate, method)
    want_y, want_state, want = reference(arrays, np.asarray(dy), np.asarray(dstate))
    close(y, want_y, 3e-6)
    close(state, want_state, 3e-6)
    for name in NAMES:
        close(gradients[name], want[name], 3e-6)


@pytest.mark.parametrize(
    "method,B,T,K",
    [
        ("fft", 2, 63, 100),
        ("fft", 1, 3, 1),
        ("matmul", 2, 63, 100),
        pytest.param("matmul", 1, 100, 17, marks=pytest.mark.slow),
        ("direct", 1, 100, 17),
        pytest.param("fft", 1, 100, 17, marks=pytest.mark.slow),
        pytest.param("matmul", 1, 3, 1, marks=pytest.mark.slow),
        pytest.param("direct", 2, 63, 100, marks=pytest.mark.slow),
    ],
)
def test_equals_the_definition_and_its_gradients(method, B, T, K):
    assert_equals_the_definition(method, B, T, K)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@hypothesis.settings(max_examples=12)
@hypothesis.given(
    B=st.integers(1, 2),
    T=st.sampled_from([1, 2, 3, 63, 100]),
    K=st.sampled_from([1, 2, 17, 64, 100]),
)
def test_any_lengths_equal_the_definition(method, B, T, K):
    assert_equals_the_definition(method, B, T, K)


@pytest.mark.parametrize("method", ["fft", pytest.param("matmul", marks=pytest.mark.slow)])
def test_channels_in_blocks_that_do_not_divide(method, monkeypatch):
    monkeypatch.setattr(module, "_CPU_BLOCK", 9 * 128)
    arrays = inputs(1, 100, 100, 21)
    dy, dstate = arrays["u"], arrays["initial_state"]
    want_y, want_state, want = reference(arrays, np.asarray(dy), np.asarray(dstate))
    whole = lambda a: jax.vjp(lambda a: long_convolution(**a, method=method), a)
    both = jax.jit(lambda a: (whole(a)[0], whole(a)[1]((dy, dstate))[0]))
    assert "while" in both.lower(arrays).as_text()
    (y, state), gradients = both(arrays)
    close(y, want_y, 3e-6)
    close(state, want_state, 3e-6)
    jax.tree.map(lambda x, y: close(x, y, 3e-6), gradients, want)


def wave(x):
    return jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)


@functools.partial(jax.jit, static_argnums=1)
def split(arrays, splits):
    """Values and gradients of a call for each chunk, with the state handed on."""

    def chunks(arrays):
        state, parts = arrays["initial_state"], []
        pieces = lambda name: jnp.split(arrays[name], splits, axis=1)
        for u, pre, post in zip(pieces("u"), pieces("pre_gate"), pieces("post_gate"), strict=True):
            chunk = dict(u=u, pre_gate=pre, post_gate=post, initial_state=state)
            y, state = long_convolution(**arrays | chunk)
            parts.append(y)
        return jnp.concatenate(parts, axis=1), state

    out, pull = jax.vjp(chunks, arrays)
    return *out, pull(tuple(map(wave, out)))[0]


@pytest.mark.parametrize(
    "splits", [(1, 3), *(pytest.param(s, marks=pytest.mark.slow) for s in ((50,), (1, 2, 3, 4, 5)))]
)
def test_split_equals_whole(splits):
    """Overlap-add is exact, also with chunks shorter than the kernel, forward and backward."""
    arrays = inputs(2, 60, 33, 3)
    y, state, got = split(arrays, splits)
    want_y, want_state, want = split(arrays, ())
    close(y, want_y, 1e-5)
    close(state, want_state, 1e-5)
    jax.tree.map(lambda x, y: close(x, y, 3e-5), got, want)


def test_long_sequence_matches_numpy():
    arrays = inputs(1, 2000, 2000, 1)
    u, kernel = arrays["u"], arrays["kernel"]
    want = np.convolve(np.asarray(u[0, :, 0], np.float64), np.asarray(kernel[:, 0], np.float64))
    for method in ("fft", "matmul"):
        y, tail = jax.jit(functools.partial(long_convolution, method=method))(u, kernel)
        close(y[0, :, 0], want[:2000], 1e-6)
        close(tail[0, :, 0], want[2000:], 1e-6)


@pytest.mark.parametrize(
    "method", ["fft", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "fft")]
)
def test_causal(method):
    """Transforms mix all of time, so that the future's gradient is zero but for rounding."""
    arrays = inputs(1, 40, 40, 2)
    f = lambda u: long_convolution(u, arrays["kernel"], method=method)[0].sum((0, 2))
    dependence = np.abs(np.asarray(jax.jit(jax.jacrev(f))(arrays["u"]))[:, 0]).sum(-1)
    i, j = np.indices((40, 40))
    assert dependence[j > i].max() < 1e-5
    assert dependence[j <= i].min() > 1e-3


@pytest.mark.parametrize(
    "method", ["fft", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "fft")]
)
def test_bfloat16_error_and_determinism(method):
    """Only inputs and outputs are rounded: the spectra are float32."""
    arrays = inputs(2, 100, 64, 3, dtype="bfloat16")
    run_bf16 = jax.jit(lambda a: long_convolution(**a, method=method))
    y, state = run_bf16(arrays)
    want_y, want_state, _ = reference(arrays, np.ones(y.shape), np.ones(state.shape))
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(y, np.float64), want_y, rtol=2**-8, atol=1e-4)
    close(state, want_state, 3e-6)
    np.testing.assert_array_equal(y, run_bf16(arrays)[0])


def test_float64_and_vmap():
    with jax.enable_x64(True):
        arrays = inputs(2, 30, 20, 3, dtype="float64")
        for method in METHODS:
            op = functools.partial(long_convolution, method=method)
            y, state = jax.jit(lambda a, op=op: op(**a))(arrays)
            want_y, want_state, _ = reference(arrays, np.ones(y.shape), np.ones(state.shape))
            close(y, want_y, 1e-13)
            close(state, want_state, 1e-13)
    arrays = inputs(2, 30, 20, 3)
    batch = lambda u: long_convolution(u, arrays["kernel"])[0]
    single = jax.vmap(lambda u: batch(u[None])[0])

    @jax.jit
    def together_and_each(u):
        return [(f(u), jax.grad(lambda u, f=f: (f(u) ** 2).sum())(u)) for f in (batch, single)]

    for x, y in zip(*together_and_each(arrays["u"]), strict=True):
        close(y, x, 1e-6)


def test_no_spectrum_is_kept_for_the_backward_pass():
    u = jax.ShapeDtypeStruct((2, 1000, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((1000, 8), jnp.float32)
    _, pull = jax.eval_shape(
        lambda u, k: jax.vjp(lambda u, k: long_convolution(u, k), u, k), u, kernel
    )
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))
    assert kept <= 4 * (u.size + kernel.size)


def test_matmuls_are_lowered_for_tpus_and_ffts_elsewhere():
    arrays = inputs(1, 64, 64, 8)
    text = lambda platform: (
        jax.jit(lambda a: long_convolution(**a))
        .trace(arrays)
        .lower(lowering_platforms=(platform,))
        .as_text()
    )
    assert "stablehlo.fft" not in text("tpu") and "dot_general" in text("tpu")
    assert "stablehlo.fft" in text("cpu") and "stablehlo.fft" in text("cuda")


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(implementation="pallas"), ValueError, '"xla" or None'),
        (dict(method="dft"), ValueError, "method='dft' is unknown.*'fft'"),
        (dict(kernel=np.ones((5, 2), np.float32)), ValueError, "kernel must be"),
        (dict(D=np.ones(2, np.float32)), ValueError, "D must be"),
        (dict(pre_gate=np.ones((2, 9, 1), np.float32)), ValueError, "pre_gate must be"),
        (dict(post_gate=np.ones((2, 8, 3), np.float32)), ValueError, "post_gate must be"),
        (dict(initial_state=np.ones((2, 5, 3), np.float32)), ValueError, "initial_state must be"),
        (dict(u=np.ones((2, 9, 3), np.int32)), TypeError, "u must be floating"),
        (dict(u=np.ones((9, 3), np.float32)), ValueError, "u must be"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    with pytest.raises(error, match=words):
        long_convolution(**inputs(2, 9, 5, 3) | change)


def test_numpy_arrays_outside_of_jit():
    rng = np.random.default_rng(0)
    u, kernel = rng.standard_normal((1, 40, 2)), rng.standard_normal((40, 2))
    y, _ = long_convolution(u.astype(np.float32), kernel.astype(np.float32))
    expected = np.stack([np.convolve(u[0, :, e], kernel[:, e])[:40] for e in range(2)], -1)
    np.testing.assert_allclose(y[0], expected, atol=1e-4)
