"""The Mosaic GPU kernels of scans whose key dims have decays of their own: interpreted on a CPU
against the steps in float64, lowered for a GPU that is not attached, and compiled where a CUDA
plugin is installed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from tilescan.ops import chunked_scan_gpu, reference
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.planning import aot_gpu

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
TOLERANCE = 1e-2  # of the largest entry; bfloat16 has 8 bits
NAMES = ("o", "final_state", "dq", "dk", "dv", "dlog_decay", "dinitial_state")


def problem(T, heads, sizes, strength, dtype="bfloat16"):
    """Inputs and cotangents; `heads` are those of q, k, v and the decays.

    Log decays are -e^x with x normal around `strength`, which varies twice as much by dim.
    """
    rng = np.random.default_rng(0)
    H, (D, P) = max(heads), sizes
    normal = lambda shape, dtype="float32": jnp.asarray(rng.standard_normal(shape), dtype)
    q, k, v = (normal((1, T, n, F), dtype) for n, F in zip(heads[:3], (D, D, P), strict=True))
    draw = rng.standard_normal
    a = draw((1, T, heads[3], D)) + 2 * draw((1, 1, heads[3], D)) + strength
    a = jnp.asarray(-np.exp(a), jnp.float32)
    cotangents = normal((1, T, H, P), dtype), normal((1, H, D, P))
    return (q, k, v, a, normal((1, H, D, P))), cotangents


@jax.jit
def by_steps(inputs, cotangents):
    def steps(q, k, v, a, S):
        H = S.shape[1]
        q, k, v, a = (jnp.repeat(x, H // x.shape[2], 2) for x in (q, k, v, a))
        return reference.linear_attention(q, k, v, a, scale=1.0, state=S)

    out, pullback = jax.vjp(steps, *inputs)
    return *out, *pullback(cotangents)


def expected(inputs, cotangents):
    """The results and gradients by steps in float64."""
    with jax.enable_x64(True):
        exact = lambda arrays: tuple(jnp.asarray(np.asarray(x, np.float64)) for x in arrays)
        return [np.asarray(x) for x in by_steps(exact(inputs), exact(cotangents))]


@functools.cache
def interpreted():
    def run(inputs, cotangents):
        forward = chunked_scan_gpu.forward(*inputs, interpret=True)
        return *forward, *chunked_scan_gpu.backward(*inputs, *cotangents, interpret=True)

    return jax.jit(run)


def check(inputs, cotangents, tolerance=TOLERANCE):
    got = interpreted()(inputs, cotangents)
    assert got[0].dtype == inputs[0].dtype and got[1].dtype == jnp.float32
    for x, like in zip(got[2:], inputs, strict=True):
        assert x.dtype == like.dtype and x.shape == like.shape
    for name, x, y in zip(NAMES, got, expected(inputs, cotangents), strict=True):
        error = np.max(np.abs(np.asarray(x, np.float64) - y))
        bound = tolerance * max(np.max(np.abs(y)), 1e-6)
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


SMALL = (70, (2, 1, 1, 2), (16, 16))


# Decays a step of a median of e^-0.02; of e^-1; of e^-55, and down to 0.
@pytest.mark.slow
@pytest.mark.parametrize("strength", [-4.0, 0.0, 4.0])
def test_forward_and_backward_match_the_steps(strength):
    check(*problem(*SMALL, strength))


def test_forgetting_at_any_step_and_in_some_dims():
    """All results and gradients against the steps, with decays from none to 0."""
    (q, k, v, a, S), cotangents = problem(*SMALL, -3.0)
    a = np.array(a)
    a[:, [0, 17, 64]] = a[:, 40, :, ::2] = -np.inf
    a[:, :, 1, 3] = 0.0
    check((q, k, v, jnp.asarray(a), S), cotangents)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("T", "heads", "sizes", "strength", "dtype", "tolerance"),
    [
        (5, (1, 1, 1, 1), (16, 16), 0.0, "bfloat16", 1e-2),
        (130, (1, 1, 1, 1), (128, 128), -3.0, "bfloat16", 1e-2),
        (130, (2, 2, 1, 1), (80, 144), -1.0, "bfloat16", 1e-2),  # 3 tiles of values, one each
        (70, (1, 1, 1, 1), (16, 200), -3.0, "bfloat16", 1e-2),  # 4 tiles, two each
        (100, (2, 2, 2, 1), (64, 64), -5.0, "float16", 2e-3),
    ],
)
def test_other_shapes_match_the_steps(T, heads, sizes, strength, dtype, tolerance):
    check(*problem(T, heads, sizes, strength, dtype), tolerance)


def test_the_op_takes_the_kernels_in_both_passes():
    def loss(q, k, v, a, ids):
        o, S = gated_linear_attention(q, k, v, a, segment_ids=ids, implementation="pallas")
        return o.astype(jnp.float32).sum() + S.sum()

    q, k = (jax.ShapeDtypeStruct((1, 128, H, 64), jnp.bfloat16) for H in (4, 2))
    a = jax.ShapeDtypeStruct((1, 128, 4, 64), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        traced = jax.jit(jax.value_and_grad(loss, range(4))).trace(q, k, k, a, ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Scores and a walk; the scores again, both walks, and the gradients.
    assert text.count("custom_call @mosaic_gpu_v2") == 6


KERNELS = ("gla_scores", "gla_forward", "gla_states", "gla_back", "gla_gradients")


def test_compiles_for_an_h100_without_spills():
    if aot_gpu.cuda_python() is None:
        pytest.skip("no CUDA plugin: name an interpreter with one by TILESCAN_CUDA_PYTHON")
    job = {"batch": 1, "length": 1024, "heads": 4, "kv_heads": 2}
    job |= {"head_dim": 128, "value_dim": 128, "dtype": "bfloat16"}
    for report in aot_gpu.compile_jobs([job | {"kernel": kernel} for kernel in KERNELS]):
        (report,) = report["kernels"]
        assert report["spill_stores"] == report["spill_loads"] == 0, report
        assert not report["warnings"] and report["loop"]["hgmma"] > 0
        assert report["shared_memory"] <= 232448
