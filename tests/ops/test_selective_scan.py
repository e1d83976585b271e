"""Mamba's scan against its definition in float64: values, gradients, identities."""

import functools
import importlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tilescan.ops import reference
from tilescan.ops.selective_scan import selective_scan

module = importlib.import_module(
    "tilescan.ops.selective_scan"
)  # `ops.selective_scan` is the function

# Largest accepted errors, relative to the largest entry of the reference.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
OPTIONAL = ("D", "z", "dt_bias", "initial_state")


def inputs(B, T, E, N, dtype="float32", optional=OPTIONAL, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *s: rng.standard_normal(s)
    arrays = dict(
        x=normal(B, T, E),
        dt=rng.uniform(-3, 1, (B, T, E)),
        A=-rng.uniform(0.5, N, (E, N)),
        B=normal(B, T, N),
        C=normal(B, T, N),
        D=normal(E),
        z=normal(B, T, E),
        dt_bias=normal(E),
        initial_state=normal(B, E, N),
    )
    wide = ("A", "D", "dt_bias", "initial_state")
    return {
        name: jnp.asarray(v, "float32" if name in wide else dtype)
        for name, v in arrays.items()
        if name not in OPTIONAL or name in optional
    }


def value_and_gradients(op, arrays, **options):
    """y, final_state and the gradients of a random function of both to every array."""
    names = list(arrays)

    def loss(*values):
        y, h = op(**dict(zip(names, values, strict=True)), **options)
        rng = np.random.default_rng(1)
        w = [jnp.asarray(rng.integers(-3, 4, v.shape), h.dtype) for v in (y, h)]
        return (y.astype(h.dtype) * w[0]).sum() + (h * w[1]).sum(), (y, h)

    grads, (y, h) = jax.jit(jax.grad(loss, range(len(names)), has_aux=True))(*arrays.values())
    return dict(y=y, h=h) | dict(zip(names, grads, strict=True))


def assert_matches_reference(op, arrays, **options):
    options = dict(dt_softplus=True) | options
    got = value_and_gradients(op, arrays, **options)
    with jax.enable_x64(True):
        exact = {k: jnp.asarray(np.asarray(v, np.float64)) for k, v in arrays.items()}
        want = value_and_gradients(reference.selective_scan, exact, **options)
        want = {k: np.asarray(v) for k, v in want.items()}
    for name, y in want.items():
        assert y.dtype == np.float64 and got[name].shape == y.shape
        error = np.max(np.abs(np.asarray(got[name], np.float64) - y))
        bound = TOLERANCE[arrays["x"].dtype.name] * max(1.0, np.max(np.abs(y)))
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


@st.composite
def problems(draw):
    B, T = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 7, 20]))
    E, N = draw(st.sampled_from([1, 5])), draw(st.sampled_from([1, 3]))
    optional = [name for name in OPTIONAL if draw(st.booleans())]
    ids = None
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 9)))
        ids = np.sort(rng.integers(0, 4, (B, T + draw(st.integers(0, 1)))), axis=1)
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    arrays = inputs(B, T, E, N, dtype, optional)
    return arrays, dict(segment_ids=ids, dt_softplus=draw(st.booleans()) or "dt_bias" in optional)


@hypothesis.settings(max_examples=7, phases=[hypothesis.Phase.generate])
@hypothesis.given(problems())
def test_equals_the_definition(problem):
    arrays, options = problem
    assert_matches_reference(selective_scan, arrays, **options)


def test_groups_of_channels_share_B_and_C():
    """As many scans as groups, each with its part of the channels."""
    arrays = inputs(2, 70, 6, 2)
    rng = np.random.default_rng(3)
    arrays |= {k: jnp.asarray(rng.standard_normal((2, 70, 3, 2)), jnp.float32) for k in "BC"}
    ids = np.sort(rng.integers(0, 4, (2, 71)), axis=1)
    options = dict(dt_softplus=True, segment_ids=ids)

    def by_groups(**a):
        parts = []
        for g in range(3):
            e = slice(2 * g, 2 * g + 2)
            last = {k: a[k][..., e] for k in ("x", "dt", "z", "D", "dt_bias")}
            last |= dict(A=a["A"][e], initial_state=a["initial_state"][:, e])
            last |= {k: a[k][:, :, g] for k in "BC"}
            parts.append(selective_scan(**last, **options))
        y, h = zip(*parts, strict=True)
        return jnp.concatenate(y, 2), jnp.concatenate(h, 1)

    got = value_and_gradients(selective_scan, arrays, **options)
    want = value_and_gradients(by_groups, arrays)
    for name, v in want.items():
        error = float(jnp.max(jnp.abs(got[name] - v)))
        assert error <= 1e-5 * float(jnp.max(jnp.abs(v))), name


@pytest.mark.parametrize("T", [63, 64, 100, 129])
def test_equals_the_definition_over_several_chunks(T):
    assert_matches_reference(selective_scan, inputs(1, T, 3, 2))


def test_other_platforms_chunks_equal_the_definition():
    """The associative scan of chunks, which CPUs do not take, forward and backward."""
    arrays = inputs(2, 100, 3, 2, optional=[])
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (2, 100)), axis=1)
    x, dt, A, B, C = arrays.values()
    first = jnp.asarray(ids[:, 1:] != ids[:, :-1])
    first = jnp.pad(first, ((0, 0), (1, 0)))
    h = jnp.zeros((2, 2, 3))
    dy, dh = jnp.ones(x.shape), jnp.ones(h.shape)
    dt = jax.nn.softplus(dt)

    def both(chunk, chunk_vjp):
        y, last, starts = module._forward(chunk, x, dt, A.T, B, C, h, first)
        return y, last, *module._backward(chunk_vjp, x, dt, A.T, B, C, first, starts, dy, dh)

    got = jax.jit(functools.partial(both, module._tree, module._tree_vjp))()
    want = jax.jit(functools.partial(both, module._loop, module._loop_vjp))()
    for u, v in zip(got, want, strict=True):
        np.testing.assert_allclose(u, v, atol=2e-5 * max(1.0, float(jnp.max(jnp.abs(v)))))


def test_hand_value():
    """Decay 1/2, dt 1: h = 2, then 1 + 3; y = 10 h + 5 x."""
    array = lambda *v: jnp.asarray(v, jnp.float32).reshape(1, -1, 1)
    y, h = selective_scan(
        array(2, 3), array(1, 1), jnp.log(jnp.full((1, 1), 0.5)), array(1, 1), array(10, 10),
        D=jnp.full(1, 5.0),
    )  # fmt: skip
    np.testing.assert_allclose(y, array(30, 55), rtol=1e-6)
    np.testing.assert_allclose(h, [[[4.0]]], rtol=1e-6)


run = functools.partial(selective_scan, dt_softplus=True)
TIME = ("x", "dt", "B", "C", "z")


def part(arrays, steps, **others):
    return {k: v[:, steps] if k in TIME else v for k, v in arrays.items()} | others


def test_split_equals_whole():
    arrays = inputs(2, 80, 3, 2)
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (2, 81)), axis=1)
    y, h = run(**arrays, segment_ids=ids)
    for split in (1, 30, 79):
        y1, s = run(**part(arrays, slice(0, split)), segment_ids=ids[:, : split + 1])
        rest = part(arrays, slice(split, 80), initial_state=s)
        y2, s = run(**rest, segment_ids=ids[:, split:])
        np.testing.assert_allclose(y, np.concatenate([y1, y2], axis=1), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(h, s, rtol=1e-5, atol=1e-5)


def test_packed_equals_separate():
    """Values, and no gradient from one document to the one before."""
    arrays = inputs(1, 80, 3, 2)
    ids = np.repeat([3, 1, 2], [20, 1, 59])[None]
    y, h = run(**arrays, segment_ids=ids)
    zero = jnp.zeros_like(arrays["initial_state"])
    alone = [
        run(**part(arrays, slice(0, 20))),
        run(**part(arrays, slice(20, 21), initial_state=zero)),
        run(**part(arrays, slice(21, 80), initial_state=zero)),
    ]
    np.testing.assert_allclose(y, np.concatenate([v for v, _ in alone], 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(h, alone[-1][1], rtol=1e-5, atol=1e-5)
    last = lambda a: run(**a, segment_ids=ids)[0][:, 21:].sum()
    grads = jax.grad(last)(arrays)
    assert not any(np.any(grads[name][:, :21]) for name in TIME)
    assert not np.any(grads["initial_state"])
    assert all(np.all(np.any(grads[name][:, 21:] != 0, axis=-1)) for name in TIME)


def test_no_step_sees_a_later_one():
    arrays = inputs(1, 9, 2, 2)

    def outputs(x, dt):
        return selective_scan(**(arrays | dict(x=x, dt=dt)), dt_softplus=True)[0][0, :, 0]

    for jacobian in jax.jacrev(outputs, (0, 1))(arrays["x"], arrays["dt"]):
        np.testing.assert_array_equal(jacobian[:, 0, :, 0] != 0, np.tri(9) > 0)


@pytest.mark.parametrize("dt", [0.0, 1e-30, 1e4, 1e15, -1e4])
def test_extreme_steps_have_right_gradients(dt):
    """Decays of exactly 1 and exactly 0, mixed with mild ones; -1e4 under a softplus is 0."""
    arrays = inputs(1, 70, 2, 2, optional=["initial_state"])
    where = np.random.default_rng(0).random(arrays["dt"].shape) < 0.3
    arrays["dt"] = jnp.where(where, dt, jax.nn.softplus(arrays["dt"]))
    assert_matches_reference(selective_scan, arrays, dt_softplus=dt < 0)


def test_steps_of_all_sizes_together_have_right_gradients():
    """dt from 1e-6 to 1e3 next to each other, with rates to -10: log-decays to -1e4."""
    arrays = inputs(1, 140, 3, 2, optional=["initial_state"])
    sizes = 10 ** np.random.default_rng(5).uniform(-6, 3, arrays["dt"].shape)
    arrays["dt"] = jnp.asarray(sizes, jnp.float32)
    arrays["A"] = jnp.asarray([[-10.0, -0.1], [-1e-4, -1.0], [-3.0, 0.0]])
    assert_matches_reference(selective_scan, arrays, dt_softplus=False)


def test_bfloat16_inputs_leave_the_state_exact():
    arrays = inputs(2, 100, 4, 2, "bfloat16")
    got = value_and_gradients(selective_scan, arrays, dt_softplus=True)
    with jax.enable_x64(True):
        exact = {k: jnp.asarray(np.asarray(v, np.float64)) for k, v in arrays.items()}
        want = value_and_gradients(reference.selective_scan, exact, dt_softplus=True)
        want = {k: np.asarray(v) for k, v in want.items()}
    for name in ("h", "initial_state"):
        error = np.max(np.abs(np.asarray(got[name], np.float64) - want[name]))
        assert error <= 5e-6 * np.max(np.abs(want[name])), name


def test_dtypes():
    arrays = inputs(1, 5, 2, 2, "bfloat16")
    y, h = selective_scan(**arrays)
    assert (y.dtype, h.dtype) == (jnp.bfloat16, jnp.float32)
    for name, g in value_and_gradients(selective_scan, arrays).items():
        assert g.dtype == (arrays | dict(y=y, h=h))[name].dtype


def test_state_is_kept_in_float32():
    """4,096 times 1/256 is 16 in float32; a bfloat16 state would stop at 1."""
    ones = jnp.ones((1, 4096, 1), jnp.bfloat16)
    y, h = selective_scan(ones * 2.0**-8, ones, jnp.zeros((1, 1)), ones, ones)
    assert y[0, -1, 0] == h[0, 0, 0] == 16.0


def compiled_gradient(B, T, E, N):
    arrays = inputs(B, 1, E, N, optional=[])
    shape = lambda k, v: (B, T, v.shape[2]) if k in TIME else v.shape
    shapes = {k: jax.ShapeDtypeStruct(shape(k, v), v.dtype) for k, v in arrays.items()}
    loss = lambda a: selective_scan(**a)[0].sum()
    return jax.jit(jax.grad(loss)).lower(shapes).compile()


def test_memory_is_linear_in_length_and_no_states_are_kept():
    """Temporaries are a few arrays [T, E], a state per chunk and two chunks of states."""
    E, N = 32, 16
    for T in (2**12, 2**14):
        temporary = compiled_gradient(1, T, E, N).memory_analysis().temp_size_in_bytes
        states = (T // module.CHUNK + 3 * module.CHUNK) * E * N * 4
        assert temporary <= 5 * T * E * 4 + states
        assert temporary < T * E * N * 4 / 2


def test_same_bits_twice():
    arrays = inputs(2, 100, 8, 4)
    twice = jax.jit(functools.partial(value_and_gradients, run))
    jax.tree.map(np.testing.assert_array_equal, twice(arrays), twice(arrays))


def test_vmap():
    arrays = inputs(3, 20, 2, 2, optional=["initial_state"])
    axes = {k: None if k == "A" else 0 for k in arrays}
    one = lambda a: run(**{k: v if k == "A" else v[None] for k, v in a.items()})[0][0]
    got = jax.vmap(one, in_axes=(axes,))(arrays)
    np.testing.assert_allclose(got, run(**arrays)[0], rtol=1e-5, atol=1e-5)


def test_shard_map_over_the_batch():
    """Rates are the same on all devices, and their gradient is a sum over them."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = inputs(4, 10, 3, 2)
    rows, none = PartitionSpec("data"), PartitionSpec()
    specs = {k: none if k in ("A", "D", "dt_bias") else rows for k in arrays}
    one = lambda a: run(**a)
    sharded = jax.shard_map(one, mesh=mesh, in_specs=(specs,), out_specs=(rows, rows))
    loss = lambda f: lambda a: sum(jnp.sum(v**2) for v in f(a))
    got, want = jax.jit(jax.grad(loss(sharded)))(arrays), jax.grad(loss(one))(arrays)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_lowers_for_every_platform(platform):
    arrays = inputs(1, 100, 4, 2)
    step = jax.jit(jax.grad(lambda a: selective_scan(**a)[0].sum()))
    assert step.trace(arrays).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(implementation="pallas"), ValueError, 'implementation="xla"'),
        (dict(x=jnp.ones((2, 3))), ValueError, r"x must be \[B, T, E\]"),
        (dict(x=jnp.ones((1, 0, 3))), ValueError, "no empty axis but B"),
        (dict(dt=jnp.ones((1, 5, 2))), ValueError, r"dt must be \[B, T, E\]"),
        (dict(A=jnp.ones((2, 3))), ValueError, r"A must be \[E, N\]"),
        (dict(B=jnp.ones((1, 5, 4))), ValueError, r"B must be \[B, T, N\]"),
        (dict(C=jnp.ones((1, 4, 2))), ValueError, r"C must be \[B, T, N\]"),
        (dict(C=jnp.ones((1, 5, 3, 2))), ValueError, r"C must be \[B, T, N\]"),
        (dict(B=jnp.ones((1, 5, 2, 2)), C=jnp.ones((1, 5, 2, 2))), ValueError, "groups, got 3 and"),
        (dict(D=jnp.ones(2)), ValueError, r"D must be \[E\]"),
        (dict(z=jnp.ones((1, 5, 2))), ValueError, r"z must be \[B, T, E\]"),
        (dict(dt_bias=jnp.ones(2)), ValueError, r"dt_bias must be \[E\]"),
        (dict(initial_state=jnp.ones((1, 2, 3))), ValueError, r"initial_state must be \[B, E, N\]"),
        (dict(B=jnp.ones((1, 5, 2), jnp.int32)), TypeError, "B must be floating"),
        (dict(segment_ids=jnp.ones((1, 7), jnp.int32)), ValueError, "segment_ids must be"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arrays = inputs(1, 5, 3, 2, optional=[])
    with pytest.raises(error, match=words):
        selective_scan(**(arrays | change))
