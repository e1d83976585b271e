"""The TPU kernels of chunked scans, interpreted on a CPU against the steps in float64.

test_tpu_aot.py compiles them.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.ops import chunked_scan, chunked_scan_tpu, reference
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.ops.ssd import ssd
from tilescan.planning import aot_tpu

# Largest accepted errors, relative to the largest entry of the reference; bfloat16 has 8 bits.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
NAMES = ("o", "final_state", "dq", "dk", "dv", "dlog_decay", "dinitial_state")


def slowly(*values):
    """Values of a parameter that only the slow suite takes."""
    as_tuple = lambda value: value if isinstance(value, tuple) else (value,)
    return [pytest.param(*as_tuple(value), marks=pytest.mark.slow) for value in values]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks small enough for tests to have several, of several chunks."""
    block = chunked_scan_tpu.kernels.Block(16, 2)
    monkeypatch.setattr(chunked_scan_tpu.kernels, "block_for", lambda *_: block)


def problem(T, decay, heads=(2, 2, 2), sizes=(8, 16), dtype="float32", strength=0.0, B=1, seed=0):
    """q, k, v, log_decay, initial_state and cotangents; `heads` are those of q, k and v."""
    rng = np.random.default_rng(seed)
    H, (D, P) = max(heads), sizes
    normal = lambda shape, dtype="float32": jnp.asarray(rng.standard_normal(shape), dtype)
    q, k, v = (normal((B, T, n, F), dtype) for n, F in zip(heads, (D, D, P), strict=True))
    shape = {"none": (B, T, 1, 1), "head": (B, T, H, 1), "dim": (B, T, H, D)}[decay]
    a = np.zeros(shape) if decay == "none" else -np.exp(rng.standard_normal(shape) + strength)
    cotangents = normal((B, T, H, P), dtype), normal((B, H, D, P))
    return (q, k, v, jnp.asarray(a, jnp.float32), normal((B, H, D, P))), cotangents


@jax.jit
def found(inputs, cotangents):
    forward = chunked_scan_tpu.forward(*inputs, interpret=True)
    return *forward, *chunked_scan_tpu.backward(*inputs, *cotangents, interpret=True)


@jax.jit
def by_steps(inputs, cotangents):
    def steps(q, k, v, a, S):
        B, T, H, D = q.shape[0], q.shape[1], S.shape[1], q.shape[3]
        q = jnp.repeat(q, H // q.shape[2], 2)
        k, v = (jnp.repeat(x, H // x.shape[2], 2) for x in (k, v))
        a = jnp.broadcast_to(a, (B, T, H, D))
        return reference.linear_attention(q, k, v, a, scale=1.0, state=S)

    out, pullback = jax.vjp(steps, *inputs)
    return *out, *pullback(cotangents)


def expected(inputs, cotangents):
    """The same, by steps in float64."""
    with jax.enable_x64(True):
        exact = lambda arrays: tuple(jnp.asarray(np.asarray(x, np.float64)) for x in arrays)
        return [np.asarray(x) for x in by_steps(exact(inputs), exact(cotangents))]


def check(inputs, cotangents):
    got, want = found(inputs, cotangents), expected(inputs, cotangents)
    for x, like in zip(got[2:], inputs, strict=True):
        assert x.dtype == like.dtype and x.shape == like.shape
    assert got[0].dtype == inputs[0].dtype and got[1].dtype == jnp.float32
    for name, x, y in zip(NAMES, got, want, strict=True):
        error = np.max(np.abs(np.asarray(x, np.float64) - y))
        bound = TOLERANCE[inputs[0].dtype.name] * max(np.max(np.abs(y)), 1e-6)
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


@pytest.mark.parametrize(
    ("T", "decay"),
    [
        (100, "dim"),
        *slowly((1, "head"), (1, "dim"), (2, "head"), (2, "dim"), (63, "head"), (63, "dim")),
        *slowly((100, "head")),
    ],
)  # fmt: skip
def test_lengths(T, decay):
    """Also lengths below a chunk, and, at 100, seven chunks in four blocks."""
    inputs, cotangents = problem(T, decay, seed=1)
    block = chunked_scan_tpu.Plan.of(*inputs, None).block
    assert (block.chunk, block.chunks) == (16, 1 if T < 16 else 2)
    check(inputs, cotangents)


@pytest.mark.slow
@hypothesis.settings(max_examples=8, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    shape=st.sampled_from(
        [
            ((4, 2, 2), (8, 24), "head"),  # grouped queries
            ((1, 1, 3), (20, 12), "none"),  # SSD's groups
            ((2, 1, 1), (20, 12), "dim"),
        ]
    ),
    strength=st.sampled_from([-3.0, 0.0, 4.0]),
    seed=st.integers(0, 9),
)
def test_heads_that_share_and_sizes(shape, strength, seed):
    heads, sizes, decay = shape
    check(*problem(40, decay, heads, sizes, strength=strength, B=2, seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["head", "dim"])
def test_bfloat16(decay):
    check(*problem(40, decay, (1, 1, 2), (16, 16), "bfloat16", -2.0))


@pytest.mark.parametrize("decay", ["head", "dim"])
def test_extreme_decays_stay_exact(decay):
    """From almost none, over e^-20 a step, to decays that float32 has only as 0."""
    for strength in (-20.0, 3.0, 30.0):
        check(*problem(100, decay, strength=strength))


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["head", "dim"])
def test_weak_decays_are_exact_among_strong_ones(decay):
    """Sums of logarithms that reach thousands must not cost the digits of small ones."""
    (q, k, v, a, S), cotangents = problem(63, decay, strength=-2.0)
    a = a.at[:, ::2].set(-75.0).at[:, 42:].set(-0.01)
    check((q, k, v, a, S), cotangents)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["head", "dim"])
def test_minus_infinity_forgets_with_finite_gradients(decay):
    (q, k, v, a, S), cotangents = problem(63, decay, strength=-2.0)
    a = a.at[:, 17].set(-jnp.inf)
    check((q, k, v, a, S), cotangents)
    got = found((q, k, v, a, S), cotangents)
    assert not np.any(got[5][:, 17])
    without = found((q, k, v, a, jnp.zeros_like(S)), cotangents)
    np.testing.assert_array_equal(got[1], without[1])
    np.testing.assert_array_equal(got[0][:, 17:], without[0][:, 17:])


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels where the program is lowered for a CPU."""
    for name in ("forward", "backward"):
        f = functools.partial(getattr(chunked_scan_tpu, name), interpret=True)
        monkeypatch.setattr(chunked_scan_tpu, name, f)
    monkeypatch.setitem(chunked_scan.KERNELS, "cpu", "tilescan.ops.chunked_scan_tpu")
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.slow
def test_public_ops_take_the_kernels(interpreted):
    """Both ops with all that they take, and their gradients, equal the XLA implementation."""
    rng = np.random.default_rng(3)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    B, T, H, G, D, P = 2, 50, 4, 2, 8, 16
    ids = jnp.asarray(np.sort(rng.integers(0, 4, (B, T)), 1))
    gla = [normal(B, T, H, D), normal(B, T, G, D), normal(B, T, G, P), -jnp.abs(normal(B, T, H))]
    gla.append(normal(B, H, D, P))
    mamba = [normal(B, T, H, P), jnp.abs(normal(B, T, H)), -jnp.abs(normal(H))]
    mamba += [normal(B, T, G, D), normal(B, T, G, D), normal(B, H, P, D), normal(H)]

    def attend(q, k, v, a, S, **options):
        return gated_linear_attention(q, k, v, a, initial_state=S, segment_ids=ids, **options)

    def space(x, dt, A, K, C, S, D, **options):
        return ssd(x, dt, A, K, C, D=D, initial_state=S, segment_ids=ids, **options)

    for op, arrays in ((attend, gla), (space, mamba)):
        outcomes = []
        for implementation in ("pallas", "xla"):
            f = functools.partial(op, implementation=implementation)
            out, pullback = jax.vjp(jax.jit(f), *arrays)
            outcomes.append((*out, *pullback(out)))
        for x, y in zip(*outcomes, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5 * max(1, np.abs(y).max()))


@pytest.mark.slow
def test_batched_by_vmap(interpreted):
    (q, k, v, a, S), _ = problem(20, "head", B=2)
    f = functools.partial(chunked_scan.chunked_scan, implementation="pallas")
    want = f(q, k, v, a, S)
    one = lambda *arrays: jax.tree.map(lambda y: y[0], f(*(x[None] for x in arrays)))
    for x, y in zip(jax.vmap(one)(q, k, v, a, S), want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_lowers_inside_shard_map():
    arrays, cotangents = problem(20, "dim", B=2)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    f = functools.partial(chunked_scan.chunked_scan, implementation="pallas")
    spec = jax.sharding.PartitionSpec("data")
    pullback = lambda arrays, cotangents: jax.vjp(f, *arrays)[1](cotangents)
    sharded = jax.shard_map(pullback, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    text = jax.jit(sharded).trace(arrays, cotangents).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 2


def test_programs_cover_the_heads():
    """One part of the heads on both cores of a chip, and states that fit in memory."""
    assert chunked_scan_tpu._programs(1, 16, 1, 64 * 128) == 2
    assert chunked_scan_tpu._programs(2, 16, 1, 64 * 128) == 1
    assert chunked_scan_tpu._programs(1, 16, 16, 64 * 128) == 16
    assert chunked_scan_tpu._programs(2, 64, 1, 256 * 256) == 2
    assert chunked_scan_tpu._programs(1, 3, 1, 8 * 128) == 3


def test_what_has_no_kernel_is_said():
    (q, k, v, a, S), _ = problem(20, "dim")
    run = functools.partial(chunked_scan.chunked_scan, q, k, v, a, S)
    with pytest.raises(ValueError, match='lowered for cpu; implementation="xla" or None'):
        run(implementation="pallas")
    with pytest.raises(ValueError, match="must be one of 'xla', 'pallas', None"):
        run(implementation="cuda")
    lower = lambda **o: (
        jax.jit(functools.partial(run, **o)).trace().lower(lowering_platforms=("tpu",))
    )
    for chunk, word in ((512, "up to 256"), (48, "powers of 2")):
        with pytest.raises(ValueError, match=word):
            lower(implementation="pallas", chunk=chunk)
        assert "tpu_custom_call" not in lower(implementation=None, chunk=chunk).as_text()
    assert "tpu_custom_call" in lower(implementation=None).as_text()
    assert "tpu_custom_call" not in lower(implementation="xla").as_text()


def test_loops_are_counted():
    """As often as they run, also one within another."""
    text = """%inner_cond (p: (s32[])) -> pred[] {
  %c = s32[]{:T(128)} constant(3)
}
%outer_cond (p: (s32[])) -> pred[] {
  %c.1 = s32[] constant(5)
}
%inner (p: (s32[])) -> (s32[]) {
  %fusion.1 = f32[] fusion(%p)
}
%outer (p: (s32[])) -> (s32[]) {
  %while.1 = (s32[]) while(%p), condition=%inner_cond, body=%inner
  ROOT %copy.1 = f32[] copy(%p)
}
ENTRY %main (p: s32[]) -> s32[] {
  %while.2 = (s32[]) while(%p), condition=%outer_cond, body=%outer, metadata={}
  %copy.2 = f32[] copy(%p)
}"""
    assert aot_tpu._trips(text) == {"fusion.1": 15, "while.1": 5, "copy.1": 5}
