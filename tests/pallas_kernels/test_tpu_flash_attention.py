"""The TPU kernels, interpreted on a CPU, against dense attention in float64."""

import functools
import importlib

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


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles small enough for tests to have several."""
    monkeypatch.setattr(attention_tpu, "tile_for", lambda *_: kernels.Tile(128, 128, 128))


def problem(B=1, T=200, S=None, H=2, G=None, D=64, P=None, dtype="float32", bias=None, seed=0):
    rng = np.random.default_rng(seed)
    S, G = T if S is None else S, H if G is None else G
    P = D if P is None else P
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    arrays = normal(B, T, H, D), normal(B, S, G, D), normal(B, S, G, P)
    bias = None if bias is None else jnp.asarray(rng.standard_normal(bias), jnp.float32)
    cotangents = normal(B, T, H, P), jnp.asarray(rng.standard_normal((B, T, H)), jnp.float32)
    return arrays, bias, cotangents


def compare(
    arrays, bias, cotangents, mask, *, q_offset=None, logit_cap=None, scale=None, tolerance=None
):
    """Assert that output, log-sum-exp and gradients are the reference's."""
    q, k, v = arrays
    do, dlse = cotangents
    offset = k.shape[1] - q.shape[1] if q_offset is None else q_offset
    scale = q.shape[3] ** -0.5 if scale is None else scale
    options = {"scale": scale, "logit_cap": logit_cap}

    @jax.jit
    def ours(q, k, v, bias, mask, do, dlse):
        o, lse = attention_tpu.forward(q, k, v, bias, mask, offset, **options, interpret=True)
        dlse = jnp.where(jnp.isneginf(lse), 0, dlse)
        gradients = attention_tpu.backward(
            q, k, v, bias, mask, offset, o, lse, do, dlse, **options, interpret=True
        )
        return o, lse, *gradients[:3]

    found = ours(q, k, v, bias, mask, do, dlse)
    assert found[0].dtype == q.dtype and found[1].dtype == jnp.float32
    with jax.enable_x64(True):
        wide = [None if x is None else x.astype(jnp.float64) for x in (q, k, v, bias)]
        dense = functools.partial(
            reference.attention, mask=mask, q_offset=offset, return_lse=True, **options
        )

        @jax.jit
        def by_definition(q, k, v, bias, do, dlse):
            (o, lse), pullback = jax.vjp(lambda *qkv: dense(*qkv, bias=bias), q, k, v)
            cotangent = do.astype(o.dtype), jnp.where(jnp.isneginf(lse), 0, dlse.astype(lse.dtype))
            return o, lse, *pullback(cotangent)

        expected = [np.asarray(x, np.float64) for x in by_definition(*wide, do, dlse)]
    found = [np.asarray(x.astype(jnp.float32), np.float64) for x in found]
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
    "two-sided window", "only prefix", "coarse layout", "packed window", "packed or prefix",
    "segments", "causal layout",
)  # fmt: skip


def slowly(*values):
    """Values of a parameter that only the slow suite takes."""
    return [pytest.param(*value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize(
    "name", [*(name for name in MASKS if name not in ALIKE), *slowly(*zip(ALIKE, strict=True))]
)
def test_every_mask(name):
    compare(*problem(T=300, D=32), MASKS[name](300))


@pytest.mark.parametrize("name", ("causal", "lambda"))
def test_bfloat16_and_several_compute_steps(name, monkeypatch):
    monkeypatch.setattr(attention_tpu, "tile_for", lambda *_: kernels.Tile(256, 256, 128))
    compare(*problem(T=300, D=64, dtype="bfloat16"), MASKS[name](300))


@pytest.mark.parametrize(
    "shape",
    [{"T": 1, "S": 300}, {"T": 63}, {"T": 257, "S": 129}, *slowly(({"T": 256, "B": 2},))],
    ids=str,
)
def test_lengths(shape):
    compare(*problem(D=16, **shape), masks.Causal())


@pytest.mark.parametrize(
    "shape",
    [
        {"D": 80, "P": 96},
        {"D": 96, "dtype": "bfloat16"},
        *slowly(({"D": 128},), ({"D": 256, "P": 16},)),
    ],
    ids=str,
)
def test_head_dims(shape):
    compare(*problem(T=150, **shape), masks.Causal())


@pytest.mark.parametrize(("H", "G"), [(4, 2), *slowly((3, 1))])
def test_grouped_heads(H, G):
    compare(*problem(B=2, T=140, H=H, G=G, D=16), masks.Causal() & masks.Segments(segments(2, 140)))


WINDOW, LAMBDA = masks.SlidingWindow(60), masks.Lambda(3, 40)  # walks an interval; a list


@pytest.mark.parametrize(
    ("offset", "mask"),
    [
        (50, LAMBDA),
        (jnp.int32(-20), WINDOW),
        *slowly(
            (jnp.int32(50), LAMBDA), (50, WINDOW), (jnp.int32(50), WINDOW), (jnp.int32(-20), LAMBDA)
        ),
    ],
    ids=str,
)
def test_offset_known_and_traced(offset, mask):
    compare(*problem(T=130, S=300, D=16), mask, q_offset=offset)


@pytest.mark.parametrize("shape", [(2, 2, 150, 300), (1, 2, 1, 300), *slowly(((2, 1, 150, 1),))])
def test_bias(shape, monkeypatch):
    # The gradient of the bias is the XLA implementation's, tested with it.
    monkeypatch.setattr(attention_tpu.attention_xla, "backward", lambda *_, **__: (None,) * 4)
    compare(*problem(B=2, T=150, S=300, D=16, bias=shape), masks.Causal())


def test_scale_and_cap():
    compare(*problem(T=150, D=32), masks.Causal(), logit_cap=2.0, scale=0.7)


def test_rows_without_keys():
    """Queries of a segment that no key has; those before the first key: test_lengths."""
    ids = masks.Segments(segments(1, 200), segments(1, 200) * 2)
    compare(*problem(T=200, D=16), ids)


def test_extreme_logits_stay_finite():
    (q, k, v), _, (do, dlse) = problem(T=140, D=16)
    compare((q * 300, k * 300, v), None, (do, dlse * 0), masks.Causal(), scale=1e-3, tolerance=1e-3)


def test_second_run_is_the_same():
    (q, k, v), *_ = problem(T=300, D=32, dtype="bfloat16")
    run = jax.jit(
        lambda: attention_tpu.forward(
            q, k, v, None, masks.Causal(), 0, scale=0.2, logit_cap=None, interpret=True
        )
    )
    for first, second in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_unsupported_says_what_works():
    (q, k, v), *_ = problem(T=64, D=8)
    assert "16 to 256" in attention_tpu.unsupported(q, k, v, None, masks.Full(), 0)
    (q, k, v), *_ = problem(T=64, dtype="float16")
    assert "bfloat16" in attention_tpu.unsupported(q, k, v, None, masks.Full(), 0)
    (q, k, v), *_ = problem(T=64)
    layout = masks.BlockSparse(np.ones((2, 2), bool), 32)
    traced = attention_tpu.unsupported(q, k, v, None, layout, jnp.int32(0))
    assert "q_offset as an int" in traced
    assert attention_tpu.unsupported(q, k, v, None, layout, 0) is None


def test_lists_longer_than_scalar_memory_are_refused():
    x = jax.ShapeDtypeStruct((1, 1 << 17, 1, 64), jnp.bfloat16)
    layout = masks.BlockSparse(masks.butterfly(1 << 9, None, 512), 256)
    assert "scalar memory" in attention_tpu.unsupported(x, x, x, None, layout, 0)


def test_a_million_tokens_need_no_tables():
    x = jax.ShapeDtypeStruct((1, 1 << 20, 1, 64), jnp.bfloat16)
    for mask in (masks.Causal(), masks.SlidingWindow(1000)):
        assert attention_tpu.unsupported(x, x, x, None, mask, 0) is None
        plan = attention_tpu.plan_for("forward", x, x, x, mask, 0)
        assert not plan.schedule.tables
    # Steps of a row follow the window, not the length.
    assert plan.schedule.steps <= (1000 + plan.queries.block) // plan.keys.block + 2


@pytest.mark.parametrize("where", ["keys", "queries"])
@pytest.mark.parametrize(
    "name", ["causal", "window", "packed", *slowly(("lambda",), ("fine layout",))]
)
def test_a_mask_hides_what_is_not_finite(name, where):
    mask, options = MASKS[name](300), {"scale": 0.25, "logit_cap": None, "interpret": True}

    def run(q, k, v, do, dlse):
        arrays = q, k, v, None, mask, 0
        o, lse = attention_tpu.forward(*arrays, **options)
        return o, lse, *attention_tpu.backward(*arrays, o, lse, do, dlse, **options)[:3]

    assert_hidden(run, mask, (1, 300, 300, 2, 1, 16), where)


def test_a_bias_hides_keys_and_whole_rows():
    def run(q, k, v, bias, do, dlse):
        arrays = q, k, v, bias, masks.Full(), 0
        options = {"scale": q.shape[3] ** -0.5, "logit_cap": None, "interpret": True}
        o, lse = attention_tpu.forward(*arrays, **options)
        return o, lse, *attention_tpu.backward(*arrays, o, lse, do, dlse, **options)

    assert_bias_hides(run, (1, 130, 140, 2, 1, 16))


@pytest.mark.parametrize("dtype", ["float32", *slowly(("bfloat16",))])
def test_dropout_drops_what_the_reference_does(dtype, monkeypatch):
    monkeypatch.setattr(attention_tpu, "tile_for", lambda *_: kernels.Tile(128, 256, 128))
    (q, k, v), _, (do, dlse) = problem(B=2, T=200, H=4, G=2, D=16, dtype=dtype)
    mask, seed, rate = masks.Causal(), 2**32 - 3, 0.3
    drop = dropout.Dropout(attention_lib.dropout_seeds(rate, seed, q), rate)

    @jax.jit
    def run(q, k, v, do, dlse):
        arrays = q, k, v, None, mask, 0
        options = dict(scale=0.25, logit_cap=None, dropout=drop, interpret=True)
        o, lse = attention_tpu.forward(*arrays, **options)
        return o, lse, *attention_tpu.backward(*arrays, o, lse, do, dlse, **options)[:3]

    want = reference.attention_and_gradients(
        q, k, v, do, dlse, mask=mask, scale=0.25, dropout_rate=rate, dropout_seed=seed
    )
    for name, x, y in zip(
        ("o", "lse", "dq", "dk", "dv"), run(q, k, v, do, dlse), want, strict=False
    ):
        error = np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"
