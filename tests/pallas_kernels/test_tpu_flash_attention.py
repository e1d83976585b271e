"""The TPU kernels, interpreted on a CPU, against dense attention in float64."""

import functools
import importlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hidden_values import assert_bias_hides, assert_hidden

from tilescan.ops import attention_tpu, masks, reference
from tilescan.pallas_kernels import dropout
from tilescan.pallas_kernels.tpu import flash_attention as kernels

attention_lib = importlib.import_module("tilescan.ops.attention")  # `ops.attention` is the function

# Relative error in the Frobenius norm; bfloat16 has 8 bits of mantissa.
TOLERANCE = {"float32": 3e-6, "bfloat16": 6e-3}


SMALL_TILE = kernels.Tile(128, 128, 128)  # small enough for tests to have several


def slowly(*values):
    """Values of a parameter that only the slow suite takes."""
    return [pytest.param(*value, marks=pytest.mark.slow) for value in values]


def problem(B=1, T=300, S=None, H=2, G=1, D=16, P=None, dtype="float32", bias=None, seed=0):
    rng = np.random.default_rng(seed)
    S = T if S is None else S
    P = D if P is None else P
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    arrays = normal(B, T, H, D), normal(B, S, G, D), normal(B, S, G, P)
    bias = None if bias is None else jnp.asarray(rng.standard_normal(bias), jnp.float32)
    cotangents = normal(B, T, H, P), jnp.asarray(rng.standard_normal((B, T, H)), jnp.float32)
    return arrays, bias, cotangents


def ours(
    q, k, v, bias, mask, do, dlse, *, offset=0, scale=0.25, logit_cap=None, drop=None,
    tile=SMALL_TILE,
):  # fmt: skip
    """o, lse, dq, dk, dv, and dbias or None; one program for all values of the same shapes."""
    traced, known = (None, offset) if isinstance(offset, int) else (offset, None)
    return compiled(q, k, v, bias, mask, do, dlse, traced, drop, known, scale, logit_cap, tile)


@functools.partial(jax.jit, static_argnames=("known", "scale", "logit_cap", "tile"))
def compiled(q, k, v, bias, mask, do, dlse, traced, drop, known, scale, logit_cap, tile):
    arrays, offset = (q, k, v, bias, mask), known if traced is None else traced
    options = {"scale": scale, "logit_cap": logit_cap, "dropout": drop, "interpret": True}
    with mock.patch.object(attention_tpu, "tile_for", lambda *_: tile):
        o, lse = attention_tpu.forward(*arrays, offset, **options)
        return o, lse, *attention_tpu.backward(*arrays, offset, o, lse, do, dlse, **options)


def compare(
    arrays, bias, cotangents, mask, *, q_offset=None, logit_cap=None, scale=0.25, tolerance=None,
    tile=SMALL_TILE,
):  # fmt: skip
    """Asserts that output, log-sum-exp and gradients are those of dense attention in float64."""
    q, k, v = arrays
    do, dlse = cotangents
    offset = k.shape[1] - q.shape[1] if q_offset is None else q_offset
    options = {"scale": scale, "logit_cap": logit_cap}
    found = ours(q, k, v, bias, mask, do, dlse, offset=offset, **options, tile=tile)[:5]
    assert found[0].dtype == q.dtype and found[1].dtype == jnp.float32
    expected = reference.attention_and_gradients(
        *(np.asarray(x, np.float64) for x in (q, k, v, do, dlse)),
        mask=mask,
        bias=bias,
        q_offset=offset,
        **options,
    )[:5]
    found = [np.asarray(x, np.float64) for x in found]
    np.testing.assert_array_equal(np.isneginf(found[1]), np.isneginf(expected[1]))
    assert np.all(found[0][np.isneginf(expected[1])] == 0)
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        x, y = (np.where(np.isneginf(z), 0, z) for z in (x, y))
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
        assert np.all(np.isfinite(x)), name
        assert error < (tolerance or TOLERANCE[q.dtype.name]), f"{name}: relative error {error:.1e}"


def segments(B, T, count=4, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.sort(rng.integers(0, count, (B, T)), axis=1), jnp.int32)


MASKS = {
    "full": lambda T: masks.Full(),
    "causal": lambda T: masks.Causal(),
    "window": lambda T: masks.SlidingWindow(70),
    "two-sided window": lambda T: masks.SlidingWindow(30, 50),
    "prefix": lambda T: masks.Causal() | masks.Prefix(140),
    "only prefix": lambda T: masks.Prefix(33),
    "lambda": lambda T: masks.Lambda(4, 60),
    "fine layout": lambda T: masks.BlockSparse(masks.butterfly(-(-T // 32), 2), 32),
    "coarse layout": lambda T: masks.BlockSparse(np.eye(-(-T // 256), dtype=bool), 256),
    "causal layout": lambda T: (
        masks.Causal() & masks.BlockSparse(masks.butterfly(-(-T // 256)), 256)
    ),
    "segments": lambda T: masks.Segments(segments(1, T)),
    "packed": lambda T: masks.Causal() & masks.Segments(segments(1, T)),
    "packed window": lambda T: masks.SlidingWindow(50) & masks.Segments(segments(1, T)),
    "packed or prefix": lambda T: masks.Segments(segments(1, T)) | masks.Prefix(5),
    "packed layout": lambda T: (
        masks.Segments(segments(1, T)) & masks.BlockSparse(masks.butterfly(-(-T // 32), 2), 32)
    ),
}


# Each is a branch of the schedule or of the masking that another one takes as well.
ALIKE = (
    "full", "two-sided window", "only prefix", "coarse layout", "packed window",
    "packed or prefix", "segments", "causal layout", "lambda", "fine layout", "packed layout",
    "prefix", "window", "causal",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [*(name for name in MASKS if name not in ALIKE), *slowly(*zip(ALIKE, strict=True))]
)
def test_every_mask(name):
    compare(*problem(), MASKS[name](300))


@pytest.mark.parametrize("name", ["lambda", *slowly(("causal",))])
def test_bfloat16_and_several_compute_steps(name):
    inputs = problem(G=2, D=64, dtype="bfloat16")
    compare(*inputs, MASKS[name](300), scale=0.125, tile=kernels.Tile(256, 256, 128))


@pytest.mark.parametrize(
    "shape",
    [
        {"T": 1, "S": 63},
        *slowly(
            ({"T": 257, "S": 129},), ({"T": 1, "S": 300},), ({"T": 63},), ({"T": 256, "B": 2},)
        ),
    ],
    ids=str,
)
def test_lengths(shape):
    compare(*problem(G=2, **shape), masks.Causal())


@pytest.mark.parametrize(
    "shape",  # test_bias has the first
    [
        *slowly(
            ({"D": 80, "P": 96},), ({"D": 96, "dtype": "bfloat16"},), ({"D": 128},),
            ({"D": 256, "P": 16},),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_head_dims_scale_and_cap(shape):
    compare(*problem(T=150, G=2, **shape), masks.Causal(), logit_cap=2.0, scale=0.5)


@pytest.mark.slow  # those at once are grouped too: two in one, and with dropout two in two
@pytest.mark.parametrize(("H", "G"), [(4, 2), (3, 1)])
def test_grouped_heads(H, G):
    compare(*problem(B=2, T=140, H=H, G=G), masks.Causal() & masks.Segments(segments(2, 140)))


WINDOW, LAMBDA = masks.SlidingWindow(60), masks.Lambda(3, 40)  # walks an interval; a list


@pytest.mark.parametrize(
    ("offset", "mask"),
    [
        (jnp.int32(-20), WINDOW),
        *slowly(
            (50, LAMBDA), (jnp.int32(50), LAMBDA), (jnp.int32(-20), LAMBDA),
            (50, WINDOW), (jnp.int32(50), WINDOW),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_offset_known_and_traced(offset, mask):
    compare(*problem(T=130, S=300, G=2), mask, q_offset=offset)


@pytest.mark.parametrize("shape", [(1, 2, 1, 129), *slowly(((2, 2, 257, 129),), ((2, 1, 257, 1),))])
def test_bias(shape, monkeypatch):
    """And rows before the first key, head dims that differ, a scale and a cap, all at once."""
    # The gradient of the bias is the XLA implementation's, tested with it.
    monkeypatch.setattr(attention_tpu.attention_xla, "backward", lambda *_, **__: (None,) * 4)
    inputs = problem(B=2, T=257, S=129, D=80, P=96, bias=shape)
    compare(*inputs, masks.Causal(), logit_cap=2.0, scale=0.5)


@pytest.mark.slow
def test_rows_without_keys():
    """Queries of a segment that no key has; those before the first key: test_lengths."""
    compare(*problem(), masks.Segments(segments(1, 300), segments(1, 300) * 2))


def test_extreme_logits_stay_finite():
    (q, k, v), _, (do, dlse) = problem()
    compare((q * 19, k * 19, v), None, (do, dlse * 0), MASKS["packed"](300), tolerance=1e-3)


def test_second_run_is_the_same():
    (q, k, v), bias, (do, dlse) = problem()
    first, second = (ours(q, k, v, bias, MASKS["packed"](300), do, dlse) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def unsupported(mask, q_offset=0, T=64, D=64, dtype="float32"):
    """What `attention_tpu.unsupported` says of arrays that nobody has to make."""
    found = []
    ask = lambda q: found.append(attention_tpu.unsupported(q, q, q, None, mask, q_offset))
    jax.eval_shape(ask, jax.ShapeDtypeStruct((1, T, 1, D), dtype))
    return found[0]


def test_unsupported_says_what_works():
    assert "16 to 256" in unsupported(masks.Full(), D=8)
    assert "bfloat16" in unsupported(masks.Full(), dtype="float16")
    layout = masks.BlockSparse(np.ones((2, 2), bool), 32)
    assert "q_offset as an int" in unsupported(layout, jnp.int32(0))
    assert unsupported(layout) is None


def test_lists_longer_than_scalar_memory_are_refused():
    layout = masks.BlockSparse(masks.butterfly(1 << 9, None, 512), 256)
    assert "scalar memory" in unsupported(layout, T=1 << 17, dtype="bfloat16")


def test_a_million_tokens_need_no_tables():
    plans = []

    def plan(q):
        for mask in (masks.Causal(), masks.SlidingWindow(1000)):
            assert attention_tpu.unsupported(q, q, q, None, mask, 0) is None
            plans.append(attention_tpu.plan_for("forward", q, q, q, mask, 0))

    jax.eval_shape(plan, jax.ShapeDtypeStruct((1, 1 << 20, 1, 64), jnp.bfloat16))
    assert not any(plan.schedule.tables for plan in plans)
    # Steps of a row follow the window, not the length.
    window = plans[1]
    assert window.schedule.steps <= (1000 + window.queries.block) // window.keys.block + 2


@pytest.mark.parametrize("where", ["keys", "queries"])
@pytest.mark.parametrize(
    "name", ["packed", *slowly(("causal",), ("window",), ("lambda",), ("fine layout",))]
)
def test_a_mask_hides_what_is_not_finite(name, where):
    mask = MASKS[name](300)
    run = lambda q, k, v, do, dlse: ours(q, k, v, None, mask, do, dlse)[:5]
    assert_hidden(run, mask, (1, 300, 300, 2, 1, 16), where, compiled=True)


def test_a_bias_hides_keys_and_whole_rows():
    run = lambda q, k, v, bias, do, dlse: ours(q, k, v, bias, masks.Full(), do, dlse)
    assert_bias_hides(run, (1, 130, 140, 2, 1, 16), compiled=True)


@pytest.mark.parametrize("dtype", ["float32", *slowly(("bfloat16",))])
def test_dropout_drops_what_the_reference_does(dtype):
    (q, k, v), bias, (do, dlse) = problem(B=2, T=200, H=4, G=2, dtype=dtype)
    mask, seed, rate = masks.Causal(), 2**32 - 3, 0.3
    drop = dropout.Dropout(attention_lib.dropout_seeds(rate, seed, q), rate)
    tile = kernels.Tile(128, 256, 128)
    found = ours(q, k, v, bias, mask, do, dlse, drop=drop, tile=tile)[:5]
    want = reference.attention_and_gradients(
        q, k, v, do, dlse, mask=mask, scale=0.25, dropout_rate=rate, dropout_seed=seed
    )
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), found, want, strict=False):
        error = np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"
