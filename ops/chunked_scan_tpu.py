"""Chunked scans on TPUs: translates `ops.chunked_scan`'s arguments to pallas_kernels.tpu.ssd.

What is decided here: heads before time, padding to blocks, how long chunks and blocks are, how
many programs share the heads, and what the kernels can't do.

Letters: B batch, T time, H heads, G groups of heads, D key dim, P value dim, C chunk, N chunks.
"""

import dataclasses
import math

import jax.numpy as jnp

from pallas_kernels.tpu import ssd as kernels

VMEM_LIMIT = 48 * 2**20
# Of it, for the states of the heads that a program goes through in turn.
STATES_LIMIT = 8 * 2**20
LONGEST_CHUNK = 256
DTYPES = (jnp.bfloat16, jnp.float32)
NOTHING = -160.0  # a log-decay in units of log 2 that stands for 0


def unsupported(q, k, v, log_decay, initial_state, chunk):
    """Why the kernels can't take these arguments, in words that say what would work; or None."""
    if not all(x.dtype in DTYPES for x in (q, k, v)) or initial_state.dtype != jnp.float32:
        return f"q, k and v are {q.dtype}; bfloat16 and float32 have a kernel"
    for name, size in (("D", q.shape[3]), ("P", v.shape[3])):
        if not 8 <= size <= 256 or size % 8:
            return (
                f"the state's dimension {name}={size}; multiples of 8 from 8 to 256 have a kernel"
            )
    if chunk is not None and chunk > LONGEST_CHUNK:
        return f"chunk={chunk}; up to {LONGEST_CHUNK} have a kernel"
    if chunk is not None and log_decay.shape[3] > 1 and chunk & (chunk - 1):
        return f"chunk={chunk} with decays by dimension; powers of 2 have a kernel"
    return None


def forward(q, k, v, log_decay, initial_state, *, chunk=None, interpret=False):
    """(o [B, T, H, P], final_state [B, H, D, P]); arguments as `ops.chunked_scan`'s."""
    plan = Plan.of(q, k, v, log_decay, initial_state, chunk)
    o, state = kernels.forward(
        *map(plan.split, (q, k, v)), plan.decay(log_decay), initial_state.swapaxes(2, 3),
        plan.block, plan.programs, vmem_limit=VMEM_LIMIT, interpret=interpret,
    )  # fmt: skip
    return plan.join(o), state.swapaxes(2, 3)


def backward(q, k, v, log_decay, initial_state, do, d_final, *, chunk=None, interpret=False):
    """The gradients of q, k, v, log_decay and initial_state, in their shapes and dtypes."""
    plan = Plan.of(q, k, v, log_decay, initial_state, chunk)
    options = dict(vmem_limit=VMEM_LIMIT, interpret=interpret)
    q_, k_, v_, do = map(plan.split, (q, k, v, do))
    a = plan.decay(log_decay)
    borders = kernels.borders(
        k_, v_, a, initial_state.swapaxes(2, 3), plan.block, plan.programs, **options
    )
    *gradients, da, d_initial = kernels.backward(
        q_, k_, v_, a, borders, do, d_final.swapaxes(2, 3), plan.block, plan.programs, **options
    )
    gradients = [plan.gradient(g, x) for g, x in zip(gradients, (q, k, v), strict=True)]
    return *gradients, plan.decay_gradient(da, log_decay), d_initial.swapaxes(2, 3)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the kernels walk one problem."""

    T: int
    block: kernels.Block
    programs: int

    @classmethod
    def of(cls, q, k, v, log_decay, state, chunk):
        T, (B, H, D, P) = q.shape[1], state.shape
        block = kernels.block_for(log_decay.shape[3] > 1, q.dtype.itemsize)
        wanted = chunk or block.chunk
        # A short sequence is one chunk of as few steps as a vector register has rows for.
        C = min(wanted, max(16, 1 << (T - 1).bit_length()))
        N = -(-T // C)
        chunks = max(1, block.steps // wanted)
        chunks = -(-N // -(-N // chunks))
        G = min(x.shape[2] for x in (q, k, v))
        return cls(T, kernels.Block(C, chunks), _programs(B, H, G, P * max(D, kernels.LANES)))

    @property
    def padded(self):
        return -(-self.T // self.block.steps) * self.block.steps

    def split(self, x):
        """[B, T, heads, F] -> [B, heads, T, F], padded with zeros."""
        x = x.swapaxes(1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, self.padded - self.T), (0, 0)))

    def join(self, x):
        return x[:, :, : self.T].swapaxes(1, 2)

    def decay(self, log_decay):
        """`a` of the kernels."""
        a = jnp.maximum(log_decay * math.log2(math.e), NOTHING)
        a = self.split(a)
        if a.shape[3] > 1:
            return a
        a = a.reshape(*a.shape[:2], -1, self.block.chunk)
        coarse = jnp.round(a * 256) / 256
        return jnp.stack([jnp.cumsum(coarse, 3), jnp.cumsum(a - coarse, 3)], 3)

    def gradient(self, g, x):
        """A kernel's gradient of x [B, T, heads, F], summed over the programs of its heads."""
        if g.shape[1] != x.shape[2]:
            B, programs, T, F = g.shape
            g = jnp.sum(g.reshape(B, x.shape[2], programs // x.shape[2], T, F), 2)
        return self.join(g).astype(x.dtype)

    def decay_gradient(self, da, log_decay):
        if log_decay.shape[3] == 1:
            from_each, before = da[:, :, :, 0], da[:, :, :, 1]
            da = jnp.cumsum(from_each[..., ::-1], 3)[..., ::-1]
            da = da + jnp.cumsum(before, 3) - before
            da = da.reshape(*da.shape[:2], -1, 1)
        da = self.join(da)
        if log_decay.shape[2] < da.shape[2]:
            da = jnp.sum(da, 2, keepdims=True)
        return jnp.where(log_decay * math.log2(math.e) > NOTHING, da, 0.0)


def _programs(B, H, G, state):
    """Parts of the heads that run apart: G, or more of them where the states take much memory, or
    where a single one would leave the second core of a chip idle.
    """
    sizes = [G * parts for parts in range(1, H // G + 1) if (H // G) % parts == 0]
    fits = [n for n in sizes if 4 * state * (H // n) <= STATES_LIMIT] or sizes[-1:]
    several = [n for n in fits if B * n > 1]
    return (several or fits)[0]
