"""The four schedules of `ops.sequence_parallel.affine_scan`, and their backward pass.

Letters: p of P devices, K blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tilescan.ops.attention_xla import varying
from tilescan.ops.lowering import choose_when_lowered
from tilescan.ops.reverse_mode import written_vjp
from tilescan.ops.sequence_parallel import all_scan_tpu

__all__ = ["Schedule", "scan"]


class Schedule(NamedTuple):
    """How pairs (A, S) are scanned.

    A is an array, or a pair (keep, one array that is the same on all devices), which is not sent.

    Attributes:
      axis_name: of the mesh.
      matrix: whether A multiplies S as a matrix, or by elements.
      kind: a name of `SCAN_KINDS`.
      blocks, split: into how many blocks "all_scan" cuts which dimension of S.
      reverse: from the last device to the first.
    """

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

    def shift_pair(self, A, S, distance: int):
        own, S = self.shift((_own(A), S), distance)
        return _of_device(A, own), S

    def through(self, A, S):
        """A S."""
        if isinstance(A, tuple):
            keep, A = A
            S = keep * S
        return self._times(A, S)

    def after(self, A, B):
        """The transition A behind the transition B."""
        if isinstance(A, tuple):
            return A[0] * B[0], self._times(A[1], B[1])
        return self._times(A, B)

    def transposed(self, A):
        if isinstance(A, tuple):
            return A[0], self.transposed(A[1])
        return jnp.swapaxes(A, -1, -2) if self.matrix else A

    def _times(self, A, S):
        return jnp.matmul(A, S, precision="highest") if self.matrix else A * S


def _own(A):
    """The part of a transition that differs from device to device."""
    return A[0] if isinstance(A, tuple) else A


def _of_device(A, own):
    return (own, A[1]) if isinstance(A, tuple) else own


@functools.partial(written_vjp, nondiff_argnums=(2,))
def scan(A, S, schedule: Schedule):
    """S_in of the recurrence from zeros, of this device's pair of arrays of one dtype."""
    if schedule.devices == 1:
        return jnp.zeros_like(S)
    return _SCHEDULES[schedule.kind](A, S, schedule)


def _scan_fwd(A, S, schedule):
    S_in = scan(A, S, schedule)
    return S_in, (A, S_in)


def _scan_bwd(schedule, residuals, dS_in):
    A, S_in = residuals
    back = schedule._replace(reverse=not schedule.reverse)
    dS = scan(schedule.transposed(A), dS_in, back)
    (dA,) = jax.vjp(lambda A: schedule.through(A, S_in), A)[1](dS)
    return dA, dS


scan.defvjp(_scan_fwd, _scan_bwd)


def _chain(A, S, schedule):
    """After i steps, devices 0 ... i have what they will keep."""
    step = lambda _, S_in: schedule.shift(schedule.through(A, S_in) + S, 1)
    return jax.lax.fori_loop(0, schedule.devices - 1, step, varying(jnp.zeros_like(S), S))


def _all_gather(A, S, schedule):
    """A fold of the pairs before p; for others the weight is 0 (2502.07563's Psi, printed -inf)."""
    p, P = schedule.place(), schedule.devices
    pairs = jax.lax.all_gather((_own(A), S), schedule.axis_name)

    def step(i, S_in):
        r = P - 1 - i if schedule.reverse else i
        own, S = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, r, 0, False), pairs)
        return jnp.where(i < p, schedule.through(_of_device(A, own), S_in) + S, S_in)

    return jax.lax.fori_loop(0, P - 1, step, varying(jnp.zeros_like(S), S))


def _log_step(A, S, schedule):
    """Shifted by one device, so that the scan is exclusive; then pairs of 2, 4, 8 ... devices.

    Where nothing is `distance` devices before, what arrives is the pair (0, 0): that leaves the
    state, and the decay is not needed any more.
    """
    A, S = schedule.shift_pair(A, S, 1)
    distance = 1
    while distance < schedule.devices - 1:
        if 2 * distance < schedule.devices - 1:
            A_before, S_before = schedule.shift_pair(A, S, distance)
            A, S = schedule.after(A, A_before), schedule.through(A, S_before) + S
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
    # Of a device's own matrices none is cut: blocks are columns of the state.
    whole = lambda a: schedule.matrix and not isinstance(A, tuple) or a.shape[split] == 1
    A_of = jax.tree.map(lambda a: (lambda k: a) if whole(a) else functools.partial(of, cut(a)), A)
    S = cut(S)

    def tick(t, S_in):
        k = jnp.clip(t - p, 0, K - 1)
        A = jax.tree.map(lambda a: a(k), A_of)
        out = schedule.through(A, of(S_in, k)) + of(S, k)
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
