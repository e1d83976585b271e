"""Recurrences and convolutions over time cut over devices are those of one device, exactly."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ops.delta_rule import delta_rule, gated_delta_rule
from ops.gated_linear_attention import gated_linear_attention
from ops.linear_recurrence import linear_recurrence
from ops.long_convolution import long_convolution
from ops.selective_scan import selective_scan
from ops.sequence_parallel import convolutions, scans
from ops.sequence_parallel.kinds import SCAN_KINDS
from ops.short_convolution import short_convolution
from ops.ssd import ssd

B, H, G, D, V, E, N = 2, 4, 2, 6, 5, 6, 3
TIME, WHOLE = P(None, "sequence"), P()


def mesh_of(devices):
    axes = (AxisType.Auto,)
    return jax.make_mesh((devices,), ("sequence",), axes, devices=jax.devices()[:devices])


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def strong(x, seed):
    """Log-decays: of the second row a tenth is very strong, and one in twenty forgets all."""
    u = np.random.default_rng(seed).random(x.shape)
    hard = np.where(u < 0.1, np.where(u < 0.05, -np.inf, 60 * x), x)
    return np.where(np.arange(B).reshape(-1, *(1,) * (x.ndim - 1)) == 1, hard, x)


def heads(T):
    q, k, v = normal(0, B, T, H, D), normal(1, B, T, G, D), normal(2, B, T, G, V)
    return q, k / np.linalg.norm(k, axis=-1, keepdims=True), v


def ssd_inputs(T):
    x, Bs, Cs = normal(0, B, T, H, V), normal(1, B, T, G, N), normal(2, B, T, G, N)
    dt = np.where(normal(4, B, T, H) > 1.8, 300, normal(3, B, T, H)).astype(np.float32)
    A, skip, bias = -np.exp(normal(5, H)), normal(6, H), normal(7, H)
    return dict(x=x, dt=dt, A=A, B=Bs, C=Cs, D=skip, dt_bias=bias), dict(dt_softplus=True)


def gla_inputs(T):
    decay = strong(-np.exp(normal(3, B, T, H, D)), 4)
    return dict(zip("qkv", heads(T), strict=True), log_decay=decay), {}


def delta_inputs(T):
    beta = 1 / (1 + np.exp(-normal(5, B, T, H)))
    return dict(zip("qkv", heads(T), strict=True), beta=beta), {}


def gated_delta_inputs(T):
    arrays, options = delta_inputs(T)
    return dict(arrays, log_decay=strong(-np.exp(normal(3, B, T, H) - 1), 4)), options


def selective_inputs(T):
    x, z, dt = normal(0, B, T, E), normal(8, B, T, E), 2 * normal(3, B, T, E)
    dt = np.where(normal(4, B, T, E) > 1.8, 300, dt).astype(np.float32)
    Bs, Cs = normal(1, B, T, N), normal(2, B, T, N)
    A, skip, bias = -np.exp(normal(5, E, N)), normal(6, E), normal(7, E)
    arrays = dict(x=x, dt=dt, A=A, B=Bs, C=Cs, D=skip, z=z, dt_bias=bias)
    return arrays, dict(dt_softplus=True)


def linear_inputs(T):
    """Decays of any sign, some of them 0, that N columns share."""
    a = np.where(normal(4, B, T, E, 1) > 2, 0, 0.6 * normal(3, B, T, E, 1)).astype(np.float32)
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
    ids[1, 3:] = 2
    return ids


def results(op, arrays, cotangents, devices=None, **options):
    """(what `op` gives, its gradients in all floating arrays), on one device or on many."""
    arrays = {k: jnp.asarray(v) for k, v in arrays.items()}
    fixed = {k: v for k, v in arrays.items() if not jnp.issubdtype(v.dtype, jnp.inexact)}
    moved = {k: v for k, v in arrays.items() if k not in fixed}
    call = functools.partial(op, **options)
    run = lambda arrays: call(**arrays)
    if devices is not None:
        # What has a step for each of the longest array's is cut.
        T = max(x.shape[1] for x in arrays.values() if x.ndim > 1)
        specs = {k: TIME if v.ndim > 1 and v.shape[1] == T else WHOLE for k, v in arrays.items()}
        run = jax.shard_map(
            run, mesh=mesh_of(devices), in_specs=(specs,), out_specs=(TIME, WHOLE), check_vma=False
        )

    @jax.jit
    def everything(moved, fixed, cotangents):
        out, pull = jax.vjp(lambda moved: run(moved | fixed), moved)
        return out, pull(cotangents)[0]

    return everything(moved, fixed, cotangents)


def assert_close(got, want, tolerance=2e-5):
    flat, _ = jax.tree.flatten_with_path(want)
    for (path, want), got in zip(flat, jax.tree.leaves(got), strict=True):
        want = np.asarray(want)
        assert np.isfinite(want).all()
        atol = tolerance * np.abs(want).max(initial=1e-3)
        np.testing.assert_allclose(got, want, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


@functools.cache
def on_one_device(name, T, full):
    """A case and what it is to give; `full` ones have a state and segments."""
    op, inputs, shape = SCANS[name]
    arrays, options = inputs(T)
    if full:
        arrays["initial_state"] = normal(20, *shape)
        arrays["segment_ids"] = np.concatenate([[[0], [7]], packed(T, 4)], 1).astype(np.int32)
    outputs = jax.eval_shape(functools.partial(op, **options), **jax.tree.map(jnp.asarray, arrays))
    cotangents = tuple(normal(21 + i, *x.shape) for i, x in enumerate(outputs))
    return arrays, options, cotangents, results(op, arrays, cotangents, **options)


@pytest.mark.parametrize("kind", SCAN_KINDS)
@pytest.mark.parametrize("name", SCANS)
def test_packed_sequences_with_a_state(name, kind):
    """Values, the last state and all gradients, with decays from none to infinite."""
    arrays, options, cotangents, want = on_one_device(name, 24, True)
    ids = arrays["segment_ids"]
    arrays = arrays | dict(segment_ids=ids[:, 1:], segment_before=ids[:, 0])
    got = results(getattr(scans, name), arrays, cotangents, 4, kind=kind, **options)
    assert_close(got, want)


@pytest.mark.parametrize(
    ("name", "devices", "kind"),
    [
        ("ssd", 8, "all_scan"),
        ("ssd", 1, "all_scan"),
        ("gated_linear_attention", 3, "all_scan"),
        ("gated_delta_rule", 3, "log_step"),
        ("selective_scan", 8, "log_step"),
        ("linear_recurrence", 3, "all_scan"),
    ],
)
def test_any_number_of_devices_from_zeros(name, devices, kind):
    arrays, options, cotangents, want = on_one_device(name, 24, False)
    got = results(getattr(scans, name), arrays, cotangents, devices, kind=kind, **options)
    assert_close(got, want)
