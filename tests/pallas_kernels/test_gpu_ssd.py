"""The Mosaic GPU kernels of scans whose key dims share a decay: interpreted on a CPU against the
steps in float64, lowered for GPUs that are not attached, and compiled where a CUDA plugin is
installed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from tilescan.ops import chunked_scan_gpu, reference
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.ops.ssd import ssd
from tilescan.planning import aot_gpu

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
A100 = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
TOLERANCE = 1e-2  # of the largest entry; bfloat16 has 8 bits, float16 11
NAMES = ("o", "final_state", "dq", "dk", "dv", "dlog_decay", "dinitial_state")


def problem(T, heads, sizes, strength, dtype="bfloat16", seed=0):
    """Inputs and cotangents; `heads` are those of q, k, v and the decays (None: no decay)."""
    rng = np.random.default_rng(seed)
    H, (D, P) = max(h for h in heads if h), sizes
    normal = lambda shape, dtype="float32": jnp.asarray(rng.standard_normal(shape), dtype)
    q, k, v = (normal((1, T, n, F), dtype) for n, F in zip(heads[:3], (D, D, P), strict=True))
    a = np.zeros((1, T, 1, 1))
    if heads[3] is not None:
        a = -np.exp(rng.standard_normal((1, T, heads[3], 1)) + strength)
    a = jnp.asarray(a, jnp.float32)
    cotangents = normal((1, T, H, P), dtype), normal((1, H, D, P))
    return (q, k, v, a, normal((1, H, D, P))), cotangents


@jax.jit
def by_steps(inputs, cotangents):
    def steps(q, k, v, a, S):
        H = S.shape[1]
        q, k, v, a = (jnp.repeat(x, H // x.shape[2], 2) for x in (q, k, v, a))
        return reference.linear_attention(q, k, v, a[..., 0], scale=1.0, state=S)

    out, pullback = jax.vjp(steps, *inputs)
    return *out, *pullback(cotangents)


def expected(inputs, cotangents):
    """The results and gradients by steps in float64."""
    with jax.enable_x64(True):
        exact = lambda arrays: tuple(jnp.asarray(np.asarray(x, np.float64)) for x in arrays)
        return [np.asarray(x) for x in by_steps(exact(inputs), exact(cotangents))]


@jax.jit
def interpreted(inputs, cotangents):
    forward = chunked_scan_gpu.forward(*inputs, interpret=True)
    return *forward, *chunked_scan_gpu.backward(*inputs, *cotangents, interpret=True)


def check(inputs, cotangents):
    got = interpreted(inputs, cotangents)
    assert got[0].dtype == inputs[0].dtype and got[1].dtype == jnp.float32
    for x, like in zip(got[2:], inputs, strict=True):
        assert x.dtype == like.dtype and x.shape == like.shape
    for name, x, y in zip(NAMES, got, expected(inputs, cotangents), strict=True):
        error = np.max(np.abs(np.asarray(x, np.float64) - y))
        bound = TOLERANCE * max(np.max(np.abs(y)), 1e-6)
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


@pytest.mark.parametrize(
    ("T", "heads", "sizes", "strength", "dtype"),
    [
        pytest.param(5, (1, 1, 1, 1), (16, 16), 0.0, "bfloat16", marks=pytest.mark.slow),
        (130, (1, 1, 2, 2), (24, 80), -2.0, "bfloat16"),  # Mamba-2's heads; two tiles of values
        pytest.param(100, (2, 2, 1, 1), (128, 64), -4.0, "float16", marks=pytest.mark.slow),
        pytest.param(70, (2, 1, 1, None), (16, 16), 0.0, "bfloat16", marks=pytest.mark.slow),
        (130, (1, 1, 2, 2), (24, 80), 4.0, "bfloat16"),  # decays of e^-55 a step, and down to 0
    ],
)
def test_forward_and_backward_match_the_steps(T, heads, sizes, strength, dtype):
    check(*problem(T, heads, sizes, strength, dtype))


@pytest.mark.slow
def test_forgetting_at_any_step():
    inputs, cotangents = problem(100, (1, 1, 1, 1), (16, 16), -3.0)
    q, k, v, a, S = inputs
    check((q, k, v, a.at[:, jnp.array([0, 17, 64])].set(-jnp.inf), S), cotangents)


def lower(device, f, *shapes):
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def attention_gradient(**options):
    def loss(x, log_decay):
        o, S = gated_linear_attention(x, x, x, log_decay, **options)
        return o.astype(jnp.float32).sum() + S.sum()

    return jax.grad(loss)


X = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
BY_HEAD = jax.ShapeDtypeStruct((1, 128, 2), jnp.float32)
CALL = "custom_call @mosaic_gpu_v2"


def test_the_device_decides_where_none_is_asked_for():
    # The states and the backward walk; the forward pass is not needed for the gradient of a sum.
    assert lower(H100, attention_gradient(), X, BY_HEAD).count(CALL) >= 2
    assert CALL not in lower(A100, attention_gradient(), X, BY_HEAD)
    with pytest.raises(ValueError, match="not a Hopper"):
        lower(A100, attention_gradient(implementation="pallas"), X, BY_HEAD)


def test_mamba2_takes_the_kernel():
    dt, A = jax.ShapeDtypeStruct((1, 128, 2), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    group = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    run = lambda x, dt, A, B, C, ids: ssd(x, dt, A, B, C, segment_ids=ids, implementation="pallas")
    assert lower(H100, run, X, dt, A, group, group, ids).count(CALL) == 1


@pytest.mark.parametrize(
    ("x", "decay", "options", "message"),
    [
        (jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.float32), (1, 128, 2), {}, "bfloat16"),
        (jax.ShapeDtypeStruct((1, 128, 2, 192), jnp.bfloat16), (1, 128, 2), {}, "D=192"),
        (X, (1, 128, 2), {"chunk": 32}, "chunk=32"),
    ],
)
def test_what_has_no_kernel_takes_xla_or_says_why(x, decay, options, message):
    decay = jax.ShapeDtypeStruct(decay, jnp.float32)
    assert CALL not in lower(H100, attention_gradient(**options), x, decay)
    with pytest.raises(ValueError, match=f"{message}.*xla"):
        lower(H100, attention_gradient(implementation="pallas", **options), x, decay)


@pytest.mark.parametrize("kernel", ["ssd_forward", "ssd_states", "ssd_backward"])
def test_compiles_for_an_h100_without_spills(kernel):
    if aot_gpu.cuda_python() is None:
        pytest.skip("no CUDA plugin: name an interpreter with one by TILESCAN_CUDA_PYTHON")
    job = {"kernel": kernel, "batch": 1, "length": 1024, "heads": 4, "kv_heads": 1}
    job |= {"head_dim": 128, "value_dim": 128, "dtype": "bfloat16"}
    (report,) = aot_gpu.compile_jobs([job])[0]["kernels"]
    assert report["spill_stores"] == report["spill_loads"] == 0, report
    assert not report["warnings"] and report["loop"]["hgmma"] > 0
    assert report["shared_memory"] <= 232448
