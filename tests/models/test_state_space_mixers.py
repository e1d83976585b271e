"""S4, S4D and H3 against the layers as they are defined, in float64, and H3's two identities."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

from tilescan.models import H3, S4, S4D, LanguageModel, LanguageModelConfig
from tilescan.ops import s4

E, T = 8, 37
X = np.random.default_rng(0).standard_normal((2, T, E)).astype(np.float32)


def initial(mixer):
    x = jnp.zeros((1, 2, mixer.d_model))
    return nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x))["params"]


@functools.cache
def params_of(mixer):
    """Initial parameters, with noise so that biases are not 0."""
    params = initial(mixer)
    rng = np.random.default_rng(1)
    noise = lambda a: 0.1 * rng.standard_normal(a.shape).astype(a.dtype)
    return jax.tree.map(lambda a: np.asarray(a) + noise(a), params)


@functools.cache
def compiled(mixer):
    return jax.jit(mixer.apply)


def run(mixer, x=X, params=None, **inputs):
    params = params_of(mixer) if params is None else params
    return compiled(mixer)({"params": params}, x, **inputs)


def wide(params):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), params)


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def poles(p):
    return np.minimum(-np.exp(p["log_A_real"]), -1e-4) + 1j * p["A_imag"]


def diagonal_ssm(p, u, discretization):
    """[T, H] by recurrence; the parameters' rows are channels."""
    A, C = poles(p), p["C_real"] + 1j * p["C_imag"]
    dt = np.exp(p["log_dt"])[:, None]
    if discretization == "zoh":
        decay = np.exp(dt * A)
        b = (decay - 1) / A
    else:
        decay, b = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    h, ys = np.zeros(C.shape, complex), []
    for t in range(len(u)):
        h = decay * h + b * u[t][:, None]
        ys.append(2 * (C * h).sum(-1).real)
    return np.stack(ys)


def dplr_ssm(p, u, C):
    """[T, E] by the dense bilinear recurrence over both halves of the pairs."""
    both = lambda v: np.concatenate([v, v.conj()], -1)
    complex_ = lambda name: both(p[f"{name}_real"] + 1j * p[f"{name}_imag"])
    Lambda, P, B, C = both(poles(p)), complex_("P"), complex_("B"), both(C)
    ys = np.zeros(u.shape)
    for e in range(u.shape[1]):
        g = e * len(Lambda) // u.shape[1]
        A = np.diag(Lambda[g]) - np.outer(P[g], P[g].conj())
        dt, eye = np.exp(p["log_dt"][e]), np.eye(len(A))
        h = np.zeros(len(A), complex)
        for t in range(len(u)):
            right = (eye + dt / 2 * A) @ h + dt * B[g] * u[t, e]
            h = np.linalg.solve(eye - dt / 2 * A, right)
            ys[t, e] = (C[e] @ h).real
    return ys


def after_ssm(p, y, u, output):
    y = y + p["D"] * u
    y = y * scipy.special.ndtr(y)
    if output == "none":
        return y
    out = dense(p["out"], y)
    return out * scipy.special.expit(dense(p["gate"], y)) if output == "glu" else out


def slowly(*cases):
    return [
        pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in cases
    ]


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(init_A="inv", n_ssm=2, discretization="bilinear", output="linear", fft=False),
        *slowly(
            dict(init_A="inv", discretization="bilinear", output="linear"),
            dict(init_A="legs", output="none", fft=False),
            dict(init_A="random", n_ssm=2),
        ),
    ],
    ids=str,
)
def test_s4d_is_its_definition(options):
    mixer = S4D(E, state_dim=6, **options)
    p = wide(params_of(mixer))
    repeated = {k: np.repeat(v, E // len(v), 0) for k, v in p.items() if "A_" in k}
    y, state = run(mixer)
    assert state is None
    for row in range(2):
        u = X[row].astype(np.float64)
        ssm = diagonal_ssm(p | repeated, u, mixer.discretization)
        close(y[row], after_ssm(p, ssm, u, mixer.output))


@pytest.mark.parametrize(
    "options",
    [*slowly(dict(), dict(n_ssm=4, init_A="random", fft=False)), dict(bidirectional=True)],
    ids=str,
)
def test_s4_is_its_definition(options):
    mixer = S4(E, state_dim=6, **options)
    p = wide(params_of(mixer))
    y, _ = run(mixer)
    for row in range(2):
        u = X[row].astype(np.float64)
        ssm = dplr_ssm(p, u, p["C_real"] + 1j * p["C_imag"])
        if mixer.bidirectional:
            ssm += dplr_ssm(p, u[::-1], p["C_back_real"] + 1j * p["C_back_imag"])[::-1]
        close(y[row], after_ssm(p, ssm, u, "glu"))


def test_a_dense_s4_is_its_recurrence():
    """From HiPPO itself, and what it does not do."""
    mixer = S4(E, state_dim=4, dense=True, output="none")
    start, p = initial(mixer), wide(params_of(mixer))
    A, B = s4.hippo_legs(4)
    close(start["A"], A[None])
    close(start["B"], B[None])
    y, _ = run(mixer)
    C, ys = np.concatenate([p["C_real"], p["C_imag"]], 1), np.zeros((T, E))
    u, eye = X[0].astype(np.float64), np.eye(4)
    for e, dt in enumerate(np.exp(p["log_dt"])):
        h = np.zeros(4)
        for t in range(T):
            right = (eye + dt / 2 * p["A"][0]) @ h + dt * p["B"][0] * u[t, e]
            h = np.linalg.solve(eye - dt / 2 * p["A"][0], right)
            ys[t, e] = C[e] @ h
    close(y[0], after_ssm(p, ys, u, "none"))
    for inputs in (dict(state=mixer.init_state(2, T)), dict(segment_ids=np.zeros((2, T), int))):
        with pytest.raises(ValueError, match="no state and no segments"):
            mixer.apply({"params": params_of(mixer)}, X, **inputs)


@pytest.mark.slow
def test_bidirectional_segments_are_separate():
    mixer = S4D(E, state_dim=6, bidirectional=True, output="none")
    ids = np.repeat([[2, 5, 7, 1]], [12, 1, 12, 12], axis=1)
    packed, _ = run(mixer, X[:1], segment_ids=jnp.asarray(ids))
    alone = jax.jit(lambda x: mixer.apply({"params": params_of(mixer)}, x)[0])
    for name in np.unique(ids):
        at = np.flatnonzero(ids[0] == name)
        close(packed[:, at], alone(X[:1, at]), 1e-5)


@pytest.mark.parametrize(
    "mixer",
    [S4(E, state_dim=6), *slowly(S4D(E, state_dim=6, init_A="inv"))],
    ids=["s4", "s4d"],
)
def test_convolution_equals_recurrence(mixer):
    """The whole by FFT, and one token after the other, after a prompt."""
    whole, _ = run(mixer)
    y, state = run(mixer, X[:, :20], state=mixer.init_state(2, T))
    ys = [y]
    step = jax.jit(lambda x, state: mixer.apply({"params": params_of(mixer)}, x, state=state))
    for t in range(20, T):
        y, state = step(X[:, t : t + 1], state)
        ys.append(y)
    close(np.concatenate(ys, 1), whole)


def test_rate():
    """Steps twice as long see a signal sampled half as often: the same system."""
    mixer = S4D(E, state_dim=6, dt_min=1e-3, dt_max=1e-2, output="none")
    params = params_of(mixer) | {"D": jnp.zeros(E)}
    t = np.linspace(0, 3, 601)[None, :, None]
    signal = (np.sin(4 * t) + np.cos(t + np.arange(E))).astype(np.float32)
    fine, _ = run(mixer, signal, params)
    coarse, _ = run(mixer.clone(rate=2.0), signal[:, ::2], params)
    unchanged, _ = run(mixer, signal[:, ::2], params)
    error = lambda y: np.abs(y - fine[:, ::2]).max() / np.abs(fine).max()
    assert error(coarse) < 0.05 < 0.3 < error(unchanged)


def test_initial_values():
    """Poles and steps start where HiPPO and S4D put them."""
    p = initial(S4(E, state_dim=8))
    Lambda, P, B, _ = s4.hippo_legs_nplr(8)
    close(poles(wide(p))[0], Lambda, 1e-6)
    close((p["P_real"] + 1j * p["P_imag"])[0], P, 1e-6)
    close((p["B_real"] + 1j * p["B_imag"])[0], B, 1e-6)
    assert np.all((np.log(1e-3) <= p["log_dt"]) & (p["log_dt"] <= np.log(1e-1)))
    p = initial(S4D(E, state_dim=8))
    close(poles(wide(p)), np.broadcast_to(-0.5 + 1j * np.pi * np.arange(4), (E, 4)), 1e-6)


def test_random_matrices():
    """Standard normal frequencies; a dense matrix of normal numbers over its size."""
    p = initial(S4D(64, state_dim=64, init_A="random"))
    assert 0.9 < np.std(p["A_imag"]) < 1.1 and abs(np.mean(p["A_imag"])) < 0.1
    close(-poles(wide(p)).real, np.full((64, 32), 0.5))
    p = initial(S4(E, state_dim=64, init_A="random", dense=True))
    assert 0.9 < 64 * np.std(p["A"]) < 1.1 and p["A"].shape == (1, 64, 64)


def test_real_parts_stay_negative():
    mixer = S4D(E, state_dim=6)
    params = dict(params_of(mixer))
    for name, value in {"log_dt": np.log(0.1), "log_A_real": -1e3}.items():
        params[name] = np.full_like(params[name], value)
    kernel_end = run(mixer, np.eye(1, 2000, dtype=np.float32).T[None] * np.ones(E), params)[0]
    assert np.all(np.isfinite(kernel_end)) and np.abs(kernel_end).max() < 1e3


@pytest.mark.slow
def test_dropout_needs_a_key_and_shares_its_mask_over_time():
    config = LanguageModelConfig(
        vocab_size=11, d_model=E, pattern=("s4d",), repeats=2,
        mixers={"s4d": dict(state_dim=4, dropout=0.5, output="none")},
    )  # fmt: skip
    model, tokens = LanguageModel(config), jnp.arange(10)[None]
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))
    logits = jax.jit(lambda rngs: model.apply(params, tokens, rngs=rngs)[0])
    one, other = (np.asarray(logits({"dropout": jax.random.key(seed)})) for seed in (1, 2))
    assert not np.array_equal(one, logits({})) and not np.array_equal(one, other)

    mixer = S4D(E, state_dim=6, dropout=0.5, output="none")
    variables, key = {"params": params_of(mixer)}, jax.random.key(0)
    apply = jax.jit(lambda rngs: mixer.apply(variables, X, rngs=rngs)[0])
    plain, y = apply({}), apply({"dropout": key})
    zero = np.asarray(y == 0)
    assert 0 < zero.mean() < 1 and np.all(zero == zero[:, :1])
    close(np.where(zero, 0, y), np.where(zero, 0, 2 * plain))


@pytest.mark.parametrize(
    ("head_dim", "fft"), [(4, False), *slowly((1, True), (1, False), (4, True))]
)
def test_h3_is_its_definition(head_dim, fft):
    mixer = H3(E, head_dim=head_dim, taps=5, state_dim=6, fft=fft)
    p, H, D = wide(params_of(mixer)), E // head_dim, head_dim
    y, _ = run(mixer)
    for row in range(2):
        x = X[row].astype(np.float64)
        q, k, v = (dense(p[name], x) for name in ("query", "key", "value"))
        past = np.concatenate([np.zeros((4, E)), k])
        k = sum(p["shift"][j] * past[j : j + T] for j in range(5)) + p["D_shift"] * k
        kv = np.einsum("thi,thj->thij", k.reshape(T, H, D), v.reshape(T, H, D))
        memory = p["D"][:, None, None] * kv
        for i, j in np.ndindex(D, D):
            memory[:, :, i, j] += diagonal_ssm(p, kv[:, :, i, j], "bilinear")
        o = np.einsum("thi,thij->thj", q.reshape(T, H, D), memory).reshape(T, E)
        close(y[row], dense(p["out"], o))


def recall(mixer, taps):
    """H3 with kernel 1 in SSM_diag, no skips and given taps of SSM_shift, and q, k, v."""
    p = dict(params_of(mixer))
    eye, heads = jnp.eye(E), E // mixer.head_dim
    # One real pole at 0 with a step of 1: the bilinear K_l = 2 C for all l.
    p |= dict(log_A_real=jnp.full((heads, 1), -30.0), A_imag=jnp.zeros((heads, 1)))
    p |= dict(
        log_dt=jnp.zeros(heads), C_real=jnp.full((heads, 1), 0.5), C_imag=jnp.zeros((heads, 1))
    )
    p |= dict(D=jnp.zeros(heads), D_shift=jnp.zeros(E))
    p |= dict(shift=jnp.zeros((mixer.taps, E)).at[-len(taps) :].set(jnp.asarray(taps)[::-1, None]))
    p |= dict(out=dict(kernel=eye, bias=jnp.zeros(E)))
    x = X.astype(np.float64)
    q, k, v = (dense(wide(p[name]), x) for name in ("query", "key", "value"))
    return run(mixer, params=p)[0], q, k, v


@pytest.mark.slow
def test_h3_recalls_what_followed():
    """With c = e_2, o_t = q_t sum_{s <= t} k_{s-1} v_s: the induction head by hand."""
    # Poles are kept 1e-4 from 0, which fades 37 steps by 0.4 per cent.
    y, q, k, v = recall(H3(E, taps=4, state_dim=2), [0.0, 1.0])
    before = np.concatenate([np.zeros((2, 1, E)), k[:, :-1]], axis=1)
    close(y, q * np.cumsum(before * v, axis=1), 4e-3)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [1, 4])
def test_h3_without_a_shift_is_linear_attention(head_dim):
    y, q, k, v = recall(H3(E, head_dim=head_dim, taps=4, state_dim=2), [1.0])
    by_head = lambda a: a.reshape(2, T, -1, head_dim)
    q, k, v = by_head(q), by_head(k), by_head(v)
    scores = np.einsum("bthd,bshd->bhts", q, k) * np.tril(np.ones((T, T)))
    close(y, np.einsum("bhts,bshp->bthp", scores, v).reshape(2, T, E), 4e-3)


@pytest.mark.slow
def test_a_hybrid_language_model():
    """The whole equals pieces with a state, across H3 and attention."""
    config = LanguageModelConfig(
        vocab_size=19, d_model=E, pattern=("h3", "mlp", "attention", "mlp"), repeats=1, n_heads=2,
        mlp_dim=16, mixers={"h3": dict(taps=3, state_dim=4)}, position="none",
    )  # fmt: skip
    model = LanguageModel(config)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 19, (2, 30)))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))
    apply = jax.jit(model.apply)
    whole, _ = apply(params, tokens)
    first, state = apply(params, tokens[:, :15], state=model.init_state(2, 30))
    second, _ = apply(params, tokens[:, 15:], state=state)
    close(np.concatenate([first, second], 1), whole)


def test_the_optimizers_pattern_names_the_ssm_parameters():
    """The pattern in the module's docstring, in a model's paths."""
    from tilescan.models import s4 as module
    from tilescan.training.optimizers import path_name

    pattern = re.search(r'"(\(log_dt.*\$)"', module.__doc__).group(1)
    model = LanguageModel(
        LanguageModelConfig(vocab_size=5, d_model=E, pattern=("s4", "s4d", "h3"), repeats=1)
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    names = [path_name(p) for p, _ in jax.tree.leaves_with_path(nn.unbox(shapes)["params"])]
    found = {tuple(n.split("/")[2::2]) for n in names if re.search(pattern, n)}
    ssm = {"log_dt", "log_A_real", "A_imag"}
    expected = {(b, n) for b in ("s4_0", "s4d_1", "h3_2") for n in ssm}
    expected |= {("s4_0", f"{n}_{part}") for n in "PB" for part in ("real", "imag")}
    assert found == expected


@pytest.mark.parametrize(
    "mixer,message",
    [
        (S4D(E, state_dim=5), "state_dim=5 must be even"),
        (S4(E, n_ssm=3), "n_ssm=3 must divide d_model=8"),
        (S4(E, init_A="lin"), 'init_A must be "legs" or "random"'),
        (S4D(E, init_A="line"), 'kind must be "lin", "inv" or "legs"'),
        (S4D(E, output="gelu"), "output='gelu' is unknown; it can be 'glu'"),
        (H3(E, head_dim=3), "h3: head_dim=3 must divide d_model=8"),
        (H3(E, taps=0), "h3: taps=0 must be at least 1"),
    ],
    ids=lambda a: None if isinstance(a, str) else repr(a)[:20],
)
def test_errors_name_what_is_wrong(mixer, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(mixer.init, jax.random.key(0), jnp.asarray(X))


def test_a_bidirectional_layer_has_no_state():
    mixer = S4(E, state_dim=6, bidirectional=True)  # whose parameters are made already
    with pytest.raises(ValueError, match="a bidirectional layer has no state"):
        mixer.init_state(2, 10)
    state = S4(E, state_dim=6).init_state(2, 10)
    with pytest.raises(ValueError, match="a bidirectional layer has no state"):
        run(mixer, state=state)
