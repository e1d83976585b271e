"""The Mosaic GPU attention kernels in interpret mode, against a float64 dense oracle."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hidden_values import assert_bias_hides, assert_hidden
from jax.sharding import AbstractDevice, AbstractMesh

from tilescan.ops import attention, attention_gpu, masks, reference

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
A100 = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")


def ours(q, k, v, bias, mask, do, dlse, *, offset=0, scale=0.125, logit_cap=None):
    """o, lse, dq, dk, dv, and dbias or None; one program for all values of the same shapes."""
    return compiled(q, k, v, bias, mask, do, dlse, offset, scale, logit_cap)


@functools.partial(jax.jit, static_argnames=("offset", "scale", "logit_cap"))
def compiled(q, k, v, bias, mask, do, dlse, offset, scale, logit_cap):
    arrays, options = (q, k, v, bias, mask, offset), {"scale": scale, "logit_cap": logit_cap}
    o, lse = attention_gpu.forward(*arrays, **options, interpret=True)
    gradients = attention_gpu.backward(*arrays, o, lse, do, dlse, **options, interpret=True)
    return o, lse, *gradients


def close(name, got, want, bound=0.02):
    got, want = np.asarray(got, np.float64), np.asarray(want)
    finite = np.isfinite(want)
    assert np.array_equal(finite, np.isfinite(got)), name
    error = np.abs(got[finite] - want[finite]).max(initial=0)
    assert error <= bound * max(1.0, np.abs(want[finite]).max(initial=0)), (name, error)


PREFIX = masks.Prefix(30)
PACKED = masks.Segments(jnp.asarray([[1] * 50 + [2] * 43 + [0] * 7], jnp.int32))
CASES = {
    # mask, T, S, H, G, D, P, dtype, logit_cap, bias
    "full": (masks.Full(), 70, 130, 2, 2, 64, 64, jnp.bfloat16, None, None),
    "causal_grouped": (masks.Causal(), 100, 100, 2, 1, 64, 64, jnp.float16, None, None),
    "unseen_rows": (masks.Causal(), 90, 40, 1, 1, 64, 64, jnp.bfloat16, None, None),
    "window_capped": (masks.SlidingWindow(20, 5), 150, 150, 1, 1, 48, 48, jnp.bfloat16, 2.0, None),
    # The first 35 rows see nothing.
    "window_capped_unseen_rows": (
        masks.SlidingWindow(20, 5), 100, 60, 1, 1, 48, 48, jnp.bfloat16, 2.0, None
    ),
    "prefix_lists": (masks.Causal() | PREFIX, 140, 140, 1, 1, 64, 64, jnp.bfloat16, None, None),
    "packed": (masks.Causal() & PACKED, 100, 100, 1, 1, 64, 64, jnp.bfloat16, None, None),
    # Above 128 dK and dV come from two kernels, of tiles of 32 queries or keys at 256.
    "wide": (masks.Causal(), 40, 70, 1, 1, 256, 256, jnp.bfloat16, None, None),
    "wide_keys": (masks.Causal(), 40, 40, 2, 1, 192, 80, jnp.bfloat16, 3.0, None),
    "bias": (masks.Full(), 60, 70, 2, 1, 64, 64, jnp.float16, None, ((1, 2), jnp.float32)),
    "wide_bias": (masks.Causal(), 40, 40, 1, 1, 256, 64, jnp.float16, 3.0, ((1, 1), jnp.float16)),
}  # fmt: skip


# Half a dozen seconds each; and what others have as well.
SLOW = (
    *("wide", "wide_keys", "wide_bias", "full", "unseen_rows", "window_capped"),
    *("prefix_lists", "causal_grouped"),
)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES]
)
def test_forward_and_backward_match_dense(case):
    mask, T, S, H, G, D, P, dtype, cap, bias = CASES[case]
    rng = np.random.default_rng(len(case))
    normal = lambda shape, dtype: jnp.asarray(rng.standard_normal(shape), dtype)
    shapes = ((1, T, H, D), (1, S, G, D), (1, S, G, P), (1, T, H, P))
    q, k, v, do = (normal(shape, dtype) for shape in shapes)
    dlse = normal((1, T, H), jnp.float32)
    if bias is not None:
        bias = normal((*bias[0], T, S), bias[1])
    options = {"offset": S - T, "logit_cap": cap, "scale": D**-0.5 if cap is None else 0.1}
    o, lse, *gradients = ours(q, k, v, bias, mask, do, dlse, **options)
    options["q_offset"] = options.pop("offset")
    want = reference.attention_and_gradients(q, k, v, do, dlse, mask=mask, bias=bias, **options)
    close("o", o, want[0])
    close("lse", lse, want[1], 1e-3)
    assert (gradients[3] is None) == (bias is None)
    for name, got, exact in zip(("dq", "dk", "dv", "dbias"), gradients, want[2:], strict=True):
        if got is not None:
            assert got.dtype == (dtype if name != "dbias" else bias.dtype)
            close(name, got, exact)


# Up to 128 the public op below is lowered too, by the same kernels.
@pytest.mark.parametrize(
    "dim", [*(pytest.param(d, marks=pytest.mark.slow) for d in (80, 128)), 256]
)
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
        found = []
        ask = lambda q, bias: found.append(
            attention_gpu.unsupported(q, q, q, bias, masks.Full() if mask is None else mask, 0)
        )
        bias = None if bias is None else jax.ShapeDtypeStruct(bias, jnp.float32)
        jax.eval_shape(ask, jax.ShapeDtypeStruct((1, 128, 2, D), dtype), bias)
        return found[0]

    assert reason() is None
    assert "bfloat16 and float16" in reason(jnp.float32)
    assert "up to 256" in reason(D=272)
    assert reason(D=256) is None
    assert "queries or keys" in reason(bias=(1, 2, 1, 128))
    assert reason(bias=(1, 2, 128, 128)) is None
    layout = np.eye(4, dtype=bool)
    assert "multiple of 128" in reason(mask=masks.BlockSparse(layout, 32))
    assert reason(mask=masks.BlockSparse(layout, 128)) is None


# In the shapes, and so by the programs, of two cases above.
HIDING = {
    "causal": (masks.Causal(), "float16", 2),
    "packed": (masks.Causal() & PACKED, "bfloat16", 1),
}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("packed", "keys"),
        ("packed", "queries"),
        pytest.param("causal", "keys", marks=pytest.mark.slow),
        pytest.param("causal", "queries", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_mask_hides_what_is_not_finite(name, where):
    mask, dtype, H = HIDING[name]
    run = lambda q, k, v, do, dlse: ours(q, k, v, None, mask, do, dlse)[:5]
    shape = 1, 100, 100, H, 1, 64
    assert_hidden(run, mask, shape, where, tolerance=1e-6, dtype=dtype, compiled=True)


def test_a_bias_hides_keys_and_whole_rows():
    run = lambda q, k, v, bias, do, dlse: ours(q, k, v, bias, masks.Full(), do, dlse, offset=10)
    assert_bias_hides(run, (1, 60, 70, 2, 1, 64), tolerance=0.02, dtype="float16", compiled=True)
