"""The scan of states over devices, in each of its schedules."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tilescan.ops.sequence_parallel.affine_scan import (
    affine_scan,
    factor_scan,
    matrix_scan,
    power_scan,
)
from tilescan.ops.sequence_parallel.kinds import SCAN_KINDS

B, D, V = 2, 6, 4


def over_devices(call, devices, check_vma=True):
    """call(A, S, S_0) of pairs [p, ...] and a state, one pair on each of `devices`."""
    mesh = jax.make_mesh(
        (devices,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def one(A, S, S_0):
        S_in, final = call(A[0], S[0], initial_state=S_0)
        return S_in[None], final

    sharded = P("sequence")
    return jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(sharded, sharded, P()),
        out_specs=(sharded, P()),
        check_vma=check_vma,
    )


def pairs(devices, shape, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (devices, *shape), (devices, B, D, V), (B, D, V)
    return [rng.standard_normal(s, np.float32) for s in shapes]


def combine(earlier, later):
    (A, S), (B, T) = earlier, later
    through = jnp.matmul if A.shape[-1] == A.shape[-2] == D else jnp.multiply
    return through(B, A), through(B, S) + T


def by_associative_scan(A, S, S_0, reverse=False):
    """S_in and the last state from all pairs on one device, the state as a pair before them."""
    join = lambda x, first: jnp.concatenate([x, first] if reverse else [first, x])
    A, S = join(A, jnp.zeros_like(A[:1])), join(S, S_0[None])
    _, S = jax.lax.associative_scan(combine, (A, S), reverse=reverse)
    return (S[1:], S[0]) if reverse else (S[:-1], S[-1])


# What one device's decay is like, how it is scanned, and the direction.
CASES = {
    "a decay for each row": ((B, D, 1), factor_scan, False),
    "one decay, backwards": ((1, 1, 1), factor_scan, True),
    "matrices": ((B, D, D), matrix_scan, False),
    "one matrix, backwards": ((1, D, D), matrix_scan, True),
}


# Each kind with a decay or a matrix, forwards or backwards; all of it is slow.
QUICK = {
    "a decay for each row": SCAN_KINDS[:2],
    "one decay, backwards": SCAN_KINDS[2:],
    "matrices": SCAN_KINDS[2:],
}


@pytest.mark.parametrize(
    ("name", "devices", "kinds"),
    [(name, 3, kinds) for name, kinds in QUICK.items()]
    + [pytest.param(name, n, SCAN_KINDS, marks=pytest.mark.slow) for name in CASES for n in (3, 8)]
    + [("matrices", 1, SCAN_KINDS)],
    ids=str,
)
def test_is_the_associative_scan_of_the_pairs(name, devices, kinds):
    """Values and gradients of all three arguments, of each kind."""
    shape, scan, reverse = CASES[name]
    arrays = pairs(devices, shape)
    dS_in, dfinal = pairs(devices, shape, 1)[1:]

    def everything(call, A, S, S_0):
        out, pull = jax.vjp(call, A, S, S_0)
        return out, pull((dS_in, dfinal))

    def every_kind(*arrays):
        calls = [functools.partial(scan, kind=kind, reverse=reverse) for kind in kinds]
        vma = not reverse
        return [everything(over_devices(call, devices, vma), *arrays) for call in calls]

    with jax.default_matmul_precision("highest"):
        whole = functools.partial(by_associative_scan, reverse=reverse)
        want = jax.jit(functools.partial(everything, whole))(*arrays)
    size = max(np.abs(x).max() for x in jax.tree.leaves(want))
    for kind, got in zip(kinds, jax.jit(every_kind)(*arrays), strict=True):
        close = functools.partial(np.testing.assert_allclose, atol=1e-5 * size, err_msg=kind)
        jax.tree.map(close, got, want)


@pytest.mark.parametrize(
    ("columns", "devices", "reverse"),
    [(1, 3, True)] + [pytest.param(D, n, n == 8, marks=pytest.mark.slow) for n in (5, 8)],
    ids=str,
)
def test_one_transition_for_all_devices(columns, devices, reverse):
    """As matrices of each column, 0 where it is forgotten: values and gradients, of each kind."""
    _, S, S_0 = pairs(devices, ())
    M = np.random.default_rng(2).standard_normal((B, D, columns), np.float32)
    keep = np.float32(np.random.default_rng(3).random((devices, 1, 1, V)) < 0.7)
    dS_in, dfinal = pairs(devices, (), 1)[1:]

    def by_matrices(M, S, S_0):
        A = M if columns == D else M * jnp.eye(D)[None]
        A = jnp.einsum("bij,pkv->pbvij", A, keep[:, 0])
        own = lambda S: S.swapaxes(-1, -2)[..., None]
        S_in, final = by_associative_scan(A, own(S), own(S_0), reverse)
        return S_in[..., 0].swapaxes(-1, -2), final[..., 0].swapaxes(-1, -2)

    def everything(call, *arrays):
        out, pull = jax.vjp(call, *arrays)
        return out, pull((dS_in, dfinal))

    def of_kind(kind, M, S, S_0):
        call = lambda keep, S, initial_state: power_scan(
            M, keep, S, kind=kind, reverse=reverse, initial_state=initial_state
        )
        return over_devices(call, devices, not reverse)(keep, S, S_0)

    def every_kind(*arrays):
        return [everything(functools.partial(of_kind, kind), *arrays) for kind in SCAN_KINDS]

    with jax.default_matmul_precision("highest"):
        want = jax.jit(functools.partial(everything, by_matrices))(M, S, S_0)
    size = max(np.abs(x).max() for x in jax.tree.leaves(want))
    for kind, got in zip(SCAN_KINDS, jax.jit(every_kind)(M, S, S_0), strict=True):
        close = functools.partial(np.testing.assert_allclose, atol=1e-5 * size, err_msg=kind)
        jax.tree.map(close, got, want)


def test_a_decay_of_nothing_forgets_and_has_no_gradient():
    """Log-decays of -inf and far below the least exponent, of every kind."""
    log_decay, S, S_0 = pairs(4, (B, D, 1))
    log_decay = -np.abs(log_decay)
    log_decay[:, :, 1], log_decay[:, :, 2] = -np.inf, -1e4

    def every_kind(*arrays):
        calls = [functools.partial(affine_scan, kind=kind) for kind in SCAN_KINDS]
        return [over_devices(call, 4)(*arrays) for call in calls]

    def loss(*arrays):
        return sum(jnp.sum(S_in * S) + jnp.sum(final) for S_in, final in every_kind(*arrays))

    run = jax.jit(lambda *arrays: (every_kind(*arrays), jax.grad(loss, (0, 1, 2))(*arrays)))
    outputs, (da, *dS) = jax.tree.map(np.asarray, run(log_decay, S, S_0))
    for S_in, final in outputs:
        np.testing.assert_array_equal(S_in[1:, :, 1:3], S[:-1, :, 1:3])
        np.testing.assert_array_equal(final[:, 1:3], S[-1, :, 1:3])
    assert all(np.isfinite(x).all() for x in (da, *dS))
    assert not da[:, :, 1:3].any() and da[:, :, 3:].all()


def test_the_backward_pass_is_the_transpose():
    """<J x, y> = <x, J^T y> in float64, J by differences: the scan is linear in (S, S_0)."""
    A, S, S_0 = (x.astype(np.float64) for x in pairs(3, (B, D, 1)))
    dS, dS_0 = (x.astype(np.float64) for x in pairs(3, (B, D, 1), 1)[1:])
    y = tuple(x.astype(np.float64) for x in pairs(3, (B, D, 1), 2)[1:])

    @jax.jit
    def run(S, S_0, y):
        out, pull = jax.vjp(lambda *x: over_devices(factor_scan, 3)(A, *x), S, S_0)
        return out, pull(y)

    with jax.enable_x64(True):
        there, pulled = run(S + dS, S_0 + dS_0, y)
        back, _ = run(S, S_0, y)
    moved = jax.tree.map(np.subtract, there, back)
    dot = lambda a, b: sum(np.vdot(x, z) for x, z in zip(a, b, strict=True))
    assert moved[0].dtype == np.float64
    np.testing.assert_allclose(dot(moved, y), dot((dS, dS_0), pulled), rtol=1e-12)


def messages(kind, devices, rows=16, backward=False, **options):
    """{collective: [bytes of one]} in the program of a device, for states [rows, 4] in float32."""

    def one(A, S):
        return factor_scan(A, S, kind=kind, **options)[0]

    mesh = jax.make_mesh(
        (devices,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    run = jax.shard_map(one, mesh=mesh, in_specs=P("sequence"), out_specs=P("sequence"))
    if backward:
        forward = run
        run = lambda A, S: jax.vjp(forward, A, S)[1](S)
    A, S = (jax.ShapeDtypeStruct((devices * rows, n), jnp.float32) for n in (1, 4))
    text = jax.jit(run).lower(A, S).compile().as_text()
    found = {}
    pattern = r"= \(?(f32\[[^=]*?)\)? (collective-permute|all-gather|all-reduce)(?:-start)?\("
    for shapes, name in re.findall(pattern, text):
        sizes = re.findall(r"f32\[([\d,]*)\]", shapes)
        count = sum(int(np.prod([int(n) for n in size.split(",")])) for size in sizes)
        found.setdefault(name, []).append(4 * count)
    return found


def test_what_devices_send():
    """In the compiled program; nothing is sent for the last state, which nobody reads.

    A state has 256 bytes, its decays 64. "all_scan" has one message in a loop of P + K - 2 ticks,
    of a K-th of the state whatever P is; what "all_gather" receives grows with P.
    """
    for P_ in (2, 8):
        assert messages("all_scan", P_, blocks=8) == {"collective-permute": [32]}
        assert sum(messages("all_gather", P_)["all-gather"]) == P_ * (256 + 64)
    assert messages("chain", 8) == {"collective-permute": [256]}
    backward = messages("all_scan", 8, backward=True, blocks=8)
    assert backward == {"collective-permute": [32] * 2}
    # log2 of 7 pairs, rounded up, and the shift by one device; the last sends states alone.
    steps = messages("log_step", 8)["collective-permute"]
    assert sorted(steps) == sorted(3 * [256, 64] + [256])


def test_blocks_are_as_many_as_devices_where_they_divide_the_rows():
    """K, the least divisor of the rows from P on: 16 rows on 3 devices are 4 blocks of 64 bytes."""
    assert messages("all_scan", 3) == {"collective-permute": [64]}
    assert messages("all_scan", 8, rows=6) == {"collective-permute": [16]}


def test_errors_name_the_argument():
    A, S, S_0 = pairs(2, (B, D, 1))
    run = lambda call: jax.eval_shape(over_devices(call, 2), A, S, S_0)
    with pytest.raises(ValueError, match="kind='ring' is unknown; it must be one of all_scan"):
        run(functools.partial(factor_scan, kind="ring"))
    with pytest.raises(ValueError, match="blocks=4 must divide the 6 rows"):
        run(functools.partial(factor_scan, blocks=4))
    with pytest.raises(ValueError, match=r"transition must be \[..., D, D\]"):
        run(matrix_scan)
    with pytest.raises(ValueError, match=r"transition must be \[H, D, D\] or \[H, D, 1\] and keep"):
        run(lambda A, S, initial_state: power_scan(A, A, S))
    with pytest.raises(ValueError, match="the decay .* must have the state's shape"):
        run(lambda A, S, initial_state: factor_scan(A[:, :3], S))
    with pytest.raises(ValueError, match="initial_state .* must have the state's shape"):
        run(lambda A, S, initial_state: factor_scan(A, S, initial_state=initial_state[:1]))
