"""Recurrences and convolutions over sharded time equal those of one device, exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tilescan.ops.delta_rule import delta_rule, gated_delta_rule
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.ops.linear_recurrence import linear_recurrence
from tilescan.ops.long_convolution import long_convolution
from tilescan.ops.selective_scan import selective_scan
from tilescan.ops.sequence_parallel import convolutions, scans
from tilescan.ops.sequence_parallel.kinds import SCAN_KINDS
from tilescan.ops.short_convolution import short_convolution
from tilescan.ops.ssd import ssd

B, H, G, D, V, E, N = 2, 4, 2, 6, 5, 6, 3
TIME, WHOLE = P(None, "sequence"), P()


def mesh_of(devices):
    axes = (AxisType.Auto,)
    return jax.make_mesh((devices,), ("sequence",), axes, devices=jax.devices()[:devices])


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def strong(x, seed):
    """Log-decays: in the second row, some very strong ones, and some that forget all."""
    u = np.random.default_rng(seed).random(x.shape)
    hard = np.where(u < 0.06, np.where(u < 0.03, -np.inf, 600 * x), x)
    return np.where(np.arange(B).reshape(-1, *(1,) * (x.ndim - 1)) == 1, hard, x)


def heads(T):
    q, k, v = normal(0, B, T, H, D), normal(1, B, T, G, D), normal(2, B, T, G, V)
    return q, k / np.linalg.norm(k, axis=-1, keepdims=True), v


def ssd_inputs(T):
    x, Bs, Cs = normal(0, B, T, H, V), normal(1, B, T, G, N), normal(2, B, T, G, N)
    dt = np.where(normal(4, B, T, H) > 1.8, 300, normal(3, B, T, H)).astype(np.float32)
    A, skip, bias = -0.1 * np.exp(normal(5, H)), normal(6, H), normal(7, H)
    return dict(x=x, dt=dt, A=A, B=Bs, C=Cs, D=skip, dt_bias=bias), dict(dt_softplus=True)


def gla_inputs(T):
    decay = strong(-0.1 * np.exp(normal(3, B, T, H, D)), 4)
    return dict(zip("qkv", heads(T), strict=True), log_decay=decay), {}


def delta_inputs(T):
    beta = 1 / (1 + np.exp(-normal(5, B, T, H)))
    return dict(zip("qkv", heads(T), strict=True), beta=beta), {}


def gated_delta_inputs(T):
    arrays, options = delta_inputs(T)
    return dict(arrays, log_decay=strong(-0.1 * np.exp(normal(3, B, T, H)), 4)), options


def selective_inputs(T):
    x, z, dt = normal(0, B, T, E), normal(8, B, T, E), 2 * normal(3, B, T, E)
    dt = np.where(normal(4, B, T, E) > 1.8, 300, dt).astype(np.float32)
    Bs, Cs = normal(1, B, T, N), normal(2, B, T, N)
    A, skip, bias = -0.1 * np.exp(normal(5, E, N)), normal(6, E), normal(7, E)
    arrays = dict(x=x, dt=dt, A=A, B=Bs, C=Cs, D=skip, z=z, dt_bias=bias)
    return arrays, dict(dt_softplus=True)


def linear_inputs(T):
    """Decays of any sign, some of them 0, that N columns share."""
    a = (0.9 + 0.2 * normal(3, B, T, E, 1)) * np.sign(normal(5, B, T, E, 1))
    a = np.where(normal(4, B, T, E, 1) > 2, 0, a).astype(np.float32)
    return dict(a=a, b=normal(0, B, T, E, N)), {}


# Inputs of T steps, and the shape of a state.
SCANS = {
    "ssd": (ssd, ssd_inputs, (B, H, V, N)),
    "gated_linear_attention": (gated_linear_attention, gla_inputs, (B, H, D, V)),
    "delta_rule": (delta_rule, delta_inputs, (B, H, D, V)),
    "gated_delta_rule": (gated_delta_rule, gated_delta_inputs, (B, H, D, V)),
    "selective_scan": (selective_scan, selective_inputs, (B, E, N)),
    "linear_recurrence": (linear_recurrence, linear_inputs, (B, E, N)),
}


def packed(T, devices):
    """Segments that start on a device's first step, last over more than a device, come again."""
    n, ids = T // devices, np.zeros((B, T), np.int32)
    ids[0, n:] = 1
    ids[0, n + 2 :] = 0
    ids[0, T - n - 1 :] = 4
    ids[1, 3:] = 2  # to the end
    return ids


def program(op, arrays, devices=None, **options):
    """cotangents -> (what `op` gives, gradients in all floating arrays), on one device or many."""
    # NumPy's arrays are cut on the host; a jax.Array is by a program.
    fixed = {k: v for k, v in arrays.items() if not jnp.issubdtype(v.dtype, jnp.inexact)}
    moved = {k: v for k, v in arrays.items() if k not in fixed}
    call = functools.partial(op, **options)
    run = lambda arrays: call(**arrays)
    if devices is not None:
        # Arrays with as many steps as the first one are sharded.
        T = next(iter(arrays.values())).shape[1]
        timed = lambda name, x: x.ndim > 1 and x.shape[1] == T and name != "initial_state"
        specs = {k: TIME if timed(k, v) else WHOLE for k, v in arrays.items()}
        run = jax.shard_map(
            run, mesh=mesh_of(devices), in_specs=(specs,), out_specs=(TIME, WHOLE), check_vma=False
        )

    @jax.jit
    def everything(moved, fixed, cotangents):
        out, pull = jax.vjp(lambda moved: run(moved | fixed), moved)
        return out, pull(cotangents)[0]

    return functools.partial(everything, moved, fixed)


def whole(op, arrays, **options):
    """Cotangents, and what comes of them on one device."""
    outputs = jax.eval_shape(functools.partial(op, **options), **jax.tree.map(jnp.asarray, arrays))
    cotangents = tuple(normal(21 + i, *x.shape) for i, x in enumerate(outputs))
    return cotangents, program(op, arrays, **options)(cotangents)


def assert_close(got, want, name="", tolerance=2e-5):
    paths, _ = jax.tree.flatten_with_path(want)
    for (path, w), g in zip(paths, jax.tree.leaves(got), strict=True):
        w = np.asarray(w)
        assert np.isfinite(w).all()
        atol, where = tolerance * np.abs(w).max(initial=1e-3), jax.tree_util.keystr(path)
        np.testing.assert_allclose(g, w, atol=atol, rtol=0, err_msg=f"{name} {where}")


# One kind with one op, since affine_scan.py has tests of its own; all with all are slow.
QUICK = [("ssd", ("all_scan",))]


@pytest.mark.parametrize(
    ("name", "kinds"),
    QUICK
    + [
        pytest.param(name, SCAN_KINDS, marks=pytest.mark.slow)
        for name in SCANS
        if name != "delta_rule"
    ],
    ids=str,
)
def test_packed_sequences_with_a_state(name, kinds):
    """Values, the last state and all gradients, with decays from none to infinite, of each kind."""
    op, inputs, shape = SCANS[name]
    arrays, options = inputs(24)
    arrays["initial_state"], ids = normal(20, *shape), packed(24, 4)
    before = np.array([0, 7], np.int32)
    joined = np.concatenate([before[:, None], ids], 1)
    cotangents, want = whole(op, arrays | dict(segment_ids=joined), **options)
    arrays |= dict(segment_ids=ids, segment_before=before)

    def every_kind(**arrays):
        call = functools.partial(getattr(scans, name), **options)
        return tuple(zip(*(call(**arrays, kind=kind) for kind in kinds), strict=True))

    run = program(every_kind, arrays, 4)
    for i, kind in enumerate(kinds):
        # Where the others' cotangents are 0, gradients are this kind's.
        own = [tuple(x * (i == j) for j in range(len(kinds))) for x in cotangents]
        (y, final), gradients = run(tuple(own))
        assert_close(((y[i], final[i]), gradients), want, kind)


@pytest.mark.parametrize(
    ("name", "devices", "kind"),
    [
        pytest.param("gated_linear_attention", 3, "chain", marks=pytest.mark.slow),
        pytest.param("gated_linear_attention", 3, "all_scan", marks=pytest.mark.slow),
        pytest.param("ssd", 8, "all_scan", marks=pytest.mark.slow),
        pytest.param("delta_rule", 3, "log_step", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_devices_from_zeros(name, devices, kind):
    op, inputs, _ = SCANS[name]
    arrays, options = inputs(24)
    cotangents, want = whole(op, arrays, **options)
    run = program(getattr(scans, name), arrays, devices, kind=kind, **options)
    assert_close(run(cotangents), want)


@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3)), 8])
def test_short_convolution(devices):
    """Segments that start in the halo; on 8 devices, a halo of all that they have."""
    _, arrays, options = short_convolution_inputs()
    cotangents, want = of_short_convolution()
    run = program(convolutions.short_convolution, arrays, devices, **options)
    assert_close(run(cotangents), want)


def short_convolution_inputs():
    """Arrays of one device, of many, and options."""
    T, W, ids = 24, 4, packed(24, 3)
    ids[0, 7], ids[1, 14] = 9, 3
    arrays = dict(x=normal(0, B, T, E), weight=normal(1, W, E), bias=normal(2, E))
    arrays["initial_state"] = normal(3, B, W - 1, E)
    before, options = np.array([0, 7], np.int32), dict(activation="silu")
    joined = np.concatenate([before[:, None], ids], 1)
    split = arrays | dict(segment_ids=ids, segment_before=before)
    return arrays | dict(segment_ids=joined), split, options


@functools.cache
def of_short_convolution():
    arrays, _, options = short_convolution_inputs()
    return whole(short_convolution, arrays, **options)


def test_a_halo_is_no_longer_than_the_device_before_is():
    arrays = dict(x=normal(0, B, 16, E), weight=normal(1, 4, E))
    with pytest.raises(ValueError, match="reads 3 inputs .* at most 5 devices along 'sequence'"):
        program(convolutions.short_convolution, arrays, 8)(None)


@pytest.mark.parametrize(
    ("K", "devices"),
    [(30, 4)]
    + [pytest.param(*c, marks=pytest.mark.slow) for c in ((1, 4), (7, 4), (8, 4), (20, 8))],
    ids=str,
)
def test_long_convolution(K, devices):
    """Kernels of one step, up to a device's 6 steps and one, and longer than the sequence; 6
    channels on 4 and on 8 devices."""
    T = 24
    arrays = dict(u=normal(0, B, T, E), kernel=normal(1, K, E), D=normal(2, E))
    arrays |= dict(pre_gate=normal(3, B, T, E), post_gate=normal(4, B, T, E))
    arrays["initial_state"] = normal(5, B, K - 1, E)
    cotangents, want = whole(long_convolution, arrays)
    assert_close(program(convolutions.long_convolution, arrays, devices)(cotangents), want)


def test_long_convolution_by_a_device_s_own_columns():
    u, kernel = normal(0, B, 24, E), normal(1, 24, E)
    part = jax.jit(
        jax.shard_map(
            lambda u, kernel: convolutions.long_convolution(u, kernel)[0],
            mesh=mesh_of(3),
            in_specs=(TIME, P(None, "sequence")),
            out_specs=TIME,
        )
    )
    assert_close(part(u, kernel), long_convolution(u, kernel)[0])
    with pytest.raises(ValueError, match=r"own \[K, E / P\] with u's E = 6 and P = 3"):
        part(u, normal(1, 24, 9))
