"""Mamba's scan against its definition in float64: values, gradients, identities."""

import functools
import importlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrence_checks
from jax.sharding import PartitionSpec
from recurrence_checks import assert_close, in_pieces, piece, results

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
        name: v.astype(jnp.dtype("float32" if name in wide else dtype))
        for name, v in arrays.items()
        if name not in OPTIONAL or name in optional
    }


scan = functools.partial(selective_scan, dt_softplus=True)
by_steps = functools.partial(reference.selective_scan, dt_softplus=True)
plain_scan = functools.partial(selective_scan, dt_softplus=False)
plain_by_steps = functools.partial(reference.selective_scan, dt_softplus=False)

TIME = ("x", "dt", "B", "C", "z")
# Of tests that need no other shape: several chunks, the last one incomplete.
SHAPE = 2, 140, 4, 2
IDS = np.repeat([[3, 1, 2, 2], [1, 1, 1, 4]], [20, 1, 90, 30], axis=1)


def assert_matches_reference(arrays, dt_softplus=True, segment_ids=None):
    op, steps = (scan, by_steps) if dt_softplus else (plain_scan, plain_by_steps)
    if segment_ids is not None:
        op, steps = (functools.partial(f, segment_ids=segment_ids) for f in (op, steps))
    want = recurrence_checks.expected(steps, arrays)
    tolerance = TOLERANCE[arrays["x"].dtype.name]
    assert_close(results(op, arrays), want, tolerance, least=1.0)


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


@pytest.mark.slow
@hypothesis.settings(max_examples=20, phases=[hypothesis.Phase.generate])
@hypothesis.given(problems())
def test_any_problem_equals_the_definition(problem):
    arrays, options = problem
    assert_matches_reference(arrays, **options)


@pytest.mark.parametrize(
    "shape,dtype,optional,ids,dt_softplus",
    [
        (SHAPE, "float32", OPTIONAL, None, True),
        (SHAPE, "bfloat16", OPTIONAL, None, True),
        pytest.param((1, 1, 5, 3), "float32", ["z"], [[1, 2]], False, marks=pytest.mark.slow),
        pytest.param(
            (2, 64, 1, 1),
            "float32",
            ["D", "initial_state"],
            [[1] * 9 + [2] * 55] * 2,
            False,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["everything", "bfloat16", "one step", "one channel"],
)
def test_equals_the_definition(shape, dtype, optional, ids, dt_softplus):
    arrays = inputs(*shape, dtype, optional)
    assert_matches_reference(arrays, dt_softplus, None if ids is None else np.asarray(ids))


@pytest.mark.slow
@pytest.mark.parametrize("T", [63, 64, 100, 129])
def test_equals_the_definition_over_several_chunks(T):
    assert_matches_reference(inputs(1, T, 3, 2))


def scan_of_groups(**arrays):
    return selective_scan(**arrays, dt_softplus=True, segment_ids=IDS)


def scans_by_groups(**a):
    """As many scans as groups, each with its part of the channels."""
    y, h = [], []
    for g in range(2):
        e = slice(2 * g, 2 * g + 2)
        last = {k: a[k][..., e] for k in ("x", "dt", "z", "D", "dt_bias")}
        last |= dict(A=a["A"][e], initial_state=a["initial_state"][:, e])
        last |= {k: a[k][:, :, g] for k in "BC"}
        y_g, h_g = scan_of_groups(**last)
        y.append(y_g)
        h.append(h_g)
    return jnp.concatenate(y, 2), jnp.concatenate(h, 1)


def test_groups_of_channels_share_B_and_C():
    """As many scans as groups, each with its part of the channels."""
    arrays = inputs(*SHAPE)
    rng = np.random.default_rng(3)
    arrays |= {k: jnp.asarray(rng.standard_normal((2, 140, 2, 2)), jnp.float32) for k in "BC"}
    want = results(scans_by_groups, arrays)
    assert_close(results(scan_of_groups, arrays), want, 1e-5, least=0.0)


def test_other_platforms_chunks_equal_the_definition():
    """The associative scan of chunks, which CPUs do not take, forward and backward."""
    arrays = inputs(2, 100, 3, 2, optional=[])
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (2, 100)), axis=1)
    x, dt, A, B, C = arrays.values()
    first = jnp.asarray(np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0))))
    h = jnp.zeros((2, 2, 3))
    dy, dh = jnp.ones(x.shape), jnp.ones(h.shape)
    dt = np.log1p(np.exp(dt))

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


# Steps of -1e9 before the softplus are 0.
idle = dict(dt=-1e9)


def test_split_equals_whole():
    arrays = inputs(*SHAPE)
    whole = results(scan, arrays, segment_ids=IDS)
    for split in (1, 30, 139):
        state, y = arrays["initial_state"], []
        for start, stop in ((0, split), (split, 140)):
            last = ((0, 0), (0, 140 - (stop - start)))
            ids = np.pad(IDS[:, start : stop + 1], last, "edge")
            part = piece(arrays, start, stop, TIME, state, **idle)
            out = results(scan, part, segment_ids=ids)
            y.append(np.asarray(out["y"])[:, : stop - start])
            state = out["h"]
        np.testing.assert_allclose(whole["y"], np.concatenate(y, 1), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(whole["h"], state, rtol=1e-5, atol=1e-5)
    parts = in_pieces(scan, arrays, [0, 30, 140], TIME, **idle)
    assert_close(results(scan, arrays), parts, 1e-5, least=1.0)


def test_packed_equals_separate():
    """Values, and no gradient from one document to the one before."""
    arrays = inputs(*SHAPE)
    steps = np.arange(140) >= 20
    got = results(scan, arrays, steps, segment_ids=IDS)
    zero, state = np.zeros((2, 4, 2), np.float32), arrays["initial_state"]
    for start, stop in ((0, 19), (19, 20), (20, 140)):
        alone = results(scan, piece(arrays, start, stop, TIME, state, **idle))
        y = alone["y"][0, : stop - start]
        np.testing.assert_allclose(got["y"][0, start:stop], y, rtol=1e-5, atol=1e-5)
        state = zero
    np.testing.assert_allclose(got["h"][0], alone["h"][0], rtol=1e-5, atol=1e-5)
    for name in TIME:
        assert not np.any(got[f"d{name}"][0, :20])
        assert np.any(got[f"d{name}"][0, 20:21]) and np.any(got[f"d{name}"][0, 139:])
    assert not np.any(got["dinitial_state"][0])


def test_no_step_sees_a_later_one():
    arrays = inputs(*SHAPE)
    got = results(scan, arrays, np.arange(140) == 101)
    for name in TIME:
        assert not np.any(got[f"d{name}"][:, 102:])
    for name in ("x", "dt"):
        assert np.all(np.any(got[f"d{name}"][:, 96:102] != 0, axis=(0, 2)))


@pytest.mark.parametrize("dt", [0.0, 1e-30, 1e4, 1e15])
def test_extreme_steps_have_right_gradients(dt):
    """Decays of exactly 1 and exactly 0, mixed with mild ones."""
    arrays = inputs(*SHAPE, optional=["initial_state"])
    where = np.random.default_rng(0).random(arrays["dt"].shape) < 0.3
    mild = np.log1p(np.exp(arrays["dt"]))
    arrays["dt"] = np.where(where, np.float32(dt), mild)
    assert_matches_reference(arrays, dt_softplus=False)


def test_steps_far_below_zero_have_right_gradients():
    """-1e4 under a softplus is 0."""
    arrays = inputs(*SHAPE)
    where = np.random.default_rng(0).random(arrays["dt"].shape) < 0.3
    arrays["dt"] = np.where(where, np.float32(-1e4), arrays["dt"])
    assert_matches_reference(arrays)


def test_steps_of_all_sizes_together_have_right_gradients():
    """dt from 1e-6 to 1e3 next to each other, with rates to -10: log-decays to -1e4."""
    arrays = inputs(*SHAPE, optional=["initial_state"])
    sizes = 10 ** np.random.default_rng(5).uniform(-6, 3, arrays["dt"].shape)
    arrays["dt"] = jnp.asarray(sizes, jnp.float32)
    arrays["A"] = jnp.asarray([[-10.0, -0.1], [-1e-4, -1.0], [-3.0, 0.0], [-1.0, -0.5]])
    assert_matches_reference(arrays, dt_softplus=False)


def test_bfloat16_inputs_leave_the_state_exact():
    arrays = inputs(*SHAPE, "bfloat16")
    got, want = results(scan, arrays), recurrence_checks.expected(by_steps, arrays)
    assert_close(got, {n: want[n] for n in ("h", "dinitial_state")}, 5e-6)
    assert (got["y"].dtype, got["h"].dtype) == (jnp.bfloat16, jnp.float32)
    for name, a in arrays.items():
        assert got[f"d{name}"].dtype == a.dtype


def test_state_is_kept_in_float32():
    """4,096 times 1/256 is 16 in float32; a bfloat16 state would stop at 1."""
    ones = jnp.ones((1, 4096, 1), jnp.bfloat16)
    y, h = jax.jit(selective_scan)(ones * 2.0**-8, ones, jnp.zeros((1, 1)), ones, ones)
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
    arrays = inputs(*SHAPE)
    jax.tree.map(np.testing.assert_array_equal, results(scan, arrays), results(scan, arrays))


def test_vmap():
    arrays = inputs(*SHAPE, optional=["initial_state"])
    axes = {k: None if k == "A" else 0 for k in arrays}
    one = lambda a: plain_scan(**{k: v if k == "A" else v[None] for k, v in a.items()})[0][0]
    arrays["dt"] = np.exp(arrays["dt"])
    got = jax.jit(jax.vmap(one, in_axes=(axes,)))(arrays)
    np.testing.assert_allclose(got, results(plain_scan, arrays)["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_shard_map_over_the_batch():
    """Rates are the same on all devices, and their gradient is a sum over them."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = inputs(4, 10, 3, 2)
    rows, none = PartitionSpec("data"), PartitionSpec()
    specs = {k: none if k in ("A", "D", "dt_bias") else rows for k in arrays}
    one = lambda a: scan(**a)
    sharded = jax.shard_map(one, mesh=mesh, in_specs=(specs,), out_specs=(rows, rows))
    loss = lambda f: lambda a: sum(jnp.sum(v**2) for v in f(a))
    got, want = (jax.jit(jax.grad(loss(f)))(arrays) for f in (sharded, one))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("platform", ["tpu", pytest.param("cuda", marks=pytest.mark.slow), "cpu"])
def test_lowers_for_every_platform(platform):
    arrays = inputs(1, 100, 4, 2)
    step = jax.jit(jax.grad(lambda a: selective_scan(**a)[0].sum()))
    assert step.trace(arrays).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(implementation="pallas"), ValueError, 'implementation="xla"'),
        (dict(x=np.ones((2, 3), np.float32)), ValueError, r"x must be \[B, T, E\]"),
        (dict(x=np.ones((1, 0, 3), np.float32)), ValueError, "no empty axis but B"),
        (dict(dt=np.ones((1, 5, 2), np.float32)), ValueError, r"dt must be \[B, T, E\]"),
        (dict(A=np.ones((2, 3), np.float32)), ValueError, r"A must be \[E, N\]"),
        (dict(B=np.ones((1, 5, 4), np.float32)), ValueError, r"B must be \[B, T, N\]"),
        (dict(C=np.ones((1, 4, 2), np.float32)), ValueError, r"C must be \[B, T, N\]"),
        (dict(C=np.ones((1, 5, 3, 2), np.float32)), ValueError, r"C must be \[B, T, N\]"),
        (
            dict(B=np.ones((1, 5, 2, 2), np.float32), C=np.ones((1, 5, 2, 2), np.float32)),
            ValueError,
            "groups, got 3 and",
        ),
        (dict(D=np.ones(2, np.float32)), ValueError, r"D must be \[E\]"),
        (dict(z=np.ones((1, 5, 2), np.float32)), ValueError, r"z must be \[B, T, E\]"),
        (dict(dt_bias=np.ones(2, np.float32)), ValueError, r"dt_bias must be \[E\]"),
        (
            dict(initial_state=np.ones((1, 2, 3), np.float32)),
            ValueError,
            r"initial_state must be \[B, E, N\]",
        ),
        (dict(B=np.ones((1, 5, 2), np.int32)), TypeError, "B must be floating"),
        (dict(segment_ids=np.ones((1, 7), np.int32)), ValueError, "segment_ids must be"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arrays = inputs(1, 5, 3, 2, optional=[])
    with pytest.raises(error, match=words):
        selective_scan(**(arrays | change))
