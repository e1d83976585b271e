"""The four schedules of `ops.sequence_parallel.affine_scan`, and their backward pass.

Dimensions: p of P devices, K blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int32, PyTree

from tilescan.ops.attention_xla import varying
from tilescan.ops.lowering import choose_when_lowered, note, other_platform
from tilescan.ops.reverse_mode import written_vjp
from tilescan.ops.sequence_parallel import all_scan_tpu

__all__ = ["Schedule", "scan"]

# A of S -> A S: an array, or a pair (keep of this device, transition of all) for A (keep S).
Transition = Inexact[Array, "..."] | tuple[Inexact[Array, "..."], Inexact[Array, "..."]]


class Schedule(NamedTuple):
    """How pairs (A, S) are scanned.

    A is an array, or a pair (keep, an array that is the same on all devices and is not sent).

    Attributes:
      axis_name: of the mesh.
      matrix: whether A multiplies S as a matrix, or by elements.
      kind: a name of `SCAN_KINDS`.
      blocks, split: into how many blocks "all_scan" splits which dimension of S.
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
        """The number of devices along the axis."""
        return jax.lax.axis_size(self.axis_name)

    def index(self) -> Int32[Array, ""]:
        """Returns the number of devices before this one."""
        p = jax.lax.axis_index(self.axis_name)
        return self.devices - 1 - p if self.reverse else p

    def shift(self, tree: PyTree, distance: int) -> PyTree:
        """Returns the tree of the device `distance` before this one; zeros if there is none."""
        pairs = [(i, i + distance) for i in range(self.devices - distance)]
        pairs = [(j, i) for i, j in pairs] if self.reverse else pairs
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis_name, pairs), tree)

    def shift_pair(
        self, A: Transition, S: Inexact[Array, "*S"], distance: int
    ) -> tuple[Transition, Inexact[Array, "*S"]]:
        """Returns the pair of the device `distance` before this one; zeros if there is none."""
        own, S = self.shift((_device_part(A), S), distance)
        return _with_device_part(A, own), S

    def apply(self, A: Transition, S: Inexact[Array, "*S"]) -> Inexact[Array, "*S"]:
        """Returns A S."""
        if isinstance(A, tuple):
            keep, A = A
            S = keep * S
        return self._multiply(A, S)

    def compose(self, A: Transition, B: Transition) -> Transition:
        """Returns A B, the transition B followed by the transition A."""
        if isinstance(A, tuple):
            return A[0] * B[0], self._multiply(A[1], B[1])
        return self._multiply(A, B)

    def transposed(self, A: Transition) -> Transition:
        """Returns the transition of cotangents."""
        if isinstance(A, tuple):
            return A[0], self.transposed(A[1])
        return jnp.swapaxes(A, -1, -2) if self.matrix else A

    def _multiply(self, A, S):
        return jnp.matmul(A, S, precision="highest") if self.matrix else A * S


def _device_part(A):
    """Returns the part of a transition that differs between devices."""
    return A[0] if isinstance(A, tuple) else A


def _with_device_part(A, own):
    """Returns a transition with another device's part."""
    return (own, A[1]) if isinstance(A, tuple) else own


@functools.partial(written_vjp, nondiff_argnums=(2,))
def scan(A: Transition, S: Inexact[Array, "*S"], schedule: Schedule) -> Inexact[Array, "*S"]:
    """Returns S_in of the recurrence from zeros, for this device's pair of arrays of one dtype."""
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
    (dA,) = jax.vjp(lambda A: schedule.apply(A, S_in), A)[1](dS)
    return dA, dS


scan.defvjp(_scan_fwd, _scan_bwd)


def _chain(A, S, schedule):
    """Computes S_in by P - 1 messages: after i steps, devices 0 ... i have theirs."""
    step = lambda _, S_in: schedule.shift(schedule.apply(A, S_in) + S, 1)
    return jax.lax.fori_loop(0, schedule.devices - 1, step, varying(jnp.zeros_like(S), S))


def _all_gather(A, S, schedule):
    """Folds the gathered pairs before p; others have weight 0 (2502.07563's Psi, printed -inf)."""
    p, P = schedule.index(), schedule.devices
    pairs = jax.lax.all_gather((_device_part(A), S), schedule.axis_name)

    def step(i, S_in):
        r = P - 1 - i if schedule.reverse else i
        own, S = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, r, 0, False), pairs)
        return jnp.where(i < p, schedule.apply(_with_device_part(A, own), S_in) + S, S_in)

    return jax.lax.fori_loop(0, P - 1, step, varying(jnp.zeros_like(S), S))


def _log_step(A, S, schedule):
    """Shifts pairs by one device, for an exclusive scan, then combines 2, 4, 8 ... devices.

    Where no device is `distance` before, the pair (0, 0) arrives: it leaves the state unchanged,
    and the decay is not needed any more.
    """
    A, S = schedule.shift_pair(A, S, 1)
    distance = 1
    while distance < schedule.devices - 1:
        if 2 * distance < schedule.devices - 1:
            A_before, S_before = schedule.shift_pair(A, S, distance)
            A, S = schedule.compose(A, A_before), schedule.apply(A, S_before) + S
        else:
            S = schedule.apply(A, schedule.shift(S, distance)) + S
        distance *= 2
    return S


def _all_scan(A, S, schedule):
    """Computes S_in by remote copies in a kernel on TPUs, where it can; else by collectives."""

    def pick(platform):
        why = other_platform("TPUs", platform)
        if platform == "tpu":
            why = all_scan_tpu.unsupported(A, S, schedule)
        note("all_scan", why)
        if why is not None:
            return None
        return functools.partial(all_scan_tpu.scan, schedule=schedule)

    return choose_when_lowered(pick, functools.partial(_pipeline, schedule=schedule), A, S)


def _pipeline(A, S, schedule):
    """Pipelines blocks: at tick t, device p sends block t - p of A S_in + S and gets the next."""
    # K blocks, as the leading dimension; matrices of a device are not split: blocks are columns.
    p, P = schedule.index(), schedule.devices
    size, split = S.shape[schedule.split], schedule.split % S.ndim
    K = schedule.blocks or next((k for k in range(P, size) if size % k == 0), size)
    to_blocks = lambda x: jnp.moveaxis(
        x.reshape(*x.shape[:split], K, size // K, *x.shape[split + 1 :]), split, 0
    )
    block = lambda x, k: jax.lax.dynamic_index_in_dim(x, k, 0, False)
    whole = lambda a: schedule.matrix and not isinstance(A, tuple) or a.shape[split] == 1
    A_of = jax.tree.map(
        lambda a: (lambda k: a) if whole(a) else functools.partial(block, to_blocks(a)), A
    )
    S = to_blocks(S)

    def tick(t, S_in):
        k = jnp.clip(t - p, 0, K - 1)
        A = jax.tree.map(lambda a: a(k), A_of)
        out = schedule.apply(A, block(S_in, k)) + block(S, k)
        arrived = schedule.shift(out, 1)
        # What arrives is S_in of the next block, on a device that has one.
        k = t + 1 - p
        here = (p > 0) & (0 <= k) & (k < K)
        k = jnp.clip(k, 0, K - 1)
        return jax.lax.dynamic_update_index_in_dim(
            S_in, jnp.where(here, arrived, block(S_in, k)), k, 0
        )

    S_in = jax.lax.fori_loop(0, P + K - 2, tick, varying(jnp.zeros_like(S), S))
    S_in = jnp.moveaxis(S_in, 0, split)
    return S_in.reshape(*S_in.shape[:split], size, *S_in.shape[split + 2 :])


_SCHEDULES = dict(chain=_chain, all_gather=_all_gather, log_step=_log_step, all_scan=_all_scan)
