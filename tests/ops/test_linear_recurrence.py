"""The diagonal recurrence against its definition in float64: values, gradients, identities."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tilescan.ops import diagonal_scan, reference
from tilescan.ops.linear_recurrence import linear_recurrence

# Largest accepted errors, relative to the largest entry of the reference.
TOLERANCE = {"float32": 1e-5, "complex64": 1e-5, "bfloat16": 2e-2}


def inputs(shape, dtype="float32", a_shape=None, seed=0):
    """a of modulus below 1, b and initial_state."""
    rng = np.random.default_rng(seed)
    normal = lambda s: rng.standard_normal(s)
    a_shape = shape if a_shape is None else a_shape
    a = rng.uniform(-0.2, 1.0, a_shape)
    b, state = normal(shape), normal((shape[0], *shape[2:]))
    if dtype == "complex64":
        a = a * np.exp(1j * normal(a_shape))
        b, state = b + 1j * normal(shape), state + 1j * normal(state.shape)
    dtype, wide = jnp.dtype(dtype), "float32" if dtype == "bfloat16" else dtype
    return a.astype(dtype), b.astype(dtype), state.astype(wide)


SHAPE = 2, 100, 4


@functools.partial(jax.jit, static_argnames=("op", "reverse", "segment_ids"))
def value_and_gradients(op, a, b, state, reverse=False, segment_ids=None):
    """h, final_state and the gradients of a random real function of both."""
    ids = None if segment_ids is None else np.asarray(segment_ids)

    def loss(a, b, state):
        h, last = op(a, b, initial_state=state, reverse=reverse, segment_ids=ids)
        rng = np.random.default_rng(1)
        total = 0.0
        for x in (h, last):
            w = rng.integers(-3, 4, (2, *x.shape)).astype(x.real.dtype)
            total += (x.real * w[0] + x.imag * w[1]).astype(state.real.dtype).sum()
        return total, (h, last)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(a, b, state)


def assert_matches_reference(op, arrays, **options):
    tolerance = TOLERANCE[arrays[0].dtype.name]
    grads, values = value_and_gradients(op, *arrays, **options)
    with jax.enable_x64(True):
        wide = lambda x: np.complex128 if np.iscomplexobj(x) else np.float64
        exact = [np.asarray(x).astype(wide(x)) for x in arrays]
        exact_grads, exact_values = value_and_gradients(
            reference.linear_recurrence, *exact, **options
        )
    names = ("h", "final_state", "da", "db", "d_initial_state")
    pairs = zip(names, (*values, *grads), (*exact_values, *exact_grads), strict=True)
    for name, x, y in pairs:
        assert x.shape == y.shape
        y = np.asarray(y)
        error = np.max(np.abs(np.asarray(x).astype(y.dtype) - y))
        bound = tolerance * max(1.0, np.max(np.abs(y)))
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


@st.composite
def problems(draw):
    B, T = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 20]))
    D = draw(st.sampled_from([(), (1,), (5,), (2, 3)]))
    full = (B, T, *D)
    a_shape = draw(st.sampled_from([full, D, (1, T, *D), (B, T, *(1 for _ in D))]))
    dtype = draw(st.sampled_from(["float32", "complex64", "bfloat16"]))
    ids = None
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 9)))
        ids = np.sort(rng.integers(0, 4, (B, T + draw(st.integers(0, 1)))), axis=1)
        ids = tuple(map(tuple, ids.tolist()))
    return inputs(full, dtype, a_shape), dict(segment_ids=ids, reverse=draw(st.booleans()))


@pytest.mark.slow
@hypothesis.settings(max_examples=20, phases=[hypothesis.Phase.generate])
@hypothesis.given(problems())
def test_any_problem_equals_the_definition(problem):
    arrays, options = problem
    assert_matches_reference(linear_recurrence, arrays, **options)


@pytest.mark.parametrize(
    "shape,dtype,a_shape,reverse,ids",
    [
        ((2, 7, 5), "bfloat16", (5,), False, ((1, 1, 1, 2, 2, 2, 3), (1,) * 7)),
        ((1, 20, 2, 3), "complex64", (1, 20, 1, 1), True, ((1,) * 9 + (2,) * 12,)),
        ((3, 1), "float32", (3, 1), False, ((1, 2), (1, 1), (2, 2))),
    ],
)
def test_equals_the_definition(shape, dtype, a_shape, reverse, ids):
    arrays = inputs(shape, dtype, a_shape)
    assert_matches_reference(linear_recurrence, arrays, reverse=reverse, segment_ids=ids)


@pytest.mark.parametrize(
    "T,dtype",
    [
        (100, "complex64"),
        *(pytest.param(T, "float32", marks=pytest.mark.slow) for T in (1, 2, 63, 100)),
        *(pytest.param(T, "complex64", marks=pytest.mark.slow) for T in (1, 2, 63)),
    ],
)
def test_both_orders_of_computation_equal_the_definition(T, dtype):
    """The loop of CPUs, and the associative scan in chunks of every other platform."""
    arrays = inputs((2, T, 4), dtype)
    assert_matches_reference(linear_recurrence, arrays)
    for loop, tree in both_orders(*arrays):
        for x, y in zip(loop, tree, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)


@jax.jit
def both_orders(*arrays):
    """The loop's results and the scan's, forward and in reverse, of decays before and after."""
    options = [dict(reverse=r, after=a) for r in (False, True) for a in (False, True)]
    return [
        (diagonal_scan.sequential(*arrays, **o), associative_in_chunks(*arrays, **o))
        for o in options
    ]


def associative_in_chunks(a, b, state, **options):
    """Chunks of 16 steps, so that short inputs have several and an incomplete one."""
    chunk, diagonal_scan.CHUNK = diagonal_scan.CHUNK, 16
    try:
        return diagonal_scan.associative(a, b, state, **options)
    finally:
        diagonal_scan.CHUNK = chunk


def test_hand_values():
    b = jnp.asarray([[1.0, 2.0, 3.0]])
    h, last = linear_recurrence(jnp.float32(0.5), b, initial_state=jnp.asarray([4.0]))
    np.testing.assert_array_equal(h, [[3.0, 3.5, 4.75]])
    np.testing.assert_array_equal(last, [4.75])
    h, last = linear_recurrence(jnp.float32(0.5), b, reverse=True)
    np.testing.assert_array_equal(h, [[2.75, 3.5, 3.0]])
    np.testing.assert_array_equal(last, [2.75])


@pytest.mark.parametrize("reverse", [False, True])
def test_split_equals_whole(reverse):
    """In two calls with the state, and its segment, handed over; bit for bit."""
    a, b, state = inputs((2, 50, 4))
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (2, 51)), axis=1)
    run = jax.jit(functools.partial(linear_recurrence, reverse=reverse))
    h, last = run(a, b, initial_state=state, segment_ids=ids)
    a, b = np.asarray(a), np.asarray(b)
    for split in (1, 25):
        first, second = slice(0, split), slice(split, 50)
        if reverse:
            first, second = second, first
        ids_of = lambda s: ids[:, s.start : s.stop + 1]
        h1, s1 = run(a[:, first], b[:, first], initial_state=state, segment_ids=ids_of(first))
        h2, s2 = run(a[:, second], b[:, second], initial_state=s1, segment_ids=ids_of(second))
        halves = (h2, h1) if reverse else (h1, h2)
        np.testing.assert_array_equal(h, np.concatenate(halves, axis=1))
        np.testing.assert_array_equal(last, s2)


def test_packed_equals_separate():
    """Values, gradients, and no gradient from one document to the one before."""
    a, b, state = map(np.asarray, inputs((1, 30, 4)))
    ids = np.repeat([3, 1, 2], [11, 1, 18])[None]
    jitted = jax.jit(linear_recurrence)
    h, last = jitted(a, b, initial_state=state, segment_ids=ids)
    alone = [
        jitted(a[:, s], b[:, s], initial_state=first)
        for s, first in [(slice(0, 11), state), (slice(11, 12), None), (slice(12, 30), None)]
    ]
    np.testing.assert_array_equal(h, np.concatenate([x for x, _ in alone], axis=1))
    np.testing.assert_array_equal(last, alone[-1][1])
    run = lambda a, b, s: linear_recurrence(a, b, initial_state=s, segment_ids=ids)[0]
    late = jax.jit(jax.grad(lambda *x: run(*x)[:, 12:].sum(), (0, 1, 2)))
    da, db, ds = map(np.asarray, late(a, b, state))
    assert not np.any(da[:, :13]) and not np.any(db[:, :12]) and not np.any(ds)
    assert np.all(db[:, 12:])


def test_initial_segment_decides_whether_the_first_step_goes_on():
    a, b, state = inputs((1, 5, 2))
    ids = np.asarray([[7, 7, 7, 7, 7]])
    go_on, _ = linear_recurrence(a, b, initial_state=state)
    fresh, _ = linear_recurrence(a, b)
    for before, want in ((7, go_on), (6, fresh)):
        longer = np.concatenate([[[before]], ids], axis=1)
        h, _ = linear_recurrence(a, b, initial_state=state, segment_ids=longer)
        np.testing.assert_array_equal(h, want)


def test_no_step_sees_a_later_one():
    a, b, state = inputs((1, 12, 2))
    for reverse in (False, True):
        run = functools.partial(linear_recurrence, initial_state=state, reverse=reverse)
        db = jax.jit(jax.jacobian(lambda b: run(a, b)[0][0, :, 0]))(b)[:, 0, :, 0]  # noqa: B023
        seen = np.triu(np.ones((12, 12))) if reverse else np.tril(np.ones((12, 12)))
        np.testing.assert_array_equal(np.asarray(db) != 0, seen > 0)


@pytest.mark.parametrize("decay", [0.0, 1e-30, 1.0, -1.0])
def test_extreme_decays_have_exact_gradients(decay):
    _, b, state = inputs(SHAPE)
    a = np.full(b.shape, decay, np.float32)
    assert_matches_reference(linear_recurrence, (a, b, state))


def test_decays_of_all_sizes_together_are_exact():
    """exp of -1e-6 to -1e4, of which many are exactly 0."""
    a, b, state = inputs(SHAPE)
    a = np.exp(-(10 ** np.random.default_rng(5).uniform(-6, 4, a.shape)).astype(np.float32))
    assert np.any(a == 0) and np.any(a > 0.99999)
    assert_matches_reference(linear_recurrence, (a, b, state))


def test_bfloat16_inputs_leave_the_state_exact():
    arrays = inputs(SHAPE, "bfloat16")
    grads, values = value_and_gradients(linear_recurrence, *arrays)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        want = value_and_gradients(reference.linear_recurrence, *exact)
        want = np.asarray(want[1][1]), np.asarray(want[0][2])
    for x, y in zip((values[1], grads[2]), want, strict=True):
        assert np.max(np.abs(np.asarray(x, np.float64) - y)) <= 5e-6 * np.max(np.abs(y))


@pytest.mark.slow
def test_second_derivatives():
    a, b, state = inputs((1, 6, 2))
    loss = lambda op: lambda a: (op(a, b, initial_state=state)[0] ** 2).sum()
    second = lambda op: jax.jit(jax.jacrev(jax.grad(loss(op))))(a)
    got, want = second(linear_recurrence), second(reference.linear_recurrence)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_dtypes():
    half, single, double = (
        jax.ShapeDtypeStruct((1, 9, 4), dtype) for dtype in ("bfloat16", "float32", "complex64")
    )
    dtypes = lambda a, b: [x.dtype for x in jax.eval_shape(linear_recurrence, a, b)]
    assert dtypes(half, half) == dtypes(single, half) == [jnp.bfloat16, jnp.float32]
    assert dtypes(double, single) == [jnp.complex64, jnp.complex64]
    loss = lambda b, a: linear_recurrence(a, b)[0].real.sum()
    assert jax.eval_shape(jax.grad(loss), single, double).dtype == jnp.float32


def test_state_is_kept_in_float32():
    """4,096 times 1/256 is 16 in float32; a bfloat16 state would stop at 1."""
    b = jnp.full((1, 4096, 1), 2.0**-8, jnp.bfloat16)
    h, last = linear_recurrence(jnp.ones(1, jnp.bfloat16), b)
    assert last[0, 0] == h[0, -1, 0] == 16.0


def compiled_gradient(T, dtype="float32", op=linear_recurrence):
    x = jax.ShapeDtypeStruct((1, T, 8), dtype)
    loss = lambda a, b: op(a, b)[0].real.sum()
    return jax.jit(jax.grad(loss, (0, 1))).lower(x, x).compile()


def test_memory_is_linear_in_length():
    """No more than a few arrays of the inputs' size beside the inputs and gradients."""
    for T in (2**14, 2**16):
        temporary = compiled_gradient(T).memory_analysis().temp_size_in_bytes
        assert temporary <= 3 * T * 8 * 4 + 2**16


def test_same_bits_twice():
    twice = [value_and_gradients(linear_recurrence, *inputs(SHAPE)) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *twice)


def test_vmap():
    arrays = inputs(SHAPE)
    one = lambda a, b, s: linear_recurrence(a[None], b[None], initial_state=s[None])[0][0]
    _, (whole, _) = value_and_gradients(linear_recurrence, *arrays)
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(*arrays), whole, atol=1e-6)


@pytest.mark.slow
def test_shard_map_over_the_batch():
    """Also where the decay is the same on all devices, and its gradient so is a sum over them."""
    loss = lambda f: lambda *x: sum(jnp.sum(y**2) for y in f(*x))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, none = PartitionSpec("data"), PartitionSpec()
    for a_shape, spec in ((None, rows), ((5,), none)):
        arrays = inputs((4, 12, 5), a_shape=a_shape)
        run = lambda a, b, s: linear_recurrence(a, b, initial_state=s)
        sharded = jax.shard_map(run, mesh=mesh, in_specs=(spec, rows, rows), out_specs=(rows, rows))
        got = jax.jit(jax.grad(loss(sharded), (0, 1, 2)))(*arrays)
        want = jax.jit(jax.grad(loss(run), (0, 1, 2)))(*arrays)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_lowers_for_every_platform(platform):
    x = jax.ShapeDtypeStruct((2, 600, 4), jnp.complex64)
    step = jax.jit(jax.grad(lambda a, b: linear_recurrence(a, b)[0].real.sum(), (0, 1)))
    assert step.trace(x, x).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(implementation="pallas"), ValueError, 'implementation="xla"'),
        (dict(a=np.ones((2, 9, 4))), ValueError, r"a \(2, 9, 4\) must be \[B, T, \*D\]"),
        (dict(a=np.ones(3)), ValueError, "where it is shared"),
        (dict(a=np.ones(4, jnp.int32)), TypeError, "a must be floating or complex"),
        (dict(b=np.ones(5)), ValueError, r"b must be \[B, T, \*D\]"),
        (dict(b=np.ones((2, 0, 4))), ValueError, "no empty axis but B"),
        (dict(initial_state=np.ones((2, 5, 4))), ValueError, "initial_state must be"),
        (dict(initial_state=np.ones((2, 4), jnp.complex64)), TypeError, "cast one"),
        (dict(segment_ids=np.ones((2, 7), jnp.int32)), ValueError, "segment_ids must be"),
        (dict(segment_ids=np.ones((2, 5))), TypeError, "segment_ids must be integers"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = dict(a=jnp.ones(4), b=jnp.ones((2, 5, 4))) | change
    with pytest.raises(error, match=words):
        linear_recurrence(**arguments)
