"""Ops inside a user's own `jax.shard_map`, with its default check of manual axes.

What devices share (decays, biases, a state of zeros) must get the sum of their gradients.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tilescan.ops import masks
from tilescan.ops.attention import attention
from tilescan.ops.delta_rule import delta_rule, gated_delta_rule
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.ops.linear_recurrence import linear_recurrence
from tilescan.ops.long_convolution import long_convolution
from tilescan.ops.selective_scan import selective_scan
from tilescan.ops.short_convolution import short_convolution
from tilescan.ops.ssd import ssd

B, T, H, D = 4, 20, 2, 4


class Case(NamedTuple):
    call: object  # of (the devices' own arrays), (shared ones), segment_ids
    own: tuple
    shared: tuple = ()


def _ids(op, *arrays, ids, **options):
    return op(*arrays, segment_ids=ids, **options)[0]


HEADS = (B, T, H, D)
CASES = {
    "attention": Case(
        lambda q, k, v, ids: attention(q, k, v, mask=masks.Causal() & masks.Segments(ids)),
        (HEADS, HEADS, HEADS),
    ),
    "attention, a shared bias": Case(
        lambda q, k, v, bias, ids: attention(q, k, v, bias=bias), (HEADS,) * 3, ((1, H, T, T),)
    ),
    "ssd": Case(
        lambda x, dt, B, C, A, ids: ssd(x, dt, -jnp.exp(A), B, C, dt_softplus=True)[0],
        (HEADS, (B, T, H), (B, T, 1, D), (B, T, 1, D)),
        ((H,),),
    ),
    "ssd, packed": Case(
        lambda x, dt, B, C, A, ids: _ids(
            ssd, x, dt, -jnp.exp(A), B, C, dt_softplus=True, ids=ids
        ),
        (HEADS, (B, T, H), (B, T, 1, D), (B, T, 1, D)),
        ((H,),),
    ),
    "gated_linear_attention": Case(
        lambda q, k, v, d, ids: _ids(gated_linear_attention, q, k, v, -jnp.exp(d), ids=ids),
        (HEADS, HEADS, HEADS, HEADS),
    ),
    "delta_rule": Case(
        lambda q, k, v, b, ids: _ids(delta_rule, q, k / 4, v, jax.nn.sigmoid(b), ids=ids),
        (HEADS, HEADS, HEADS, (B, T, H)),
    ),
    "gated_delta_rule": Case(
        lambda q, k, v, b, d, ids: _ids(
            gated_delta_rule, q, k / 4, v, jax.nn.sigmoid(b), -jnp.exp(d), ids=ids
        ),
        (HEADS, HEADS, HEADS, (B, T, H), (B, T, H)),
    ),
    "selective_scan": Case(
        lambda x, dt, B, C, A, ids: _ids(
            selective_scan, x, dt, -jnp.exp(A), B, C, dt_softplus=True, ids=ids
        ),
        ((B, T, D), (B, T, D), (B, T, 3), (B, T, 3)),
        ((D, 3),),
    ),
    "linear_recurrence": Case(
        lambda a, b, ids: _ids(linear_recurrence, jax.nn.sigmoid(a), b, ids=ids),
        ((B, T, D), (B, T, D)),
    ),
    "short_convolution": Case(
        lambda x, w, ids: _ids(short_convolution, x, w, ids=ids), ((B, T, D),), ((3, D),)
    ),
    "short_convolution, many taps": Case(
        lambda x, w, ids: _ids(short_convolution, x, w, ids=ids), ((B, T, D),), ((9, D),)
    ),
    "long_convolution": Case(
        lambda u, kernel, ids: long_convolution(u, kernel)[0], ((B, T, D),), ((T, D),)
    ),
}  # fmt: skip
# Attention in a shard_map is also in test_attention.py; JAX differentiates the long convolution.
QUICK = ("ssd", "linear_recurrence")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_rows_on_devices_are_the_rows(name):
    case = CASES[name]
    rng = np.random.default_rng(0)
    make = lambda shapes: [rng.standard_normal(s, np.float32) for s in shapes]
    own, shared = make(case.own), make(case.shared)
    ids = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)

    def loss(own, shared, ids):
        y = case.call(*own, *shared, ids)
        return jnp.sum(jnp.sin(y)), y

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (_, want), want_gradients = jax.jit(run)(own, shared, ids)

    def part(own, shared, ids):
        (_, y), gradients = run(own, shared, ids)
        return y, gradients

    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("rows"), P(), P("rows")))
    got, gradients = jax.jit(mapped(part, out_specs=(P("rows"), (P("rows"), P()))))(
        own, shared, ids
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (gradients, want_gradients)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))


KERNELS = {
    "attention": (lambda q, k, v, ids: attention(
        q, k, v, mask=masks.Causal() & masks.Segments(ids), implementation="pallas"
    ), (4, 256, 2, 64)),
    "ssd": (lambda x, B, C, ids: ssd(
        x, jnp.ones(x.shape[:3], jnp.float32), -jnp.ones(2), B, C, implementation="pallas"
    )[0], (4, 256, 2, 64)),
    "gated_linear_attention": (lambda q, k, v, ids: gated_linear_attention(
        q, k, v, -jnp.ones(q.shape[:3], jnp.float32), implementation="pallas"
    )[0], (4, 256, 2, 64)),
}  # fmt: skip


# Kernels in a shard_map of ours: test_partitioned.py, sequence_parallel/test_on_mesh.py.
@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_lower_with_their_gradients(name, platform):
    call, shape = KERNELS[name]
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    own = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
    ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    gradients = jax.grad(lambda own, ids: jnp.sum(call(*own, ids).astype(jnp.float32)))
    mapped = jax.shard_map(gradients, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"))
    text = jax.jit(mapped).trace(own, ids).lower(lowering_platforms=(platform,)).as_text()
    assert {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}[platform] in text
