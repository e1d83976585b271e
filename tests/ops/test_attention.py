"""Tiled attention against its definition in float64: values, gradients, identities, errors."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.ops import masks, reference
from tilescan.ops.attention import attention, decode_attention, merge_partials

# Largest accepted errors, relative to the largest entry of the reference.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
GRADIENT_FACTOR = 4


def inputs(B, T, S, H, G, D, P, dtype="float32", bias=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, D), (B, S, G, D), (B, S, G, P)] + ([bias] if bias else [])
    arrays = [rng.standard_normal(s).astype(jnp.dtype(dtype)) for s in shapes]
    return arrays if bias else [*arrays, None]


def cotangents(arrays, seed=1):
    """(do, dlse) of small integers, which are exact in bfloat16."""
    (B, T, H, _), P, dtype = arrays[0].shape, arrays[2].shape[-1], arrays[0].dtype
    rng = np.random.default_rng(seed)
    do, dlse = (rng.integers(-3, 4, shape) for shape in ((B, T, H, P), (B, T, H)))
    lse_dtype = jnp.promote_types(dtype, jnp.float32)
    return do.astype(dtype), dlse.astype(lse_dtype)


def values_and_gradients(q, k, v, bias, do, dlse, *, call=attention, **options):
    """o, lse, dq, dk, dv, and dbias where there is a bias."""

    def run(q, k, v, bias=None):
        return call(q, k, v, bias=bias, return_lse=True, **options)

    (o, lse), pull = jax.vjp(run, q, k, v, *([] if bias is None else [bias]))
    return o, lse, *pull((do, dlse))


@jax.jit
def causal(q, k, v, do):
    """o, lse, dq, dk, dv, one program for each shape."""
    return values_and_gradients(
        q, k, v, None, do, jnp.zeros(do.shape[:3], do.dtype), mask=masks.Causal()
    )


def definition(q, k, v, bias=None, do=None, dlse=None, **options):
    """o, lse, dq, dk, dv, dbias in float64, by formulas."""
    do = np.zeros((*q.shape[:3], v.shape[-1])) if do is None else do
    dlse = np.zeros(q.shape[:3]) if dlse is None else dlse
    return reference.attention_and_gradients(q, k, v, do, dlse, bias=bias, **options)


@pytest.mark.slow
def test_works_where_float64_is_enabled():
    with jax.enable_x64(True):
        arrays = inputs(1, 300, 300, 2, 1, 16, 16, dtype="float64", bias=(1, 2, 300, 300))
        arrays += cotangents(arrays)
        got = jax.jit(functools.partial(values_and_gradients, mask=masks.Causal()))(*arrays)
    for x, y in zip(got, definition(*arrays, mask=masks.Causal()), strict=True):
        assert x.dtype == jnp.float64
        np.testing.assert_allclose(x, y, atol=1e-12)


@pytest.mark.parametrize(
    "dtype",
    [*(pytest.param(x, marks=pytest.mark.slow) for x in ("bfloat16", "float32")), "float64"],
)
def test_the_reference_is_an_implementation(dtype):
    by_reference = functools.partial(attention, implementation="reference")

    @jax.jit
    def run(q, k, v, bias, offset):
        options = dict(mask=masks.Causal(), bias=bias, logit_cap=3.0, return_lse=True)
        given = [options, options | dict(q_offset=offset, scale=0.3)]
        pairs = [[f(q, k, v, **o) for f in (by_reference, reference.attention)] for o in given]
        return pairs, by_reference(q, k, v), attention(q, k, v)

    with jax.enable_x64(dtype == "float64"):
        arrays = inputs(2, 5, 9, 4, 2, 16, 24, dtype=dtype, bias=(1, 4, 5, 9))
        pairs, alone, fast = run(*arrays, jnp.int32(2))
    for (o, lse), (want, want_lse) in pairs:
        assert o.dtype == arrays[0].dtype and lse.dtype == want.dtype
        np.testing.assert_array_equal(o, np.asarray(want).astype(o.dtype))
        np.testing.assert_array_equal(lse, want_lse)
    np.testing.assert_allclose(alone, fast, atol=1e-2 if dtype[0] == "b" else 1e-5)


def assert_matches_definition(arrays, **options):
    """attention == the dense definition in float64, forward and backward."""
    names = ("o", "lse", "dq", "dk", "dv", "dbias")
    dtype = arrays[0].dtype.name
    arrays = [*arrays, *cotangents(arrays)]
    got = jax.jit(functools.partial(values_and_gradients, **options))(*arrays)
    want = definition(*arrays, **options)
    for name, x, y in zip(names, got, want, strict=False):
        x = np.asarray(x, np.float64)
        error = np.max(np.abs(np.subtract(x, y, out=np.zeros_like(x), where=x != y)))
        scale = max(1.0, np.max(np.abs(np.where(np.isinf(y), 0.0, y))))
        bound = TOLERANCE[dtype] * (GRADIENT_FACTOR if name.startswith("d") else 1) * scale
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


@st.composite
def problems(draw):
    """Shapes that divide nothing, grouped heads, any mask, maybe a bias and a cap."""
    B = draw(st.integers(1, 3))
    T, S = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    G = draw(st.sampled_from([1, 2, 3]))
    H = G * draw(st.sampled_from([1, 2, 4]))
    D, P = draw(st.sampled_from([16, 24, 64])), draw(st.sampled_from([16, 40]))
    offset = draw(st.sampled_from([None, 0, 3]))
    mask = draw(
        st.sampled_from([
            masks.Full(),
            masks.Causal(),
            masks.SlidingWindow(7, 2),
            masks.Causal() | masks.Prefix(11),
            masks.Lambda(2, 9),
        ])
    )  # fmt: skip
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 9)))
        ids = [np.sort(rng.integers(0, 4, (B, n)), axis=1).astype(np.int32) for n in (T, S)]
        mask = mask & masks.Segments(*ids)
    bias = None
    if draw(st.booleans()):
        full = (B, H, T, S)
        bias = tuple(n if draw(st.booleans()) else 1 for n in full)
    cap = draw(st.sampled_from([None, 2.0]))
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16"]))
    return (B, T, S, H, G, D, P), mask, offset, bias, cap, dtype


def check(problem):
    shape, mask, offset, bias, cap, dtype = problem
    arrays = inputs(*shape, dtype=dtype, bias=bias)
    assert_matches_definition(arrays, mask=mask, q_offset=offset, logit_cap=cap)


@hypothesis.settings(max_examples=2, phases=[hypothesis.Phase.generate])
@hypothesis.given(problems())
def test_equals_the_definition(problem):
    check(problem)


@pytest.mark.slow
@hypothesis.settings(max_examples=40, phases=[hypothesis.Phase.generate])
@hypothesis.given(problems())
def test_equals_the_definition_in_many_problems(problem):
    check(problem)


@pytest.mark.parametrize(
    "shape, mask",
    [
        # Also with dropout, in test_attention_dropout.py.
        pytest.param((1, 700, 700, 4, 2, 32, 32), masks.Causal(), marks=pytest.mark.slow),
        pytest.param((2, 300, 600, 2, 1, 32, 48), masks.SlidingWindow(100), marks=pytest.mark.slow),
        ((1, 512, 512, 2, 2, 16, 16), masks.BlockSparse(masks.butterfly(16), 32)),
        pytest.param((1, 600, 600, 2, 2, 16, 16), masks.Lambda(4, 64), marks=pytest.mark.slow),
        pytest.param((2, 5, 1000, 4, 1, 16, 16), masks.Causal(), marks=pytest.mark.slow),
    ],
    ids=["causal", "window", "butterfly", "lambda", "few queries"],
)
def test_equals_the_definition_over_several_tiles(shape, mask):
    assert_matches_definition(inputs(*shape), mask=mask)


@pytest.mark.slow
def test_equals_the_definition_over_packed_documents():
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(1, 9, (2, 600)), axis=1).astype(np.int32)
    assert_matches_definition(
        inputs(2, 600, 600, 2, 1, 16, 16), mask=masks.Causal() & masks.Segments(ids)
    )


@pytest.mark.parametrize(
    "head_dim", [pytest.param(n, marks=pytest.mark.slow) for n in (16, 80, 96, 128, 256)]
)
def test_head_dims(head_dim):
    arrays = inputs(1, 70, 70, 2, 1, head_dim, head_dim)
    assert_matches_definition(arrays, mask=masks.Causal())


def test_hand_value():
    """Logits ln 1, ln 2, ln 5 and values 1, 2, 4: o = 25/8, lse = ln 8 (FlashAttention card)."""
    q = np.ones((1, 1, 1, 1), np.float32)
    k = np.log(np.float32([1, 2, 5])).reshape(1, 3, 1, 1)
    v = np.float32([1, 2, 4]).reshape(1, 3, 1, 1)
    o, lse = attention(*map(jnp.asarray, (q, k, v)), scale=1.0, return_lse=True)
    assert o.item() == pytest.approx(3.125, rel=1e-6)
    assert lse.item() == pytest.approx(np.log(8), rel=1e-6)


# 99 mirrors 1, and so needs no other program.
@pytest.mark.parametrize(
    "split", [1, 99, *(pytest.param(n, marks=pytest.mark.slow) for n in (37, 64))]
)
def test_two_halves_of_the_keys_merge_to_the_whole(split):
    q, k, v, _ = (None if x is None else np.asarray(x) for x in inputs(2, 20, 100, 4, 2, 16, 16))
    parts = [
        attention(*map(jnp.asarray, (q, k[:, s], v[:, s])), return_lse=True)
        for s in (slice(split), slice(split, None))
    ]
    for x, y in zip(merged(*parts[0], *parts[1]), definition(q, k, v), strict=False):
        np.testing.assert_allclose(x, y, atol=1e-5)


merged = jax.jit(merge_partials)


def test_the_empty_set_is_the_identity_of_merging():
    o, lse = np.ones((2, 3, 4), np.float32), np.ones((2, 3), np.float32)
    none = np.zeros_like(o), np.full_like(lse, -np.inf)
    for pair in ((o, lse, *none), (*none, o, lse)):
        both, both_lse = merged(*pair)
        np.testing.assert_array_equal(both, o)
        np.testing.assert_array_equal(both_lse, lse)
    both, both_lse = merged(*none, *none)
    assert not np.any(both) and np.isneginf(both_lse).all()


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 4), (2, 3), (2, 3, 4), (2, 4)),
        ((2, 3, 4), (2, 3), (2, 3, 5), (2, 3)),
        ((2, 3, 4), (2, 4), (2, 3, 4), (2, 4)),
        ((2, 3, 4), (3,), (2, 3, 4), (3,)),
        ((1, 3, 4), (1, 3), (2, 3, 4), (2, 3)),
        ((), (), (), ()),
    ],
)
def test_partial_results_that_do_not_fit_are_not_merged(shapes):
    with pytest.raises(ValueError, match=r"merge_partials takes o \[..., P\] and lse"):
        merge_partials(*map(jnp.zeros, shapes))


def test_constant_values_have_no_gradient_in_queries_and_keys():
    q, k, *_ = inputs(1, 50, 50, 2, 1, 16, 16)
    o, _, dq, dk, _ = causal(q, k, np.ones((1, 50, 1, 16), np.float32), q)
    np.testing.assert_allclose(o, 1.0, atol=1e-6)
    for g in (dq, dk):
        np.testing.assert_allclose(g, 0.0, atol=1e-5)


def test_extreme_inputs_stay_finite():
    q, k, v = (np.asarray(x) for x in inputs(1, 50, 50, 2, 1, 16, 16)[:3])
    assert all(np.isfinite(x).all() for x in causal(1e4 * q, 1e4 * k, v, np.ones_like(q)))


def test_last_query_alone_is_the_last_row():
    q, k, v = (np.asarray(x) for x in inputs(2, 100, 100, 4, 2, 16, 16)[:3])
    run = lambda *x: attention(*map(jnp.asarray, x), mask=masks.Causal())
    whole, last = np.asarray(run(q, k, v)), run(q[:, -1:], k, v)
    np.testing.assert_allclose(last, whole[:, -1:], atol=1e-6)


def test_grouped_heads_are_repeated_keys_and_values():
    q, k, v = (np.asarray(x) for x in inputs(1, 40, 40, 6, 2, 16, 16)[:3])
    run = lambda *x: attention(*map(jnp.asarray, x), mask=masks.Causal())
    repeat = lambda x: np.repeat(x, 3, axis=2)
    np.testing.assert_allclose(run(q, k, v), run(q, repeat(k), repeat(v)), atol=1e-6)


def test_traced_offset_equals_static():
    q, k, v, _ = inputs(1, 33, 80, 2, 1, 16, 16)
    run = lambda offset: attention(q, k, v, mask=masks.Causal(), q_offset=offset)
    traced = jax.jit(run)
    np.testing.assert_allclose(traced(5), run(5), atol=1e-6)
    for offset in (0, 5, 47):
        want = definition(q, k, v, mask=masks.Causal(), q_offset=offset)[0]
        np.testing.assert_allclose(traced(offset), want, atol=2e-6)


def test_rows_without_keys_are_zero_and_have_no_gradient():
    q, k, v, _ = inputs(1, 50, 20, 2, 1, 16, 16)
    o, lse, *grads = map(np.asarray, causal(q, k, v, q))
    assert not o[:, :30].any() and np.isneginf(lse[:, :30]).all()
    assert np.isfinite(lse[:, 30:]).all()
    assert all(np.isfinite(g).all() for g in grads)
    assert not grads[0][:, :30].any() and grads[0][:, 31:].any()


@pytest.mark.parametrize("scale", [None, pytest.param(1.0, marks=pytest.mark.slow)])
def test_sums_over_queries_are_as_exact_as_those_of_whole_rows(scale):
    """dv of positive inputs: 256 weights of a column that are all off by their row's rounding."""
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.uniform(1, 2, (1, 256, 4, 64)).astype(np.float32) for _ in range(4))
    k, v = k[:, :, :1], v[:, :, :1]
    want = reference.attention_and_gradients(q, k, v, do, np.zeros((1, 256, 4)), scale=scale)[4]

    @jax.jit
    def error(q, k, v, do):
        ops = attention, jax.nn.dot_product_attention
        found = [jax.vjp(functools.partial(op, scale=scale), q, k, v)[1](do)[2] for op in ops]
        return [jnp.abs(x - want).max() for x in found]

    ours, whole = error(q, k, v, do)
    assert ours < 2 * whole and ours < 1e-5 * np.abs(want).max()


@pytest.mark.slow
def test_vmap_is_a_batch():
    q, k, v, _ = inputs(3, 40, 40, 2, 1, 16, 16)
    one = lambda q, k, v: attention(q[None], k[None], v[None], mask=masks.Causal())[0]
    want = definition(q, k, v, mask=masks.Causal())[0]
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(q, k, v), want, atol=2e-6)


@functools.cache
def many_rows_and_heads():
    """q, k, v, do, of several tiles each."""
    arrays = inputs(4, 300, 300, 4, 2, 16, 16)
    return *arrays[:3], cotangents(arrays)[0]


def test_same_bits_twice():
    arrays = many_rows_and_heads()
    for a, b in zip(causal(*arrays), causal(*arrays), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_shard_map_over_batch_and_heads_is_the_whole():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("data", None, "tensor")
    attend = jax.shard_map(
        functools.partial(attention, mask=masks.Causal()),
        mesh=mesh, in_specs=(spec,) * 3, out_specs=spec,
    )  # fmt: skip

    @jax.jit
    def sharded(q, k, v, do):
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(do)

    arrays = many_rows_and_heads()
    o, _, *grads = causal(*arrays)
    got_o, *got = sharded(*arrays)
    np.testing.assert_allclose(got_o, o, atol=1e-6)
    for a, b in zip(got, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_shard_map_sums_the_gradient_of_a_bias_that_devices_share():
    arrays = inputs(4, 40, 40, 2, 1, 16, 16, bias=(1, 2, 40, 40))
    do, _ = cotangents(arrays)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    run = lambda q, k, v, bias: attention(q, k, v, bias=bias, mask=masks.Causal())
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 3 + (whole,), out_specs=rows)
    gradient = jax.jit(lambda bias: jax.vjp(lambda b: sharded(*arrays[:3], b), bias)[1](do)[0])
    want = definition(*arrays, do, mask=masks.Causal())[5]
    np.testing.assert_allclose(gradient(arrays[3]), want, atol=1e-5)


# The others are slow.
QUICK = [(masks.Causal(), True)]


@pytest.mark.parametrize(
    "mask, backward",
    QUICK
    + [
        pytest.param(mask, backward, marks=pytest.mark.slow)
        for mask in (masks.Full(), masks.Causal(), masks.SlidingWindow(100), masks.Lambda(4, 100))
        for backward in (False, True)
        if (mask, backward) not in QUICK
    ],
    ids=str,
)
def test_memory_is_linear_in_the_length(mask, backward):
    """No T x T buffer, nor copies of operands: what grows is dq, dk, dv and sums of rows."""

    def run(q, k, v, do):
        o, pull = jax.vjp(functools.partial(attention, mask=mask), q, k, v)
        return pull(do) if backward else o

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)
        return jax.jit(run).lower(x, x, x, x).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(16384), temporaries(32768)  # of tiles of one size
    assert large <= 2.2 * small
    operands = (large - small) / (16384 * 2 * 32 * 4)  # as many as grow with the length
    assert operands <= (3.2 if backward else 0.2), f"{operands:.2f} operands"


@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(20)], ids=repr)
def test_decode_attention_equals_attention(mask):
    q, k, v = (np.asarray(x) for x in inputs(3, 2, 300, 4, 2, 16, 16)[:3])
    lengths = np.asarray([2, 150, 300], np.int32)
    got = jax.jit(functools.partial(decode_attention, mask=mask))(q, k, v, lengths=lengths)
    for b, n in enumerate(lengths):
        want = definition(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], mask=mask)[0]
        np.testing.assert_allclose(got[b : b + 1], want, atol=1e-5)


Q = np.zeros((2, 8, 4, 16), jnp.float32)
KV = np.zeros((2, 8, 2, 16), jnp.float32)


@pytest.mark.parametrize(
    "arrays, options, error, words",
    [
        ((Q, KV[:, :, :1].repeat(3, 2), KV[:, :, :1].repeat(3, 2)), {}, ValueError, "4 heads"),
        ((np.zeros((2, 4, 100, 16)), *[np.zeros((2, 2, 60, 16))] * 2), {}, ValueError, "do not"),
        ((Q, KV, KV), {"implementation": "triton"}, ValueError, "implementation='triton'"),
        ((Q, KV, KV), {"bias": np.zeros((4, 3, 8))}, ValueError, "bias"),
        ((Q, KV, KV), {"bias": np.zeros((8, 8), bool)}, TypeError, "mask="),
        ((Q, KV, KV), {"logit_cap": -1.0}, ValueError, "logit_cap"),
        ((Q, KV, KV), {"mask": "causal"}, TypeError, "mask"),
        ((Q.astype(int), KV, KV), {}, TypeError, "floating"),
        ((Q, KV.astype(jnp.bfloat16), KV), {}, TypeError, "one dtype"),
        ((Q, KV, KV[:, :4]), {}, ValueError, "time"),
        ((Q, KV, KV), {"mask": masks.Segments(np.zeros((2, 5), int))}, ValueError, "Segments"),
        ((Q, KV, KV), {"mask": masks.BlockSparse(np.eye(3) > 0, 4)}, ValueError, r"\[2, 2\]"),
        ((Q, Q, Q), {"mask": masks.Segments(np.zeros((2, 4), int))}, ValueError, "time swapped"),
        ((Q, KV, KV), {"q_offset": jnp.float32(2.0)}, TypeError, "q_offset must be an integer"),
        ((Q, KV, KV), {"logit_cap": np.inf}, ValueError, "logit_cap must be finite"),
        ((Q, KV, KV), {"scale": np.nan}, ValueError, "scale must be finite, got nan"),
        ((Q, KV, KV), {"scale": jnp.float32(np.inf)}, ValueError, "scale must be finite, got inf"),
        ((Q, KV, KV), {"scale": "x"}, TypeError, "scale must be a number or None, got 'x'"),
        ((Q, KV, KV), {"scale": True}, TypeError, "scale must be a number or None, got True"),
        ((Q, KV, KV), {"scale": np.ones(3)}, ValueError, r"scale must be one number, got .*\(3,"),
        (([1.0], KV, KV), {}, TypeError, r"q is of type list: give jnp.asarray\(q\)"),
        ((Q, KV, [[2]]), {}, TypeError, "attention takes arrays, and v is of type list"),
        ((np.zeros((2, 128, 7, 16)), *[np.zeros((2, 128, 2, 16))] * 2), {}, ValueError, "P]$"),
        ((np.zeros((2, 4, 99, 16)), *[np.zeros((2, 2, 60, 16))] * 2), {}, ValueError, "swapaxes"),
        ((Q, KV, KV), {"q_offset": np.zeros(2, int)}, ValueError, "q_offset must be a scalar"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arrays, options, error, words):
    with pytest.raises(error, match=words):
        attention(*arrays, **options)


def test_pallas_on_a_cpu_says_what_would_work():
    with pytest.raises(ValueError, match='implementation="xla"'):
        jax.jit(functools.partial(attention, implementation="pallas"))(Q, KV, KV)


def test_the_platform_is_chosen_when_lowering():
    """A step traced on a CPU holds the TPU kernel when it is lowered for a TPU."""
    x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
    traced = jax.jit(functools.partial(attention, mask=masks.Causal())).trace(x, x, x)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_float32_stays_float32_where_float64_is_enabled():
    q, k, v, _ = inputs(1, 70, 70, 2, 2, 8, 8)
    with jax.enable_x64(True):
        got = causal(q, k, v, q)
    for x, y in zip(got, definition(q, k, v, None, q, mask=masks.Causal())[:5], strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=1e-5)
