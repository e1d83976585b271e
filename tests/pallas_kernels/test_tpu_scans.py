"""The TPU kernels of diagonal scans, interpreted on a CPU against their definition in float64.

test_tpu_aot.py compiles them.
"""

import functools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tilescan.benchmarks import scans_tpu_static
from tilescan.ops import linear_recurrence_tpu, reference, selective_scan_tpu
from tilescan.ops.linear_recurrence import linear_recurrence
from tilescan.ops.selective_scan import selective_scan
from tilescan.pallas_kernels.tpu import linear_scan
from tilescan.planning import aot_tpu

# Largest accepted errors, relative to the largest entry of the reference.
TOLERANCE = {"float32": 1e-5, "complex64": 1e-5, "bfloat16": 2e-2}


def slowly(*values):
    """Values of a parameter that only the slow suite takes."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 32 steps, small enough for tests to have several."""
    monkeypatch.setattr(linear_scan, "strips_for", lambda T: linear_scan.Strips(1, 4))


def random(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if dtype == "complex64":
        x = x + 1j * rng.standard_normal(shape)
    return jnp.asarray(x, dtype)


def decays(shape, dtype, seed=0):
    """Of modulus up to 1, some of them exactly 0, as where a segment starts, and some tiny."""
    rng = np.random.default_rng(seed)
    a = rng.uniform(-0.2, 1.0, shape)
    a = np.where(rng.random(shape) < 0.1, rng.choice([0.0, 1e-30, 1.0], shape), a)
    if dtype == "complex64":
        a = a * np.exp(1j * rng.standard_normal(shape))
    return jnp.asarray(a, dtype)


@functools.partial(jax.jit, static_argnums=5)
def interpreted(a, b, state, dh, dlast, reverse):
    """h, the last state, and the cotangents of a, b and state."""
    options = dict(reverse=reverse, interpret=True)
    h, last = linear_recurrence_tpu.scan(a, b, state, after=False, **options)
    return h, last, *linear_recurrence_tpu.gradient(a, h, state, dh, dlast, **options)


@functools.partial(jax.jit, static_argnums=5)
def linear_scan_by_steps(a, b, state, dh, dlast, reverse):
    run = lambda a, b, h: reference.linear_recurrence(a, b, initial_state=h, reverse=reverse)
    values, pullback = jax.vjp(run, a, b, state)
    return *values, *pullback((dh, dlast))


def assert_close(names, got, want, tolerance):
    for name, x, y in zip(names, got, want, strict=True):
        assert x.shape == y.shape, name
        y = np.asarray(y)
        error = np.max(np.abs(np.asarray(x).astype(y.dtype) - y))
        bound = tolerance * max(1.0, np.max(np.abs(y)))
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


def assert_linear_scan_is_right(B, T, D, a_shape, dtype, reverse=False, a=None):
    wide = "float32" if dtype == "bfloat16" else dtype
    a = decays(a_shape, dtype) if a is None else a
    b, dh = (random((B, T, *D), dtype, seed) for seed in (1, 2))
    state, dlast = (random((B, *D), wide, seed) for seed in (3, 4))
    got = interpreted(a, b, state, dh, dlast, reverse)
    assert [x.dtype.name for x in got] == [dtype, wide, dtype, dtype, wide]
    with jax.enable_x64(True):
        double = np.complex128 if dtype == "complex64" else np.float64
        exact = (jnp.asarray(np.asarray(x).astype(double)) for x in (a, b, state, dh, dlast))
        want = [np.asarray(x) for x in linear_scan_by_steps(*exact, reverse)]
    assert_close(("h", "last", "da", "db", "dstate"), got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("T", [100, *slowly(1, 2, 63, 64)])
def test_linear_scan_equals_the_definition(T):
    assert_linear_scan_is_right(2, T, (130,), (2, T, 130), "float32")


@st.composite
def problems(draw):
    B, T = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 32, 40, 63, 100]))
    D = draw(st.sampled_from([(64,), (130,), (3, 50)]))
    one = tuple(1 for _ in D)
    a_shape = draw(st.sampled_from([(B, T, *D), (1, T, *D), (1, 1, *D), (B, 1, *D), (B, T, *one)]))
    dtype = draw(st.sampled_from(["float32", "complex64", "bfloat16"]))
    return dict(B=B, T=T, D=D, a_shape=a_shape, dtype=dtype, reverse=draw(st.booleans()))


@pytest.mark.slow
@hypothesis.settings(
    max_examples=8,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(problems())
def test_linear_scan_of_any_shape_equals_the_definition(problem):
    assert_linear_scan_is_right(**problem)


@functools.partial(jax.jit, static_argnums=(5, 6))
def strips_interpreted(a, b, state, dh, dlast, reverse, strips):
    options = dict(reverse=reverse, strips=strips, interpret=True)
    (h,), (last,) = linear_scan.scan((a,), (b,), (state,), **options)
    gradients = linear_scan.gradient((a,), (h,), (state,), (dh,), (dlast,), **options)
    return h, last, *(x for (x,) in gradients)


@pytest.mark.slow
def test_linear_scan_with_several_groups_of_strips():
    """As long sequences have, and an incomplete chunk in either direction."""
    strips = linear_scan.Strips(3, 2)
    for reverse, constant in ((False, True), (True, False)):
        a = decays((1, 1 if constant else 70, 8), "float32")
        b, dh = (random((1, 70, 8), "float32", seed) for seed in (1, 2))
        state, dlast = (random((1, 8), "float32", seed) for seed in (3, 4))
        got = strips_interpreted(a, b, state, dh, dlast, reverse, strips)
        want = linear_scan_by_steps(a, b, state, dh, dlast, reverse)
        assert_close(("h", "last", "da", "db", "dstate"), got, want, 1e-5)


@pytest.mark.parametrize("decay", [1e-30, -1.0, *slowly(0.0, 1.0)])
def test_linear_scan_of_extreme_decays(decay):
    a = jnp.full((2, 100, 130), decay, jnp.float32)
    assert_linear_scan_is_right(2, 100, (130,), a.shape, "float32", a=a)


def test_linear_scan_keeps_its_state_in_float32():
    """4,096 times 1/256 is 16 in float32; a bfloat16 state would stop at 1."""
    b = np.full((1, 4096, 64), 2.0**-8, jnp.bfloat16)
    a = np.ones((1, 1, 64), jnp.bfloat16)
    options = dict(reverse=False, after=False, interpret=True)
    scan = jax.jit(functools.partial(linear_recurrence_tpu.scan, **options))
    h, last = map(np.asarray, scan(a, b, np.zeros((1, 64), np.float32)))
    assert last[0, 0] == h[0, -1, 0] == 16.0


@pytest.mark.slow
def test_linear_scan_under_vmap():
    a, b = decays((3, 1, 40, 64), "float32"), random((3, 1, 40, 64), "float32", 1)
    state = random((3, 1, 64), "float32", 2)
    run = functools.partial(linear_recurrence_tpu.scan, reverse=False, after=False, interpret=True)
    h, last = jax.vmap(run)(a, b, state)
    want = [reference.linear_recurrence(a[i], b[i], initial_state=state[i]) for i in range(3)]
    assert_close(("h", "last"), (h, last), map(np.stack, zip(*want, strict=True)), 1e-5)


# The selective scan.


@jax.jit
def interpreted_selective_scan(x, dt, A, B, C, h, first, dy, dh):
    """y, the last state, and the cotangents of x, dt, A, B, C and h."""
    inputs = x, dt, A, B, C
    y, last, starts = selective_scan_tpu.forward(*inputs, h, first, interpret=True)
    gradients = selective_scan_tpu.backward(*inputs, first, starts, dy, dh, interpret=True)
    return y, last, *gradients


@functools.partial(jax.jit, static_argnums=8)
def selective_scan_by_steps(x, dt, A, B, C, h, dy, dh, ids):
    """The same; ids, which the reference must know, are tuples."""
    ids = None if ids is None else np.array(ids)

    def run(x, dt, A, B, C, h):
        y, last = reference.selective_scan(
            x, dt, A.T, B, C, initial_state=h.swapaxes(1, 2), segment_ids=ids
        )
        return y, last.swapaxes(1, 2)

    values, pullback = jax.vjp(run, x, dt, A, B, C, h)
    return *values, *pullback((dy, dh))


def assert_selective_scan_is_right(batch, T, E, N, dtype, segments, dt=None):
    rng = np.random.default_rng(0)
    x, B, C = (random((batch, T, n), dtype, seed) for seed, n in enumerate((E, N, N)))
    h, dh = (random((batch, N, E), "float32", seed) for seed in (3, 4))
    dy = random((batch, T, E), "float32", 5)
    A = jnp.asarray(-rng.uniform(0.5, N, (N, E)), jnp.float32)
    steps = rng.uniform(0, 1, (batch, T, E))
    if dt is not None:  # mixed with mild ones
        steps = np.where(rng.random(steps.shape) < 0.3, dt, steps)
    first = np.random.default_rng(6).random((batch, T)) < 0.1  # the same for all values
    arrays = x, jnp.asarray(steps, jnp.float32), A, B, C, h
    got = interpreted_selective_scan(*arrays, jnp.asarray(first) if segments else None, dy, dh)
    assert [v.dtype.name for v in got[2:]] == [v.dtype.name for v in arrays]
    ids = np.pad(np.cumsum(first, axis=1), ((0, 0), (1, 0)))
    ids = tuple(map(tuple, ids.tolist())) if segments else None
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(v, np.float64)) for v in (*arrays, dy, dh)]
        want = [np.asarray(v) for v in selective_scan_by_steps(*exact, ids)]
    names = ("y", "last", "dx", "ddt", "dA", "dB", "dC", "dh")
    assert_close(names, got, want, 2e-5 if dtype == "float32" else TOLERANCE[dtype])


@pytest.mark.parametrize("T", [100, *slowly(1, 2, 63, 64)])
def test_selective_scan_equals_the_definition(T):
    assert_selective_scan_is_right(2, T, 5, 3, "float32", segments=T > 2)


@st.composite
def selective_problems(draw):
    sizes = dict(batch=draw(st.integers(1, 2)), T=draw(st.sampled_from([1, 40, 64, 130])))
    sizes |= dict(E=draw(st.sampled_from([128, 200])), N=draw(st.sampled_from([1, 8, 16])))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    return sizes | dict(dtype=dtype, segments=draw(st.booleans()))


@pytest.mark.slow
@hypothesis.settings(max_examples=6, phases=[hypothesis.Phase.generate])
@hypothesis.given(selective_problems())
def test_selective_scan_of_any_shape_equals_the_definition(problem):
    assert_selective_scan_is_right(**problem)


@pytest.mark.slow
def test_selective_scan_in_several_blocks_of_channels():
    """Blocks that share a chunk's B and C, and parts for two cores, whose gradients are added."""
    for batch, E in ((1, 512 * 4), (2, 384)):
        block = selective_scan_tpu.block_for(batch, 20, E, 1)
        assert (block.parts, E // block.channels // block.parts) == (
            (2, 2) if batch == 1 else (1, 3)
        )
        assert_selective_scan_is_right(batch, 20, E, 1, "float32", segments=False)


@pytest.mark.parametrize("dt", [1e-30, 1e15, *slowly(0.0, 1e4)])
def test_selective_scan_of_extreme_steps(dt):
    """Decays of exactly 1 and exactly 0."""
    assert_selective_scan_is_right(2, 100, 5, 3, "float32", segments=True, dt=dt)


# Choosing the kernel.


def lowered(function, *arrays, platform="tpu"):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def loss(*arrays, **options):
    h, last = linear_recurrence(*arrays, **options)
    return jnp.sum(jnp.abs(h)) + jnp.sum(jnp.abs(last))


def test_linear_recurrence_takes_the_kernel_on_tpus():
    x = jax.ShapeDtypeStruct((2, 50, 64), jnp.float32)
    text = lowered(jax.grad(loss, (0, 1)), x, x)
    assert 'kernel_name = "linear_scan"' in text
    assert 'kernel_name = "linear_scan_gradient"' in text
    vmapped = jax.vmap(jax.grad(lambda a, b: loss(a[None], b[None])))
    assert "tpu_custom_call" in lowered(vmapped, x, x)
    assert "tpu_custom_call" not in lowered(functools.partial(loss, implementation="xla"), x, x)
    assert "tpu_custom_call" not in lowered(loss, x, x, platform="cuda")


def test_linear_recurrence_takes_the_kernel_inside_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, none = PartitionSpec("data"), PartitionSpec()
    for a_shape, spec in (((4, 50, 64), rows), ((64,), none)):
        a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (a_shape, (4, 50, 64)))
        run = jax.shard_map(
            linear_recurrence, mesh=mesh, in_specs=(spec, rows), out_specs=(rows, rows)
        )
        pullback = lambda a, b, run=run: jax.vjp(run, a, b)[1]((b, b[:, 0]))
        assert "tpu_custom_call" in lowered(pullback, a, b)


@pytest.mark.parametrize(
    "shape, dtype, words", [((1, 9, 3), "float32", "64 and more"), ((1, 9, 64), "float16", "a is")]
)
def test_what_the_kernel_cannot_do_is_named_and_none_takes_xla(shape, dtype, words):
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert "tpu_custom_call" not in lowered(loss, x, x)
    with pytest.raises(ValueError, match=words):
        lowered(functools.partial(loss, implementation="pallas"), x, x)


def test_pallas_on_a_cpu_is_an_error_that_names_what_would_run():
    with pytest.raises(ValueError, match='TPUs.*lowered for cpu.*"xla"'):
        linear_recurrence(jnp.ones(64), jnp.ones((1, 9, 64)), implementation="pallas")
    x, B = jnp.ones((1, 9, 4)), jnp.ones((1, 9, 2))
    with pytest.raises(ValueError, match='TPUs.*lowered for cpu.*"xla"'):
        selective_scan(x, x, -jnp.ones((4, 2)), B, B, implementation="pallas")


def selective_shapes(b=4, T=70, E=6, N=2, groups=None, dtype=jnp.float32):
    x = jax.ShapeDtypeStruct((b, T, E), dtype)
    B = jax.ShapeDtypeStruct((b, T, N) if groups is None else (b, T, groups, N), dtype)
    return x, x, jax.ShapeDtypeStruct((E, N), jnp.float32), B, B


def selective_loss(*arrays, **options):
    return sum(jnp.sum(v.astype(jnp.float32) ** 2) for v in selective_scan(*arrays, **options))


def test_selective_scan_takes_the_kernel_on_tpus():
    gradient = jax.grad(selective_loss, range(5))
    text = lowered(gradient, *selective_shapes())
    assert 'kernel_name = "selective_scan"' in text
    assert 'kernel_name = "selective_scan_backward"' in text
    assert "tpu_custom_call" in lowered(gradient, *selective_shapes(groups=3))
    for options, platform in ((dict(implementation="xla"), "tpu"), ({}, "cuda")):
        run = functools.partial(selective_loss, **options)
        assert "tpu_custom_call" not in lowered(run, *selective_shapes(), platform=platform)


def test_selective_scan_takes_the_kernel_inside_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, none = PartitionSpec("data"), PartitionSpec()
    run = jax.shard_map(
        selective_scan, mesh=mesh, in_specs=(rows, rows, none, rows, rows), out_specs=(rows, rows)
    )
    loss = lambda *arrays: sum(jnp.sum(v) for v in run(*arrays))
    assert "tpu_custom_call" in lowered(jax.grad(loss, range(5)), *selective_shapes())


def test_what_the_selective_kernel_cannot_do_is_named_and_none_takes_xla():
    for shapes, words in (
        (selective_shapes(N=80), "N=80"),
        (selective_shapes(dtype=jnp.float16), "x is float16"),
    ):
        assert "tpu_custom_call" not in lowered(selective_loss, *shapes)
        with pytest.raises(ValueError, match=words):
            lowered(functools.partial(selective_loss, implementation="pallas"), *shapes)


def test_committed_table_beats_xla():
    """Our bound, in cycles or in bytes over the bandwidth, against XLA's for the same op."""
    table = json.loads(scans_tpu_static.RESULTS.read_text())["rows"]
    for generation in aot_tpu.PROFILED:
        rows = [r for r in table if r["generation"] == generation and r["direction"] == "forward"]
        chosen = lambda op, rows=rows: [
            r for r in rows if r["op"] == op and r["dtype"] == "float32" and r["bound"]
            and r["decays"] != "shared by all steps"
        ]  # fmt: skip
        ours, *others = chosen("linear_recurrence")
        assert ours["implementation"] == "pallas" and ours["bytes"] == 3 * 2**24 * 4
        assert len(others) == 2 and all(10 * ours["bound"] < r["bound"] for r in others)
        if generation != "v5p":  # where the profiler has no model of an op beside the kernel
            ours, xla = chosen("selective_scan")
            assert (ours["implementation"], xla["implementation"]) == ("pallas", "xla")
            assert 10 * ours["bound"] < xla["bound"]
