"""Ops sharded over a mesh: what each device gets, and the kernels that it runs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tilescan.ops.explicit_axes import partitioned_by_dimensions
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.ops.linear_recurrence import linear_recurrence
from tilescan.ops.long_convolution import long_convolution
from tilescan.ops.selective_scan import selective_scan
from tilescan.ops.sequence_parallel.on_mesh import on_mesh
from tilescan.ops.ssd import ssd

B, T, H, E, N = 4, 16, 4, 8, 3


def mesh_of(**sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    axes = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axes, devices=devices)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def recurrence(**options):
    """Decays that all time shares, and a segment that starts on a device's first step."""
    ids = np.asarray([[1] * 9 + [2] * 8] * B, np.int32)
    if options.get("reverse"):
        ids = ids[:, ::-1]
    state = dict(initial_state=normal(2, B, E, N), segment_ids=ids)
    return (1 - 0.1 * normal(0, E, N) ** 2, normal(1, B, T, E, N)), state | options


def selective():
    x, dt, A = normal(0, B, T, E), normal(1, B, T, E) ** 2, -(normal(2, E, N) ** 2)
    Bs, Cs = normal(3, B, T, 2, N), normal(4, B, T, 2, N)
    return (x, dt, A, Bs, Cs), dict(initial_state=normal(5, B, E, N))


def one_group():
    """Keys and values that all heads share, and no decay."""
    return (normal(0, B, T, H, N), normal(1, B, T, 1, N), normal(2, B, T, 1, E), None), {}


def convolution(K):
    """A kernel that reaches the next device, or one that is sharded by channels."""
    return (normal(0, B, T, E), normal(1, K, E)), dict(initial_state=normal(2, B, K - 1, E))


CASES = {
    "recurrence": (linear_recurrence, recurrence()),
    "recurrence, backwards": (linear_recurrence, recurrence(reverse=True)),
    "selective scan of two groups": (selective_scan, selective()),
    "linear attention of one group": (gated_linear_attention, one_group()),
    "convolution": (long_convolution, convolution(5)),
    "long convolution": (long_convolution, convolution(16)),
}


# Scans, whose carry between devices the others show, and a kernel that "long convolution" exceeds.
LIKE_OTHERS = ("recurrence", "selective scan of two groups", "convolution")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in LIKE_OTHERS else ()) for n in CASES]
)
def test_every_axis_is_cut_at_once(name):
    op, (arrays, options) = CASES[name]
    given = {k: v for k, v in options.items() if isinstance(v, np.ndarray)}
    static = {k: v for k, v in options.items() if k not in given}
    run = lambda call: jax.jit(functools.partial(call, **static))(*arrays, **given)
    want = run(op)
    with jax.set_mesh(mesh_of(data=2, sequence=2, tensor=2)):
        got = run(functools.partial(on_mesh, op, "ring"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_without_devices_to_share_the_work_the_op_is_called_as_it_is():
    x = normal(0, B, 3, E)

    def op(*arrays, **options):
        assert arrays == (x,) and options == dict(initial_state=None, chunk=16)
        return "called"

    assert on_mesh(op, "ring", x, initial_state=None, chunk=16) == "called"
    with jax.set_mesh(mesh_of(data=1, sequence=1)):
        assert on_mesh(op, "ring", x, initial_state=None, chunk=16) == "called"


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (dict(data=2, fsdp=2, tensor=2), (1, T, 2, N)),
        (dict(fsdp=8), (B, T, H, N)),  # 8 does not divide 4 rows
        pytest.param(dict(data=2, sequence=4), (2, T // 4, H, N), marks=pytest.mark.slow),
        (dict(sequence=2, tensor=4), (B, T // 2, 1, N)),
        (dict(data=2, tensor=3), (2, T, H, N)),  # 3 does not divide 4 heads
    ],
    ids=str,
)
def test_each_device_gets_its_rows_heads_and_stretch(sizes, shape):
    (q, k, v, _), _ = one_group()
    with jax.set_mesh(mesh_of(**sizes)):
        run = jax.jit(functools.partial(on_mesh, gated_linear_attention, "chain"))
        text = run.lower(q, k, v).as_text()
    (arguments,) = re.findall(r"sdy.manual_computation.*manual_axes=\{.*?\} \((.*)\) \{", text)
    shapes = re.findall(r"tensor<([\dx]+)xf32>", arguments)
    of = lambda *shape: "x".join(map(str, shape))
    b, t, _, n = shape
    # A single key-value head is replicated.
    assert sorted(shapes) == sorted([of(*shape), of(b, t, 1, n), of(b, t, 1, E)])


@pytest.mark.parametrize(
    ("platform", "target"),
    [
        ("tpu", "tpu_custom_call"),
        pytest.param("cuda", "mosaic_gpu_v2", marks=pytest.mark.slow),
    ],
)
def test_devices_run_kernels_on_their_stretch(platform, target):
    """Forward and gradient of Mamba-2's scan, for devices of a platform that is not here."""
    T, P, N = 512, 64, 128
    bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    arrays = bf16(2, T, 4, P), f32(2, T, 4), f32(4), bf16(2, T, 1, N), bf16(2, T, 1, N)

    def loss(*arrays):
        return jnp.sum(on_mesh(ssd, "all_scan", *arrays)[0].astype(jnp.float32))

    with jax.set_mesh(mesh_of(data=2, sequence=4)):
        traced = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).trace(*arrays)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    calls = re.findall(rf"custom_call @{target}\(.*", text)
    # Between devices a TPU's states are flat.
    calls = [call for call in calls if '"all_scan"' not in call]
    assert calls and all(re.search(r"1x(4x)?128x", call) for call in calls)


def test_an_op_that_is_not_computed_over_time_is_refused():
    @partitioned_by_dimensions(("BTE",), x="BTE")
    def op(x):
        return (x,)

    x = normal(0, B, T, E)
    with jax.set_mesh(mesh_of(data=2)):
        assert jnp.all(on_mesh(op, "ring", x)[0] == x)
    with jax.set_mesh(mesh_of(sequence=2)), pytest.raises(ValueError, match="one of ssd, gated_"):
        on_mesh(op, "ring", x)
