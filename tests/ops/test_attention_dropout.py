"""Dropout of attention's weights: bits of a counter, in every tiling, and on every device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tilescan.ops import masks, reference
from tilescan.ops.attention import attention
from tilescan.ops.partitioned import partitioned


def inputs(B=2, T=90, H=4, G=2, D=16, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = (B, T, H, D), (B, T, G, D), (B, T, G, D), (B, T, H, D), (B, T, H)
    return [jnp.asarray(rng.standard_normal(s).astype(dtype)) for s in shapes]


def assert_drops_as_the_reference(arrays, seed, tolerance=1e-5, **options):
    q, k, v, do, dlse = arrays

    @jax.jit
    def run(q, k, v, seed):
        f = lambda *x: attention(*x, dropout_seed=seed, return_lse=True, **options)
        out, pull = jax.vjp(f, q, k, v)
        return *out, *pull((do, dlse))

    want = reference.attention_and_gradients(q, k, v, do, dlse, dropout_seed=seed, **options)
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), run(q, k, v, seed), want, strict=False):
        error = np.abs(np.asarray(x, np.float64) - y).max()
        assert error <= tolerance * max(1.0, np.abs(y).max()), f"{name}: {error:.1e}"


@pytest.mark.parametrize("rate", [pytest.param(0.1, marks=pytest.mark.slow), 0.75])
def test_values_and_gradients_are_those_of_the_mask_as_an_array(rate):
    ids = jnp.asarray(np.arange(90)[None] // 40 + np.zeros((2, 1)), jnp.int32)
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((1, 4, 1, 90)), jnp.float32)
    options = dict(mask=masks.Causal() & masks.Segments(ids), bias=bias, dropout_rate=rate)
    assert_drops_as_the_reference(inputs(), np.uint32(2**32 - 7), logit_cap=3.0, **options)


def test_the_reference_as_an_implementation_drops_the_same():
    options = dict(mask=masks.Causal(), dropout_rate=0.3)
    q, k, v, do, dlse = inputs(T=20)
    by_reference = functools.partial(attention, implementation="reference", **options)
    for seed in (np.uint32(2**32 - 7), np.arange(8, dtype=np.int32).reshape(2, 4) - 5):
        got = jax.jit(lambda seed: by_reference(q, k, v, dropout_seed=seed))(seed)
        want = reference.attention_and_gradients(q, k, v, do, dlse, dropout_seed=seed, **options)
        np.testing.assert_allclose(got, want[0], atol=2e-6)


def test_tiles_of_a_long_sequence_and_seeds_of_every_head():
    seeds = np.random.default_rng(0).integers(-(2**31), 2**31, (1, 2)).astype(np.int32)
    arrays = inputs(B=1, T=700, H=2, G=1)
    assert_drops_as_the_reference(arrays, seeds, mask=masks.Causal(), dropout_rate=0.3)


def test_the_gradient_of_a_bias():
    q, k, v, do, dlse = inputs(B=1, T=30, H=2, G=2)
    bias = jnp.zeros((1, 2, 30, 30))
    options = dict(dropout_rate=0.4, dropout_seed=3)
    f = lambda bias: (attention(q, k, v, bias=bias, **options) * do).sum()
    want = reference.attention_and_gradients(q, k, v, do, 0 * dlse, bias=bias, **options)[5]
    np.testing.assert_allclose(jax.jit(jax.grad(f))(bias), want, atol=1e-5)


def test_the_mean_is_kept_and_rows_are_independent():
    rate = 0.3
    kept = reference.dropout_mask(rate, 11, (4, 4, 256, 256))
    deviation = (rate * (1 - rate) / 256**2) ** 0.5  # of the mean over one head
    assert np.abs(kept.mean((2, 3)) - (1 - rate)).max() < 4 * deviation
    for axis in range(4):  # neighbors in every direction, and another seed
        shifted = np.roll(kept, 1, axis=axis)
        assert abs(np.corrcoef(kept.ravel(), shifted.ravel())[0, 1]) < 5 / kept.size**0.5
    other = reference.dropout_mask(rate, 12, kept.shape)
    assert abs(np.corrcoef(kept.ravel(), other.ravel())[0, 1]) < 5 / kept.size**0.5
    q, k, v, *_ = inputs(B=4, T=256)
    o = attention(q, k, jnp.ones_like(v), dropout_rate=rate, dropout_seed=11)
    assert abs(float(o.mean()) - 1) < 0.01 and float(o.std()) > 0.01


def test_a_seed_says_all_and_lse_knows_nothing_of_it():
    q, k, v, do, dlse = inputs()
    run = jax.jit(
        lambda seed: attention(q, k, v, dropout_rate=0.5, dropout_seed=seed, return_lse=True)
    )
    o, lse = map(np.asarray, run(np.int32(5)))
    np.testing.assert_array_equal(run(np.uint8(5))[0], o)
    known = attention(q, k, v, dropout_rate=0.5, dropout_seed=5)
    np.testing.assert_allclose(known, o, atol=1e-6)
    assert (np.asarray(run(np.int32(6))[0]) != o).all(-1).mean() > 0.9
    want = reference.attention_and_gradients(q, k, v, do, 0 * dlse)[1]
    np.testing.assert_allclose(lse, want, atol=2e-6)


def test_rate_0_is_the_same_program():
    q, k, v, *_ = inputs()
    program = lambda **options: str(
        jax.make_jaxpr(functools.partial(attention, **options))(q, k, v)
    )
    assert program() == program(dropout_rate=0.0, dropout_seed=3) == program(dropout_rate=0)
    assert program() != program(dropout_rate=0.1, dropout_seed=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            dict(dropout_rate=1.0, dropout_seed=0),
            r"dropout_rate must be a number in \[0, 1\), got 1",
        ),
        (dict(dropout_rate=-0.1, dropout_seed=0), r"\[0, 1\), got -0.1"),
        (dict(dropout_rate=float("nan"), dropout_seed=0), r"\[0, 1\), got nan"),
        (dict(dropout_rate="0.1", dropout_seed=0), r"\[0, 1\), got '0.1'"),
        (dict(dropout_rate=0.1), "dropout_rate=0.1 needs dropout_seed"),
        (dict(dropout_rate=0.1, dropout_seed=0.5), r"integers \[B, H\] = \[2, 4\], got 0.5"),
        (dict(dropout_rate=0.1, dropout_seed=jax.random.key(0)), "jax.random.bits"),
        (dict(dropout_rate=0.1, dropout_seed=np.arange(2)), "dropout_seed must be"),
    ],
)
def test_bad_dropout_is_named(options, words):
    q, k, v, *_ = inputs()
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, **options)


def test_gpus_have_no_kernel_with_dropout():
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")

    def lowered(**options):
        call = functools.partial(attention, dropout_rate=0.1, dropout_seed=0, **options)
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return jax.jit(call).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()

    assert "mosaic_gpu" not in lowered()
    with pytest.raises(
        ValueError, match="dropout_rate above 0 has no kernel for GPUs.*None takes any"
    ):
        lowered(implementation="pallas")


@pytest.mark.parametrize(
    "kind", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit], ids=str
)
def test_devices_that_cut_rows_and_heads_drop_the_same(kind):
    q, k, v, *_ = inputs(B=4)
    options = dict(mask=masks.Causal(), dropout_rate=0.3)
    want = attention(q, k, v, dropout_seed=9, **options)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (kind,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("data", None, "tensor"))
        arrays = [jax.device_put(x, sharding) for x in (q, k, v)]
        run = jax.jit(lambda seed, *x: partitioned(attention, *x, dropout_seed=seed, **options))
        np.testing.assert_allclose(run(9, *arrays), want, atol=1e-6)
        if kind == AxisType.Explicit:
            got = jax.jit(lambda seed, *x: attention(*x, dropout_seed=seed, **options))(9, *arrays)
            np.testing.assert_allclose(got, want, atol=1e-6)


def test_devices_that_cut_time_refuse_by_name():
    q, k, v, *_ = inputs(B=1, T=64)
    mesh = jax.make_mesh((4,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="dropout_rate=0.3.*mesh.sequence = 1"):
        partitioned(
            attention, q, k, v, mask=masks.Causal(), sequence_parallel="ring", dropout_rate=0.3,
            dropout_seed=0,
        )  # fmt: skip
