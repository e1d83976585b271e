"""States from device to device: an exclusive scan of (decay, state) pairs along a mesh axis.

A recurrence that is affine in its state leaves one pair for a device's stretch of time: what the
stretch adds to the state, from zeros, and what it does to the state that enters. With device p
after devices 0 ... p - 1,

    S_in(0) = S_0,    S_in(p + 1) = A(p) S_in(p) + S(p)

by elements, or with a matrix A(p). Four schedules compute S_in, all of them exactly:

    "chain"       P - 1 messages, each of a state, one after the other (LASP, arXiv 2404.02882)
    "all_gather"  every device gathers all pairs and folds those before it (LASP-2, 2502.07563)
    "all_scan"    a chain of K blocks of the state, all devices at work at once: P + K - 2 messages
                  of a block. What is sent does not depend on P (ZeCO, 2507.01004)
    "log_step"    1 + ceil(log2(P - 1)) messages of a pair (Hillis and Steele)

A cotangent of S_in travels the other way by the same recurrence, dS(p) = A(p+1)^T dS(p+1) +
dS_in(p+1), so the backward pass is the same scan, reversed. Kept for it are A and S_in alone.

All of it is for the inside of `jax.shard_map`. Every device runs the same program, so devices send
also where nobody needs what they send: in "all_scan" (P + K - 2) / K states in all, not one, but
for TPUs, where a kernel sends by remote copies.

Letters: p of P devices, K blocks, D decayed dim, V value dim.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from ops.attention_xla import varying
from ops.lowering import choose_when_lowered
from ops.sequence_parallel import all_scan_tpu
from ops.sequence_parallel.kinds import SCAN_KINDS

__all__ = ["affine_scan", "factor_scan", "from_last_device", "matrix_scan"]


def affine_scan(
    log_decay: Float[Array, "*#S"],
    state: Float[Array, "*S"],
    axis_name: str = "sequence",
    **options,
) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
    """(S_in, final state) of S -> exp(log_decay) S + state, device after device.

    Args:
      log_decay: of a device's whole stretch, at most 0; -inf forgets. Its shape is the state's, or
        has 1 where the decay is shared.
      state: what the stretch leaves, starting from zeros.
      axis_name: of the mesh, in the order of time.
      **options: as of `factor_scan`.

    Returns, raises: as `factor_scan`.
    """
    return factor_scan(jnp.exp(_wide(log_decay)), state, axis_name, **options)


def factor_scan(
    decay: Inexact[Array, "*#S"],
    state: Inexact[Array, "*S"],
    axis_name: str = "sequence",
    *,
    kind: str = "all_scan",
    blocks: int | None = None,
    split: int = -2,
    initial_state: Inexact[Array, "*S"] | None = None,
    reverse: bool = False,
) -> tuple[Inexact[Array, "*S"], Inexact[Array, "*S"]]:
    """(S_in, final state) of S -> decay S + state: factors of any value, real or complex.

    Args:
      decay, state, axis_name: as of `affine_scan`, the decay itself in place of its logarithm.
      kind: a name of `SCAN_KINDS`.
      blocks: K of "all_scan", a divisor of the dimension that is split; by default the least one
        from P on, or all of the dimension.
      split: the dimension that "all_scan" cuts into blocks.
      initial_state: the state before the whole sequence, the same on all devices; zeros when None.
      reverse: from the last device to the first.

    Returns:
      The state that enters each device, and the state after the whole sequence, the same on every
      device; float32 (float64, complex) at least. Both are differentiable, to any order.

    Raises:
      ValueError: shapes, kind or blocks that do not fit.
    """
    if decay.ndim != state.ndim or any(
        n not in (1, m) for n, m in zip(decay.shape, state.shape, strict=True)
    ):
        raise ValueError(
            f"the decay {decay.shape} must have the state's shape {state.shape}, or 1 where it is "
            "shared"
        )
    return _affine(decay, state, initial_state, axis_name, False, kind, blocks, split, reverse)


def matrix_scan(
    transition: Float[Array, "*B D D"],
    state: Float[Array, "*B D V"],
    axis_name: str = "sequence",
    *,
    kind: str = "all_scan",
    blocks: int | None = None,
    initial_state: Float[Array, "*B D V"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Array, "*B D V"], Float[Array, "*B D V"]]:
    """(S_in, final state) of S -> transition @ S + state, as `factor_scan`.

    Only the columns of a state are independent then, so "all_scan" cuts V into blocks. "all_gather"
    and "log_step" send the transitions too.

    Args:
      transition: of a device's whole stretch [..., D, D]; 1 where it is shared.
      state: [..., D, V].
      axis_name, kind, blocks, initial_state, reverse: as of `factor_scan`.
    """
    D = state.shape[-2]
    if transition.shape[-2:] != (D, D) or transition.ndim != state.ndim:
        raise ValueError(
            f"transition must be [..., D, D] for a state [..., D, V] = {state.shape}, got shape "
            f"{transition.shape}"
        )
    return _affine(transition, state, initial_state, axis_name, True, kind, blocks, -1, reverse)


def from_last_device(x: Array, axis_name: str = "sequence", *, reverse: bool = False) -> Array:
    """What the device at the end of time (at its start, if reverse) has, on every device."""
    return jax.lax.psum(jnp.where(_place(axis_name, reverse)[1], x, 0), axis_name)


class _Schedule(NamedTuple):
    axis_name: str
    matrix: bool
    kind: str
    blocks: int | None
    split: int
    reverse: bool

    @property
    def devices(self) -> int:
        return jax.lax.axis_size(self.axis_name)

    def place(self):
        """How many devices are before this one."""
        p = jax.lax.axis_index(self.axis_name)
        return self.devices - 1 - p if self.reverse else p

    def shift(self, tree, distance: int):
        """What the device `distance` before this one has; zeros if there is none."""
        pairs = [(i, i + distance) for i in range(self.devices - distance)]
        pairs = [(j, i) for i, j in pairs] if self.reverse else pairs
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis_name, pairs), tree)

    def through(self, A, S):
        """A S, or A B for a transition B."""
        return jnp.matmul(A, S, precision="highest") if self.matrix else A * S


def _affine(A, S, initial, axis_name, matrix, kind, blocks, split, reverse):
    if kind not in SCAN_KINDS:
        raise ValueError(f"kind={kind!r} is unknown; it must be one of {', '.join(SCAN_KINDS)}")
    if initial is not None and initial.shape != S.shape:
        raise ValueError(f"initial_state {initial.shape} must have the state's shape {S.shape}")
    size = S.shape[split]
    if blocks is not None and (blocks < 1 or size % blocks):
        raise ValueError(f"blocks={blocks} must divide the {size} rows or columns of the state")
    dtype = jnp.result_type(A, S, jnp.float32)
    A, S = A.astype(dtype), S.astype(dtype)
    first, last = _place(axis_name, reverse)
    A, S = varying((A, S), (A, S, first))
    schedule = _Schedule(axis_name, matrix, kind, blocks, split, reverse)
    # The first device's stretch starts from the initial state; the scan then is one from zeros.
    if initial is not None:
        initial = jnp.where(first, initial.astype(dtype), 0)
        S = S + schedule.through(A, initial)
    S_in = _scan(A, S, schedule)
    S_out = schedule.through(A, S_in) + S
    if initial is not None:
        S_in = S_in + initial
    return S_in, from_last_device(S_out, axis_name, reverse=reverse)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _place(axis_name, reverse):
    """Whether this device is the first, and the last, in time."""
    p, end = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name) - 1
    return (p == end, p == 0) if reverse else (p == 0, p == end)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scan(A, S, schedule):
    """S_in of the recurrence from zeros."""
    if schedule.devices == 1:
        return jnp.zeros_like(S)
    return _SCHEDULES[schedule.kind](A, S, schedule)


def _scan_fwd(A, S, schedule):
    S_in = _scan(A, S, schedule)
    return S_in, (A, S_in)


def _scan_bwd(schedule, residuals, dS_in):
    A, S_in = residuals
    A_t = jnp.swapaxes(A, -1, -2) if schedule.matrix else A
    dS = _scan(A_t, dS_in, schedule._replace(reverse=not schedule.reverse))
    if schedule.matrix:
        dA = jnp.matmul(dS, jnp.swapaxes(S_in, -1, -2), precision="highest")
    else:
        dA = dS * S_in
    shared = tuple(i for i, (n, m) in enumerate(zip(A.shape, dA.shape, strict=True)) if n != m)
    return jnp.sum(dA, shared, keepdims=True), dS


_scan.defvjp(_scan_fwd, _scan_bwd)


def _chain(A, S, schedule):
    """After i steps, devices 0 ... i have what they will keep."""
    step = lambda _, S_in: schedule.shift(schedule.through(A, S_in) + S, 1)
    return jax.lax.fori_loop(0, schedule.devices - 1, step, varying(jnp.zeros_like(S), S))


def _all_gather(A, S, schedule):
    """A fold of the pairs before p; for others the weight is 0 (2502.07563's Psi, printed -inf)."""
    p, P = schedule.place(), schedule.devices
    pairs = jax.lax.all_gather((A, S), schedule.axis_name)

    def step(i, S_in):
        r = P - 1 - i if schedule.reverse else i
        A, S = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, r, 0, False), pairs)
        return jnp.where(i < p, schedule.through(A, S_in) + S, S_in)

    return jax.lax.fori_loop(0, P - 1, step, varying(jnp.zeros_like(S), S))


def _log_step(A, S, schedule):
    """Shifted by one device, so that the scan is exclusive; then pairs of 2, 4, 8 ... devices.

    Where nothing is `distance` devices before, what arrives is the pair (0, 0): that leaves the
    state, and the decay is not needed any more.
    """
    A, S = schedule.shift((A, S), 1)
    distance = 1
    while distance < schedule.devices - 1:
        if 2 * distance < schedule.devices - 1:
            A_before, S_before = schedule.shift((A, S), distance)
            A, S = schedule.through(A, A_before), schedule.through(A, S_before) + S
        else:
            S = schedule.through(A, schedule.shift(S, distance)) + S
        distance *= 2
    return S


def _all_scan(A, S, schedule):
    """On TPUs by remote copies within a kernel, where it takes the state; else by collectives."""

    def pick(platform):
        if platform != "tpu" or all_scan_tpu.unsupported(A, S, schedule) is not None:
            return None
        return functools.partial(all_scan_tpu.scan, schedule=schedule)

    return choose_when_lowered(pick, functools.partial(_ticks, schedule=schedule), A, S)


def _ticks(A, S, schedule):
    """At tick t, device p is at block t - p: it sends what leaves it, and keeps what arrives."""
    p, P = schedule.place(), schedule.devices
    size, split = S.shape[schedule.split], schedule.split % S.ndim
    K = schedule.blocks or next((k for k in range(P, size) if size % k == 0), size)
    cut = lambda x: jnp.moveaxis(
        x.reshape(*x.shape[:split], K, size // K, *x.shape[split + 1 :]), split, 0
    )
    of = lambda x, k: jax.lax.dynamic_index_in_dim(x, k, 0, False)
    shared = schedule.matrix or A.shape[split] == 1
    A, S = A if shared else cut(A), cut(S)

    def tick(t, S_in):
        k = jnp.clip(t - p, 0, K - 1)
        out = schedule.through(A if shared else of(A, k), of(S_in, k)) + of(S, k)
        arrived = schedule.shift(out, 1)
        k = t + 1 - p
        here = (p > 0) & (0 <= k) & (k < K)
        k = jnp.clip(k, 0, K - 1)
        return jax.lax.dynamic_update_index_in_dim(
            S_in, jnp.where(here, arrived, of(S_in, k)), k, 0
        )

    S_in = jax.lax.fori_loop(0, P + K - 2, tick, varying(jnp.zeros_like(S), S))
    S_in = jnp.moveaxis(S_in, 0, split)
    return S_in.reshape(*S_in.shape[:split], size, *S_in.shape[split + 2 :])


_SCHEDULES = dict(chain=_chain, all_gather=_all_gather, log_step=_log_step, all_scan=_all_scan)
