"""The Mosaic GPU attention kernels in interpret mode, against a float64 dense oracle."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hidden_values import assert_bias_hides, assert_hidden
from jax.sharding import AbstractDevice, AbstractMesh

from tilescan.ops import attention, attention_gpu, masks

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
A100 = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")


def oracle(q, k, v, do, dlse, visible, scale, logit_cap, bias=None):
    """(o, lse, dq, dk, dv, dbias) in float64 numpy; visible is bool [B, T, S]."""
    q, k, v, do, dlse = (np.asarray(x, np.float64) for x in (q, k, v, do, dlse))
    group = q.shape[2] // k.shape[2]
    kr, vr = np.repeat(k, group, 2), np.repeat(v, group, 2)
    logits = scale * np.einsum("bthd,bshd->bhts", q, kr)
    slope = np.ones_like(logits)
    if logit_cap is not None:
        tanh = np.tanh(logits / logit_cap)
        logits, slope = logit_cap * tanh, 1 - tanh**2
    bias = np.zeros((1, 1, 1, 1)) if bias is None else np.asarray(bias, np.float64)
    logits = np.where(visible[:, None], logits + bias, -np.inf)
    peak = np.maximum(logits.max(-1, keepdims=True), -1e300)
    weights = np.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    p = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    with np.errstate(divide="ignore"):
        lse = (peak + np.log(total))[..., 0]
    lse = np.where(total[..., 0] > 0, lse, -np.inf)
    o = np.einsum("bhts,bshd->bthd", p, vr)
    dp = np.einsum("bthd,bshd->bhts", do, vr)
    delta = np.einsum("bthd,bthd->bht", do, o)[..., None] - dlse.swapaxes(1, 2)[..., None]
    ds = p * (dp - delta)
    broadcast = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
    dbias = ds.sum(broadcast, keepdims=True)
    ds = ds * slope * scale
    B, S, G, _ = k.shape
    dk = np.einsum("bhts,bthd->bshd", ds, q).reshape(B, S, G, group, -1).sum(3)
    dv = np.einsum("bhts,bthd->bshd", p, do).reshape(B, S, G, group, -1).sum(3)
    return o, lse.swapaxes(1, 2), np.einsum("bhts,bshd->bthd", ds, kr), dk, dv, dbias


def close(name, got, want, bound=0.02):
    got, want = np.asarray(got, np.float64), np.asarray(want)
    finite = np.isfinite(want)
    assert np.array_equal(finite, np.isfinite(got)), name
    error = np.abs(got[finite] - want[finite]).max(initial=0)
    assert error <= bound * max(1.0, np.abs(want[finite]).max(initial=0)), (name, error)


PREFIX = masks.Prefix(30)
PACKED = masks.Segments(jnp.asarray([[1] * 60 + [2] * 70 + [0] * 10], jnp.int32))
CASES = {
    # mask, T, S, H, G, D, P, dtype, logit_cap, bias
    "full": (masks.Full(), 70, 130, 2, 2, 64, 64, jnp.bfloat16, None, None),
    "causal_grouped": (masks.Causal(), 140, 140, 2, 1, 64, 64, jnp.float16, None, None),
    "unseen_rows": (masks.Causal(), 90, 40, 1, 1, 64, 64, jnp.bfloat16, None, None),
    "window_capped": (masks.SlidingWindow(20, 5), 150, 150, 1, 1, 48, 48, jnp.bfloat16, 2.0, None),
    "prefix_lists": (masks.Causal() | PREFIX, 140, 140, 1, 1, 64, 64, jnp.bfloat16, None, None),
    "packed": (masks.Causal() & PACKED, 140, 140, 1, 1, 64, 64, jnp.bfloat16, None, None),
    # Above 128 dK and dV come from two kernels, of tiles of 32 queries or keys at 256.
    "wide": (masks.Causal(), 40, 70, 1, 1, 256, 256, jnp.bfloat16, None, None),
    "wide_keys": (masks.Causal(), 40, 40, 2, 1, 192, 80, jnp.bfloat16, 3.0, None),
    "bias": (masks.Full(), 60, 70, 2, 1, 64, 64, jnp.bfloat16, None, ((1, 2), jnp.float32)),
    "wide_bias": (masks.Causal(), 40, 40, 1, 1, 256, 64, jnp.float16, 3.0, ((1, 1), jnp.float16)),
}


# Half a dozen seconds each; and what "bias" has as well.
SLOW = ("wide", "wide_keys", "wide_bias", "full")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES]
)
def test_forward_and_backward_match_dense(case):
    mask, T, S, H, G, D, P, dtype, cap, bias = CASES[case]
    keys = jax.random.split(jax.random.key(len(case)), 6)
    shapes = ((1, T, H, D), (1, S, G, D), (1, S, G, P), (1, T, H, P))
    q, k, v, do = (
        jax.random.normal(key, s).astype(dtype) for key, s in zip(keys, shapes, strict=False)
    )
    dlse = jax.random.normal(keys[4], (1, T, H))
    if bias is not None:
        bias = 2 * jax.random.normal(keys[5], (*bias[0], T, S)).astype(bias[1])
    offset, scale = S - T, 0.7 * D**-0.5
    assert attention_gpu.unsupported(q, k, v, bias, mask, offset) is None
    options = {"scale": scale, "logit_cap": cap, "interpret": True}

    @jax.jit
    def run(q, k, v, bias, do, dlse):
        o, lse = attention_gpu.forward(q, k, v, bias, mask, offset, **options)
        grads = attention_gpu.backward(q, k, v, bias, mask, offset, o, lse, do, dlse, **options)
        return o, lse, grads

    o, lse, grads = run(q, k, v, bias, do, dlse)
    visible = np.asarray(masks.as_array(mask, T, S, offset))
    visible = np.broadcast_to(visible, (1, T, S))
    want = oracle(q, k, v, do, dlse, visible, scale, cap, bias)
    close("o", o, want[0])
    close("lse", lse, want[1], 1e-3)
    assert (grads[3] is None) == (bias is None)
    for name, got, exact in zip(("dq", "dk", "dv", "dbias"), grads, want[2:], strict=True):
        if got is not None:
            assert got.dtype == (dtype if name != "dbias" else bias.dtype)
            close(name, got, exact)


@pytest.mark.parametrize("dim", [80, 128, 256])
def test_lowers_for_cuda(dim):
    q = jax.ShapeDtypeStruct((1, 300, 4, dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, 300, 2, dim), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((1, 300, 4), jnp.float32)
    offset = jax.ShapeDtypeStruct((), jnp.int32)
    options = {"scale": 0.1, "logit_cap": None}

    def run(q, k, v, o, lse, offset):
        arguments = (q, k, v, None, masks.Causal(), offset)
        return (
            attention_gpu.forward(*arguments, **options),
            attention_gpu.backward(*arguments, o, lse, o, lse, **options),
        )

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        lowered = jax.jit(run).trace(q, kv, kv, q, row, offset).lower(lowering_platforms=("cuda",))
    kernels = {"forward", "dq", "dkv"} if dim <= 128 else {"forward", "dq", "dk", "dv"}
    text = lowered.as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == len(kernels)
    # Each call carries its kernel as bytecode, whose strings end in a zero byte.
    assert set(re.findall(r"\\00flash_([a-z]+)_mosaic_gpu\\00", text)) == kernels


def lower_gradient(device, x, **options):
    """Text of attention and its gradient, lowered for a GPU that is not attached."""

    def loss(q):
        return attention(q, q, q, **options).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(jax.grad(loss)).trace(x)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("device", [A100, H100], ids=["A100", "H100"])
def test_the_device_decides_where_none_is_asked_for(device):
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    assert ("mosaic_gpu" in lower_gradient(device, x)) == (device is H100)
    if device is A100:
        with pytest.raises(ValueError, match="not a Hopper.*None takes any"):
            lower_gradient(device, x, implementation="pallas")


SPARSE = masks.BlockSparse(np.eye(4, dtype=bool), 64)


@pytest.mark.parametrize(
    ("dtype", "mask", "message"),
    [
        (jnp.float32, masks.Full(), "float32; bfloat16 and float16.*None takes any"),
        (jnp.bfloat16, SPARSE, "multiple of 128.*None takes any"),
    ],
    ids=["float32", "small_blocks"],
)
def test_what_has_no_kernel_takes_xla_or_says_why(dtype, mask, message):
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), dtype)
    assert "mosaic_gpu" not in lower_gradient(H100, x, mask=mask)
    with pytest.raises(ValueError, match=message):
        lower_gradient(H100, x, mask=mask, implementation="pallas")


def test_unsupported_says_what_would_work():
    def reason(dtype=jnp.bfloat16, D=64, bias=None, mask=None):
        q = jax.ShapeDtypeStruct((1, 128, 2, D), dtype)
        return attention_gpu.unsupported(q, q, q, bias, mask or masks.Full(), 0)

    assert reason() is None
    assert "bfloat16 and float16" in reason(jnp.float32)
    assert "up to 256" in reason(D=272)
    assert reason(D=256) is None
    assert "queries or keys" in reason(bias=jnp.zeros((1, 2, 1, 128)))
    assert reason(bias=jnp.zeros((1, 2, 128, 128))) is None
    layout = np.eye(4, dtype=bool)
    assert "multiple of 128" in reason(mask=masks.BlockSparse(layout, 32))
    assert reason(mask=masks.BlockSparse(layout, 128)) is None


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("causal", "keys"),
        ("packed", "queries"),
        pytest.param("causal", "queries", marks=pytest.mark.slow),
        pytest.param("packed", "keys", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_mask_hides_what_is_not_finite(name, where):
    mask = {"causal": masks.Causal(), "packed": masks.Causal() & PACKED}[name]
    options = {"scale": 0.25, "logit_cap": None, "interpret": True}

    def run(q, k, v, do, dlse):
        arrays = q, k, v, None, mask, 0
        o, lse = attention_gpu.forward(*arrays, **options)
        return o, lse, *attention_gpu.backward(*arrays, o, lse, do, dlse, **options)[:3]

    assert_hidden(run, mask, (1, 140, 140, 2, 1, 64), where, tolerance=1e-6, dtype="bfloat16")


def test_a_bias_hides_keys_and_whole_rows():
    def run(q, k, v, bias, do, dlse):
        arrays = q, k, v, bias, masks.Full(), 0
        options = {"scale": q.shape[3] ** -0.5, "logit_cap": None, "interpret": True}
        o, lse = attention_gpu.forward(*arrays, **options)
        return o, lse, *attention_gpu.backward(*arrays, o, lse, do, dlse, **options)

    assert_bias_hides(run, (1, 40, 40, 1, 1, 64), tolerance=0.02, dtype="bfloat16")
