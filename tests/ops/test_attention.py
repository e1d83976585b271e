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
    arrays = [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]
    return arrays if bias else [*arrays, None]


def values_and_gradients(f, arrays, seed=1):
    """o, lse and the gradients of a random function of both."""
    arrays = [a for a in arrays if a is not None]

    def loss(*arrays):
        o, lse = f(*arrays)
        rng = np.random.default_rng(seed)
        w = jnp.asarray(rng.integers(-3, 4, o.shape), o.dtype)  # exact in bfloat16
        w_lse = jnp.asarray(rng.integers(-3, 4, lse.shape), lse.dtype)
        lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return (o * w).sum() + (lse * w_lse).sum().astype(o.dtype), (o, lse)

    grads, (o, lse) = jax.jit(jax.grad(loss, range(len(arrays)), has_aux=True))(*arrays)
    return o, lse, *grads


def test_works_where_float64_is_enabled():
    with jax.enable_x64(True):
        arrays = inputs(1, 300, 300, 2, 1, 16, 16, dtype="float64", bias=(1, 2, 300, 300))
        run = functools.partial(attention, mask=masks.Causal())
        loss = lambda f: lambda q, k, v, bias: (f(q, k, v, bias=bias) ** 2).sum()
        dense = functools.partial(reference.attention, mask=masks.Causal())
        got = jax.jit(jax.grad(loss(run), range(4)))(*arrays)
        want = jax.jit(jax.grad(loss(dense), range(4)))(*arrays)
        for x, y in zip(got, want, strict=True):
            assert x.dtype == jnp.float64
            np.testing.assert_allclose(x, y, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_reference_is_an_implementation(dtype):
    with jax.enable_x64(dtype == "float64"):
        *arrays, bias = inputs(2, 5, 9, 4, 2, 16, 24, dtype=dtype, bias=(1, 4, 5, 9))
        options = dict(mask=masks.Causal(), bias=bias, logit_cap=3.0, return_lse=True)
        forms = {"attention": functools.partial(attention, implementation="reference")}
        forms["reference"] = reference.attention
        for offset, scale in ((None, None), (jnp.int32(2), 0.3)):
            options |= dict(q_offset=offset, scale=scale)
            (o, lse), (want, want_lse) = (f(*arrays, **options) for f in forms.values())
            assert o.dtype == arrays[0].dtype and lse.dtype == want.dtype
            np.testing.assert_array_equal(o, want.astype(o.dtype))
            np.testing.assert_array_equal(lse, want_lse)
        alone = attention(*arrays, implementation="reference")
        np.testing.assert_allclose(
            alone, attention(*arrays), atol=1e-2 if dtype[0] == "b" else 1e-5
        )


def assert_matches_reference(arrays, **options):
    """attention == the dense definition in float64, forward and backward."""
    dtype = arrays[0].dtype.name
    names = ("o", "lse", "dq", "dk", "dv", "dbias")

    def call(op, q, k, v, bias=None):
        return op(q, k, v, bias=bias, return_lse=True, **options)

    got = values_and_gradients(functools.partial(call, attention), arrays)
    with jax.enable_x64(True):
        exact = [a if a is None else jnp.asarray(np.asarray(a, np.float64)) for a in arrays]
        want = values_and_gradients(functools.partial(call, reference.attention), exact)
        want = [np.asarray(y) for y in want]
    assert all(y.dtype == np.float64 for y in want)
    for name, x, y in zip(names, got, want, strict=False):
        x = np.asarray(x, np.float64)
        error = np.max(np.abs(np.where(x == y, 0.0, x - y)))  # -inf - -inf is NaN
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


@hypothesis.settings(max_examples=5, phases=[hypothesis.Phase.generate])
@hypothesis.given(problems())
def test_equals_the_definition(problem):
    shape, mask, offset, bias, cap, dtype = problem
    arrays = inputs(*shape, dtype=dtype, bias=bias)
    assert_matches_reference(arrays, mask=mask, q_offset=offset, logit_cap=cap)


@pytest.mark.parametrize(
    "shape, mask",
    [
        ((1, 700, 700, 4, 2, 32, 32), masks.Causal()),
        ((2, 300, 600, 2, 1, 32, 48), masks.SlidingWindow(100)),
        ((1, 512, 512, 2, 2, 16, 16), masks.BlockSparse(masks.butterfly(16), 32)),
        ((1, 600, 600, 2, 2, 16, 16), masks.Lambda(4, 64)),
        ((2, 5, 1000, 4, 1, 16, 16), masks.Causal()),
    ],
    ids=["causal", "window", "butterfly", "lambda", "few queries"],
)
def test_equals_the_definition_over_several_tiles(shape, mask):
    assert_matches_reference(inputs(*shape), mask=mask)


def test_equals_the_definition_over_packed_documents():
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(1, 9, (2, 600)), axis=1).astype(np.int32)
    assert_matches_reference(
        inputs(2, 600, 600, 2, 1, 16, 16), mask=masks.Causal() & masks.Segments(ids)
    )


@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 256])
def test_head_dims(head_dim):
    arrays = inputs(1, 70, 70, 2, 1, head_dim, head_dim)
    assert_matches_reference(arrays, mask=masks.Causal())


def test_hand_value():
    """Logits ln 1, ln 2, ln 5 and values 1, 2, 4: o = 25/8, lse = ln 8 (FlashAttention card)."""
    q = jnp.ones((1, 1, 1, 1), jnp.float32)
    k = jnp.log(jnp.asarray([1.0, 2.0, 5.0], jnp.float32)).reshape(1, 3, 1, 1)
    v = jnp.asarray([1.0, 2.0, 4.0], jnp.float32).reshape(1, 3, 1, 1)
    o, lse = attention(q, k, v, scale=1.0, return_lse=True)
    assert float(o[0, 0, 0, 0]) == pytest.approx(3.125, rel=1e-6)
    assert float(lse[0, 0, 0]) == pytest.approx(np.log(8), rel=1e-6)


@pytest.mark.parametrize("split", [1, 37, 64, 99])
def test_two_halves_of_the_keys_merge_to_the_whole(split):
    q, k, v, _ = inputs(2, 20, 100, 4, 2, 16, 16)
    whole, whole_lse = attention(q, k, v, return_lse=True)
    parts = [
        attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(split), slice(split, None))
    ]
    o, lse = merge_partials(*parts[0], *parts[1])
    np.testing.assert_allclose(o, whole, atol=1e-5)
    np.testing.assert_allclose(lse, whole_lse, atol=1e-5)


def test_the_empty_set_is_the_identity_of_merging():
    o, lse = jnp.ones((2, 3, 4)), jnp.ones((2, 3))
    none = jnp.zeros((2, 3, 4)), jnp.full((2, 3), -jnp.inf)
    for pair in ((o, lse, *none), (*none, o, lse)):
        merged, merged_lse = merge_partials(*pair)
        np.testing.assert_array_equal(merged, o)
        np.testing.assert_array_equal(merged_lse, lse)
    merged, merged_lse = merge_partials(*none, *none)
    assert not merged.any() and np.isneginf(merged_lse).all()


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
    q, k, _, _ = inputs(1, 50, 50, 2, 1, 16, 16)
    v = jnp.ones((1, 50, 1, 16), jnp.float32)
    run = lambda q, k: attention(q, k, v, mask=masks.Causal())
    np.testing.assert_allclose(run(q, k), 1.0, atol=1e-6)
    for g in jax.grad(lambda q, k: (run(q, k) * q).sum() - q.sum(), (0, 1))(q, k):
        np.testing.assert_allclose(g, 0.0, atol=1e-5)


def test_bias_gradient_sums_to_zero_over_keys():
    q, k, v, bias = inputs(1, 30, 40, 2, 1, 16, 16, bias=(1, 2, 30, 40))
    w = jnp.asarray(np.random.default_rng(3).standard_normal(q.shape), q.dtype)
    g = jax.grad(lambda b: (attention(q, k, v, bias=b) * w).sum())(bias)
    assert jnp.abs(g).max() > 1e-3
    np.testing.assert_allclose(g.sum(-1), 0.0, atol=1e-5)


def test_last_query_alone_is_the_last_row():
    q, k, v, _ = inputs(2, 100, 100, 4, 2, 16, 16)
    whole = attention(q, k, v, mask=masks.Causal())
    last = attention(q[:, -1:], k, v, mask=masks.Causal())
    np.testing.assert_allclose(last, whole[:, -1:], atol=1e-6)


def test_grouped_heads_are_repeated_keys_and_values():
    q, k, v, _ = inputs(1, 40, 40, 6, 2, 16, 16)
    repeat = lambda x: jnp.repeat(x, 3, axis=2)
    np.testing.assert_allclose(
        attention(q, k, v, mask=masks.Causal()),
        attention(q, repeat(k), repeat(v), mask=masks.Causal()),
        atol=1e-6,
    )


def test_traced_offset_equals_static():
    q, k, v, _ = inputs(1, 33, 80, 2, 1, 16, 16)
    run = lambda offset: attention(q, k, v, mask=masks.Causal(), q_offset=offset)
    for offset in (0, 5, 47):
        np.testing.assert_allclose(jax.jit(run)(offset), run(offset), atol=1e-6)


def test_rows_without_keys_are_zero_and_have_no_gradient():
    q, k, v, _ = inputs(1, 50, 20, 2, 1, 16, 16)
    run = lambda q, k, v: attention(q, k, v, mask=masks.Causal(), return_lse=True)
    o, lse = run(q, k, v)
    assert not o[:, :30].any() and np.isneginf(lse[:, :30]).all()
    assert np.isfinite(lse[:, 30:]).all()
    grads = jax.grad(lambda *a: (run(*a)[0] ** 2).sum(), (0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)
    assert not grads[0][:, :30].any() and grads[0][:, 31:].any()


def test_extreme_inputs_stay_finite():
    q, k, v, _ = inputs(1, 65, 65, 2, 1, 16, 16)
    run = lambda q, k, v: attention(q, k, v, mask=masks.Causal(), return_lse=True)
    args = (1e4 * q, 1e4 * k, v)
    o, lse = run(*args)
    grads = jax.grad(lambda *a: run(*a)[0].sum(), (0, 1, 2))(*args)
    assert all(np.isfinite(x).all() for x in (o, lse, *grads))


@pytest.mark.parametrize("scale", [None, 1.0])
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


def test_same_bits_twice():
    arrays = inputs(2, 300, 300, 4, 2, 32, 32)[:3]
    run = jax.jit(
        jax.value_and_grad(lambda *a: attention(*a, mask=masks.Causal()).sum(), (0, 1, 2))
    )
    for a, b in zip(jax.tree.leaves(run(*arrays)), jax.tree.leaves(run(*arrays)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_vmap_is_a_batch():
    q, k, v, _ = inputs(3, 40, 40, 2, 1, 16, 16)
    one = lambda q, k, v: attention(q[None], k[None], v[None], mask=masks.Causal())[0]
    np.testing.assert_allclose(
        jax.vmap(one)(q, k, v), attention(q, k, v, mask=masks.Causal()), atol=1e-6
    )


def test_shard_map_over_batch_and_heads_is_the_whole():
    q, k, v, _ = inputs(4, 300, 300, 4, 2, 16, 16)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("data", None, "tensor")
    run = lambda q, k, v: attention(q, k, v, mask=masks.Causal())
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    loss = lambda f: lambda *a: (f(*a) ** 2).sum()
    np.testing.assert_allclose(jax.jit(sharded)(q, k, v), run(q, k, v), atol=1e-6)
    for a, b in zip(
        jax.jit(jax.grad(loss(sharded), (0, 1, 2)))(q, k, v),
        jax.grad(loss(run), (0, 1, 2))(q, k, v),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_shard_map_sums_the_gradient_of_a_bias_that_devices_share():
    q, k, v, bias = inputs(4, 40, 40, 2, 1, 16, 16, bias=(1, 2, 40, 40))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    run = lambda q, k, v, bias: attention(q, k, v, bias=bias, mask=masks.Causal())
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 3 + (whole,), out_specs=rows)
    gradient = lambda f: jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), 3))(q, k, v, bias)
    np.testing.assert_allclose(gradient(sharded), gradient(run), atol=1e-5)


@pytest.mark.parametrize(
    "mask", [masks.Full(), masks.Causal(), masks.SlidingWindow(100), masks.Lambda(4, 100)], ids=repr
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_is_linear_in_the_length(mask, backward):
    """Doubling the length doubles temporaries; a T x T buffer would make them four times."""

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)
        run = lambda q, k, v: attention(q, k, v, mask=mask).sum()
        run = jax.grad(run, (0, 1, 2)) if backward else run
        return jax.jit(run).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(8192), temporaries(16384)
    assert large <= 2.2 * small
    assert large < 16384 * 16384  # a quarter of one head's scores


@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(20)], ids=repr)
def test_decode_attention_equals_attention(mask):
    q, k, v, _ = inputs(3, 2, 300, 4, 2, 16, 16)
    lengths = jnp.asarray([2, 150, 300], jnp.int32)
    got = decode_attention(q, k, v, lengths=lengths, mask=mask)
    for b, n in enumerate([2, 150, 300]):
        want = attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], mask=mask)
        np.testing.assert_allclose(got[b : b + 1], want, atol=1e-5)


Q = jnp.zeros((2, 8, 4, 16), jnp.float32)
KV = jnp.zeros((2, 8, 2, 16), jnp.float32)


@pytest.mark.parametrize(
    "arrays, options, error, words",
    [
        ((Q, KV[:, :, :1].repeat(3, 2), KV[:, :, :1].repeat(3, 2)), {}, ValueError, "4 heads"),
        ((jnp.zeros((2, 4, 100, 16)), *[jnp.zeros((2, 2, 60, 16))] * 2), {}, ValueError, "do not"),
        ((Q, KV, KV), {"implementation": "triton"}, ValueError, "implementation='triton'"),
        ((Q, KV, KV), {"bias": jnp.zeros((4, 3, 8))}, ValueError, "bias"),
        ((Q, KV, KV), {"bias": jnp.zeros((8, 8), bool)}, TypeError, "mask="),
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
        ((Q, KV, KV), {"scale": jnp.ones(3)}, ValueError, r"scale must be one number, got .*\(3,"),
        (([1.0], KV, KV), {}, TypeError, r"q is of type list: give jnp.asarray\(q\)"),
        ((Q, KV, [[2]]), {}, TypeError, "attention takes arrays, and v is of type list"),
        ((jnp.zeros((2, 128, 7, 16)), *[jnp.zeros((2, 128, 2, 16))] * 2), {}, ValueError, "P]$"),
        ((jnp.zeros((2, 4, 99, 16)), *[jnp.zeros((2, 2, 60, 16))] * 2), {}, ValueError, "swapaxes"),
        ((Q, KV, KV), {"q_offset": jnp.zeros(2, int)}, ValueError, "q_offset must be a scalar"),
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
    q, k, v = (jnp.asarray(np.random.default_rng(i).normal(size=(1, 70, 2, 8))) for i in range(3))
    run = lambda: jax.value_and_grad(lambda q: attention(q, k, v, mask=masks.Causal()).sum())(q)
    want = run()
    with jax.enable_x64(True):
        got = run()
    assert got[1].dtype == jnp.float32
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
