"""The Mosaic GPU attention kernels in interpret mode, against a float64 dense oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from ops import attention_gpu, masks

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def oracle(q, k, v, do, dlse, visible, scale, logit_cap):
    """(o, lse, dq, dk, dv) in float64 numpy; visible is bool [B, T, S]."""
    q, k, v, do, dlse = (np.asarray(x, np.float64) for x in (q, k, v, do, dlse))
    group = q.shape[2] // k.shape[2]
    kr, vr = np.repeat(k, group, 2), np.repeat(v, group, 2)
    logits = scale * np.einsum("bthd,bshd->bhts", q, kr)
    slope = np.ones_like(logits)
    if logit_cap is not None:
        tanh = np.tanh(logits / logit_cap)
        logits, slope = logit_cap * tanh, 1 - tanh**2
    logits = np.where(visible[:, None], logits, -np.inf)
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
    ds = p * (dp - delta) * slope * scale
    B, S, G, _ = k.shape
    dk = np.einsum("bhts,bthd->bshd", ds, q).reshape(B, S, G, group, -1).sum(3)
    dv = np.einsum("bhts,bthd->bshd", p, do).reshape(B, S, G, group, -1).sum(3)
    return o, lse.swapaxes(1, 2), np.einsum("bhts,bshd->bthd", ds, kr), dk, dv


def close(name, got, want, bound=0.02):
    got, want = np.asarray(got, np.float64), np.asarray(want)
    finite = np.isfinite(want)
    assert np.array_equal(finite, np.isfinite(got)), name
    error = np.abs(got[finite] - want[finite]).max(initial=0)
    assert error <= bound * max(1.0, np.abs(want[finite]).max(initial=0)), (name, error)


PACKED = masks.Segments(jnp.asarray([[1] * 60 + [2] * 70 + [0] * 10], jnp.int32))
CASES = {
    # mask, T, S, H, G, D, dtype, logit_cap
    "full": (masks.Full(), 70, 130, 2, 2, 64, jnp.bfloat16, None),
    "causal_grouped": (masks.Causal(), 140, 140, 2, 1, 64, jnp.float16, None),
    "unseen_rows": (masks.Causal(), 90, 40, 1, 1, 64, jnp.bfloat16, None),
    "window_capped": (masks.SlidingWindow(20, 5), 150, 150, 1, 1, 48, jnp.bfloat16, 2.0),
    "prefix_lists": (masks.Causal() | masks.Prefix(30), 140, 140, 1, 1, 64, jnp.bfloat16, None),
    "packed": (masks.Causal() & PACKED, 140, 140, 1, 1, 64, jnp.bfloat16, None),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_match_dense(case):
    mask, T, S, H, G, D, dtype, cap = CASES[case]
    keys = jax.random.split(jax.random.key(len(case)), 5)
    shapes = ((1, T, H, D), (1, S, G, D), (1, S, G, D), (1, T, H, D))
    q, k, v, do = (
        jax.random.normal(key, s).astype(dtype) for key, s in zip(keys, shapes, strict=False)
    )
    dlse = jax.random.normal(keys[4], (1, T, H))
    offset, scale = S - T, 0.7 * D**-0.5
    assert attention_gpu.unsupported(q, k, v, None, mask, offset) is None
    options = {"scale": scale, "logit_cap": cap, "interpret": True}
    o, lse = attention_gpu.forward(q, k, v, None, mask, offset, **options)
    visible = np.asarray(masks.as_array(mask, T, S, offset))
    visible = np.broadcast_to(visible, (1, T, S))
    want = oracle(q, k, v, do, dlse, visible, scale, cap)
    close("o", o, want[0])
    close("lse", lse, want[1], 1e-3)
    grads = attention_gpu.backward(q, k, v, None, mask, offset, o, lse, do, dlse, **options)
    for name, got, exact in zip(("dq", "dk", "dv"), grads, want[2:], strict=False):
        assert got.dtype == dtype
        close(name, got, exact)


@pytest.mark.parametrize("dim", [64, 80, 128])
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
    assert lowered.as_text().count("mosaic_gpu") >= 3


def test_unsupported_says_what_would_work():
    def reason(dtype=jnp.bfloat16, D=64, bias=None, mask=None):
        q = jax.ShapeDtypeStruct((1, 128, 2, D), dtype)
        return attention_gpu.unsupported(q, q, q, bias, mask or masks.Full(), 0)

    assert reason() is None
    assert "bfloat16 and float16" in reason(jnp.float32)
    assert "up to 128" in reason(D=256)
    assert "leave it out" in reason(bias=1)
    layout = np.eye(4, dtype=bool)
    assert "multiple of 128" in reason(mask=masks.BlockSparse(layout, 32))
    assert reason(mask=masks.BlockSparse(layout, 128)) is None
