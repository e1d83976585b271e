"""Attention sharded over a mesh equals attention, and each device computes its shard of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tilescan.ops import masks, reference
from tilescan.ops.attention import attention
from tilescan.ops.partitioned import partitioned

T, D = 24, 8


def mesh_of(**sizes):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def arrays(B, H, G):
    shapes = [(B, T, heads, D) for heads in (H, G, G, H)]
    return [np.random.default_rng(i).standard_normal(s, np.float32) for i, s in enumerate(shapes)]


# B, H, G and the shape of a bias, on 2 x 4 devices for batch and heads.
CASES = {
    "multi-head": (4, 4, 4, (1, 4, T, T)),
    "two key-value heads": (4, 8, 2, (1, 8, 1, T)),
    "six key-value heads": (2, 12, 6, (2, 12, 1, T)),
    "multi-query": (2, 4, 1, (2, 1, 1, T)),
    "three heads on four devices": (2, 3, 3, (3, 1, T)),
    "three rows on two devices": (3, 4, 4, (1, 1)),
}


QUICK = ("three rows on two devices",)


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_values_and_gradients_are_those_of_the_whole(case):
    """Packed, causal, with a bias and a traced offset."""
    B, H, G, shape = CASES[case]
    q, k, v, do = arrays(B, H, G)
    bias = np.random.default_rng(4).standard_normal(shape, np.float32)
    ids = np.sort(np.random.default_rng(0).integers(1, 4, (B, T)), axis=1).astype(np.int32)

    @jax.jit
    def run(q, k, v, bias, ids, offset, do):
        def attend(*x):
            q, k, v, bias = x
            mask = masks.Causal() & masks.Segments(ids)
            options = dict(mask=mask, bias=bias, q_offset=offset, return_lse=True)
            return partitioned(attention, q, k, v, **options)

        (o, lse), pull = jax.vjp(attend, q, k, v, bias)
        return o, lse, *pull((do, jnp.ones_like(lse)))

    with jax.set_mesh(mesh_of(data=2, fsdp=1, sequence=1, tensor=4)):
        got = run(q, k, v, bias, ids, np.int32(0), do)
    want = reference.attention_and_gradients(
        q, k, v, do, np.ones(do.shape[:3]), bias=bias, mask=masks.Causal() & masks.Segments(ids)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def seen_by_a_device(mesh, B, H, G, bias=None, **options):
    """Shapes of q, k, segment ids and bias in one device's call of the op."""
    seen = {}

    def op(q, k, v, *, mask, bias, q_offset):
        ids = masks.segments_of(mask).q_ids
        seen.update(q=q.shape, k=k.shape, ids=ids.shape, bias=bias.shape, q_offset=q_offset)
        return q

    def run(q, k, v, ids, bias):
        mask = masks.Causal() & masks.Segments(ids)
        return partitioned(op, q, k, v, mask=mask, bias=bias, **options)

    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    q, k, ids = shape(B, T, H, D), shape(B, T, G, D), shape(B, T, dtype=jnp.int32)
    with jax.set_mesh(mesh):
        jax.eval_shape(run, q, k, k, ids, shape(*(bias or (1, H, T, T))))
    return seen


@pytest.mark.parametrize(
    ("sizes", "whole", "part"),
    [
        (dict(data=2, fsdp=2, tensor=2), (8, 4, 2), (2, 2, 1)),
        (dict(fsdp=8), (8, 4, 2), (1, 4, 2)),
        (dict(tensor=8), (2, 8, 8), (2, 1, 1)),
        (dict(data=2, tensor=4), (4, 8, 2), (2, 2, 1)),  # each device one of 2 heads
        (dict(data=2, tensor=4), (4, 12, 6), (2, 3, 3)),  # 1.5 of 6 heads: repeated
        (dict(data=2, tensor=4), (4, 16, 1), (2, 4, 1)),
        (dict(data=2, tensor=4), (4, 6, 2), (2, 6, 2)),  # 4 does not divide 6
        (dict(data=2, fsdp=4), (6, 4, 4), (3, 4, 4)),  # 2 divides 6, 8 does not
        (dict(data=4, sequence=2), (1, 4, 4), (1, 4, 4)),
    ],
    ids=str,
)
def test_each_device_gets_its_rows_and_heads(sizes, whole, part):
    seen = seen_by_a_device(mesh_of(**sizes), *whole)
    b, h, g = part
    assert seen["q"] == (b, T, h, D) and seen["k"] == (b, T, g, D)
    assert seen["ids"] == (b, T) and seen["bias"] == (1, h, T, T)


def test_dimensions_of_a_bias_that_are_broadcast_stay_so():
    mesh, sizes = mesh_of(data=2, tensor=4), (4, 4, 4)
    assert seen_by_a_device(mesh, *sizes, bias=(4, 1, 1, T))["bias"] == (2, 1, 1, T)
    assert seen_by_a_device(mesh, *sizes, bias=(4, T, 1))["bias"] == (1, T, 1)
    assert seen_by_a_device(mesh, *sizes, bias=(T, T))["bias"] == (T, T)


def test_an_offset_known_when_tracing_stays_known():
    mesh = mesh_of(data=2, tensor=4)
    assert seen_by_a_device(mesh, 4, 4, 4)["q_offset"] is None
    assert seen_by_a_device(mesh, 4, 4, 4, q_offset=3)["q_offset"] == 3


def test_without_devices_to_share_the_work_the_op_is_called_as_it_is():
    q, k, v, _ = arrays(2, 4, 2)

    def op(*x, **options):
        assert x[0] is q and x[1] is k and x[2] is v
        assert options == dict(mask=masks.Full(), bias=None, q_offset=None, scale=2.0)
        return "called"

    assert partitioned(op, q, k, v, scale=2.0) == "called"
    one = jax.make_mesh((1, 1), ("data", "tensor"), devices=jax.devices()[:1])
    with jax.set_mesh(one):
        assert partitioned(op, q, k, v, scale=2.0) == "called"


def test_time_is_shared_by_our_attention_alone():
    q, k, v, _ = arrays(2, 4, 2)
    with jax.set_mesh(mesh_of(sequence=4)):
        with pytest.raises(ValueError, match="can't shard time over 4 devices"):
            partitioned(lambda *x, **options: x[0], q, k, v, sequence_parallel="ring")
        with pytest.raises(ValueError, match="'reference' is unknown to attention of shards"):
            partitioned(attention, q, k, v, sequence_parallel="ring", implementation="reference")


@pytest.mark.parametrize("axes", [("data", "tensor"), ("sequence",)], ids=str)
def test_inside_a_shard_map_only_the_other_axes_are_cut(axes):
    q, k, v, _ = arrays(4, 4, 4)
    spec = P("data", None, "tensor") if "data" in axes else P()
    mesh = mesh_of(data=2, sequence=2, tensor=2)
    run = functools.partial(partitioned, attention, mask=masks.Causal())
    outer = jax.shard_map(
        run, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, axis_names=set(axes)
    )
    with jax.set_mesh(mesh):
        got = jax.jit(outer)(q, k, v)
    want = reference.attention_and_gradients(
        q, k, v, np.zeros_like(q), np.zeros(q.shape[:3]), mask=masks.Causal()
    )[0]
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize(
    ("platform", "target"),
    [
        ("tpu", "tpu_custom_call"),
        pytest.param("cuda", "mosaic_gpu_v2", marks=pytest.mark.slow),
    ],
)
def test_lowers_to_kernels_on_each_device(platform, target):
    """Forward and gradient, for eight devices of a platform that is not here."""
    x = jax.ShapeDtypeStruct((4, 256, 4, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((4, 256, 1, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32)

    def loss(q, k, v, ids):
        mask = masks.Causal() & masks.Segments(ids)
        return partitioned(attention, q, k, v, mask=mask).astype(jnp.float32).sum()

    with jax.set_mesh(mesh_of(data=4, tensor=2)):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, kv, kv, ids)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    calls = re.findall(rf"custom_call @{target}\(.*", text)
    assert len(calls) == 3
    # One row and two heads of each device, in the platform's own layout.
    part = "1x2x256x64xbf16" if platform == "tpu" else "1x256x2x64xbf16"
    assert all(part in call for call in calls)
