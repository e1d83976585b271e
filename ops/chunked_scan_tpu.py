"""Chunked scans on TPUs: translates `ops.chunked_scan`'s arguments to pallas_kernels.tpu.ssd.

Decided here: heads before time, padding to blocks, how long chunks and blocks are, how
many programs share the heads, and what the kernels can't do.

Dimensions: B batch, T time, H heads, G groups of heads, D key dim, P value dim, C chunk, N chunks.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tilescan.pallas_kernels.tpu import ssd as kernels

# What kernels may use, for narrow 2-byte inputs and for others. XLA keeps arrays in the rest of
# VMEM, and where a kernel asks for much more than it uses, libtpu may fail to place them on v5e.
VMEM_LIMITS = 16 * 2**20, 32 * 2**20
# Of it, for the states of the heads that a program visits in turn.
STATES_LIMIT = 8 * 2**20
LONGEST_CHUNK = 256
MOST_CHUNKS = 8  # of a grid step: their code is unrolled
DTYPES = (jnp.bfloat16, jnp.float32)
LOG2E = math.log2(math.e)
LOG2_OF_ZERO = -160.0  # a log-decay in units of log 2 that stands for 0


def unsupported(
    q: Float[Array, "B T _ D"],
    k: Float[Array, "B T _ D"],
    v: Float[Array, "B T _ P"],
    log_decay: Float[Array, "B T _ #D"],
    initial_state: Float[Array, "B H D P"],
    chunk: int | None,
) -> str | None:
    """Returns why the kernels can't take these arguments and what would work; None if they can."""
    if not all(x.dtype in DTYPES for x in (q, k, v)) or initial_state.dtype != jnp.float32:
        return f"q, k and v are {q.dtype}; bfloat16 and float32 have a kernel"
    for name, size in (("D", q.shape[3]), ("P", v.shape[3])):
        if size > 256:
            return f"the state's dimension {name}={size}; up to 256 have a kernel"
    if chunk is not None and chunk > LONGEST_CHUNK:
        return f"chunk={chunk}; up to {LONGEST_CHUNK} have a kernel"
    if chunk is not None and log_decay.shape[3] > 1 and chunk & (chunk - 1):
        return f"chunk={chunk} with decays by dimension; powers of 2 have a kernel"
    return None


def forward(
    q: Float[Array, "B T _ D"],
    k: Float[Array, "B T _ D"],
    v: Float[Array, "B T _ P"],
    log_decay: Float[Array, "B T _ #D"],
    initial_state: Float[Array, "B H D P"],
    *,
    chunk: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H D P"]]:
    """Returns (o, final_state); arguments as of `ops.chunked_scan`."""
    plan = Plan.of(q, k, v, log_decay, initial_state, chunk)
    o, state = kernels.forward(
        *plan.inputs(q, k, v, log_decay), plan.state(initial_state), plan.block, plan.programs,
        vmem_limit=plan.vmem_limit, interpret=interpret,
    )  # fmt: skip
    return plan.join(o, plan.P), plan.join_state(state)


def backward(
    q: Float[Array, "B T _ D"],
    k: Float[Array, "B T _ D"],
    v: Float[Array, "B T _ P"],
    log_decay: Float[Array, "B T _ #D"],
    initial_state: Float[Array, "B H D P"],
    do: Float[Array, "B T H P"],
    d_final: Float[Array, "B H D P"],
    *,
    chunk: int | None = None,
    interpret: Any = False,
) -> tuple[
    Float[Array, "B T _ D"],
    Float[Array, "B T _ D"],
    Float[Array, "B T _ P"],
    Float[Array, "B T _ #D"],
    Float[Array, "B H D P"],
]:
    """Returns the gradients of q, k, v, log_decay and initial_state, in their dtypes."""
    plan = Plan.of(q, k, v, log_decay, initial_state, chunk)
    shared = dict(vmem_limit=plan.vmem_limit, interpret=interpret)
    inputs = plan.inputs(q, k, v, log_decay)
    walk = plan.block, plan.programs
    borders = kernels.borders(*inputs[1:], plan.state(initial_state), *walk, **shared)
    *gradients, da, d_initial = kernels.backward(
        *inputs, borders, plan.split(do, 8), plan.state(d_final), *walk, **shared
    )
    gradients = [plan.gradient(g, x) for g, x in zip(gradients, (q, k, v), strict=True)]
    return *gradients, plan.decay_gradient(da, log_decay), plan.join_state(d_initial)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the kernels walk one problem.

    Attributes:
      T, D, P: steps, key dim and value dim.
      by_dim: whether each key dimension has a decay of its own.
      block: steps of a chunk, and chunks of a grid step.
      programs: how many share the heads.
      vmem_limit: bytes that the kernels may use.
    """

    T: int
    D: int
    P: int
    by_dim: bool
    block: kernels.Block
    programs: int
    vmem_limit: int

    @classmethod
    def of(
        cls,
        q: Float[Array, "B T _ D"],
        k: Float[Array, "B T _ D"],
        v: Float[Array, "B T _ P"],
        log_decay: Float[Array, "B T _ #D"],
        state: Float[Array, "B H D P"],
        chunk: int | None,
    ) -> "Plan":
        """Returns the plan for `forward`'s arguments."""
        T, (B, H, D, P) = q.shape[1], state.shape
        by_dim = log_decay.shape[3] > 1
        block = kernels.block_for(by_dim, q.dtype.itemsize)
        wanted = chunk or block.chunk
        # A short sequence is one chunk of as few steps as a vector register has rows for.
        C = min(wanted, max(16, 1 << (T - 1).bit_length()))
        N = -(-T // C)
        chunks = max(1, min(block.steps // wanted, MOST_CHUNKS))
        chunks = -(-N // -(-N // chunks))
        G = min(x.shape[2] for x in (q, k, v))
        programs = _programs(B, H, G, P * _up(D, kernels.LANES))
        states = 4 * P * _up(D, kernels.LANES) * (H // programs)
        narrow = q.dtype.itemsize == 2 and max(D, P) <= 128 and states <= 2**20
        limit = VMEM_LIMITS[0 if narrow else 1]
        return cls(T, D, P, by_dim, kernels.Block(C, chunks), programs, limit)

    @property
    def width(self) -> int:
        """The multiple to which D is padded.

        With decays by dimension that is a whole vector, which memory holds anyway: libtpu's
        profiler has no model for products of partial ones on v5e and v5p.
        """
        return kernels.LANES if self.by_dim else 8

    def inputs(
        self,
        q: Float[Array, "B T _ D"],
        k: Float[Array, "B T _ D"],
        v: Float[Array, "B T _ P"],
        log_decay: Float[Array, "B T _ #D"],
    ) -> tuple[Array, Array, Array, Array]:
        """Returns q, k, v and `a` of the kernels."""
        q, k, v = self.split(q, self.width), self.split(k, self.width), self.split(v, 8)
        a = self.split(
            jnp.maximum(log_decay * LOG2E, LOG2_OF_ZERO), self.width if self.by_dim else 1
        )
        if self.by_dim:
            return q, k, v, a
        a = a.reshape(*a.shape[:2], -1, self.block.chunks, 1, self.block.chunk)
        coarse = jnp.round(a * 256) / 256
        a = self.sums(jnp.concatenate([coarse, a - coarse], 4))
        return q, k, v, _pad(a.reshape(*a.shape[:3], -1, self.block.chunk), 3, 8)

    def sums(
        self, x: Float[Array, "*S C"], suffix: bool = False, inclusive: bool = True
    ) -> Float[Array, "*S C"]:
        """Returns prefix sums of x along C, or suffix sums."""
        lower = jnp.tri(self.block.chunk, k=0 if inclusive else -1, dtype=x.dtype)
        order = "...i,ij->...j" if suffix else "...j,ij->...i"
        return jnp.einsum(order, x, lower, precision="highest")

    def split(self, x: Float[Array, "B T h F"], width: int = 1) -> Float[Array, "B h _ _"]:
        """Returns x with heads before time, padded with zeros to blocks and to `width`."""
        return _pad(_pad(x.swapaxes(1, 2), 2, self.block.steps), 3, width)

    def join(self, x: Float[Array, "B h _ _"], F: int) -> Float[Array, "B _ h {F}"]:
        """Returns [B, T, heads, F], the inverse of `split`."""
        return x[:, :, : self.T, :F].swapaxes(1, 2)

    def state(self, S: Float[Array, "B H D P"]) -> Float[Array, "B H _ _"]:
        """Returns a state as [B, H, P, D], padded."""
        return _pad(_pad(S.swapaxes(2, 3), 2, 8), 3, self.width)

    def join_state(self, S: Float[Array, "B H _ _"]) -> Float[Array, "B H _ _"]:
        """Returns [B, H, D, P], the inverse of `state`."""
        return S[:, :, : self.P, : self.D].swapaxes(2, 3)

    def gradient(
        self, g: Float[Array, "B _ _ _"], x: Float[Array, "B T h F"]
    ) -> Float[Array, "B T h F"]:
        """Returns a kernel's gradient of x, summed over the programs of its heads."""
        if g.shape[1] != x.shape[2]:
            B, programs, T, F = g.shape
            g = jnp.sum(g.reshape(B, x.shape[2], programs // x.shape[2], T, F), 2)
        return self.join(g, x.shape[3]).astype(x.dtype)

    def decay_gradient(
        self, da: Float[Array, "B *_"], log_decay: Float[Array, "B T h F"]
    ) -> Float[Array, "B T h F"]:
        """Returns the gradient of log_decay from the kernel's."""
        if not self.by_dim:
            from_each, before = (da[:, :, :, i : 2 * self.block.chunks : 2] for i in (0, 1))
            da = self.sums(from_each, suffix=True) + self.sums(before, inclusive=False)
            da = da.reshape(*da.shape[:2], -1, 1)
        da = self.join(da, log_decay.shape[3])
        if log_decay.shape[2] < da.shape[2]:
            da = jnp.sum(da, 2, keepdims=True)
        return jnp.where(log_decay * LOG2E > LOG2_OF_ZERO, da, 0.0)


def _up(n, multiple):
    return -(-n // multiple) * multiple


def _pad(x, axis, multiple):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def _programs(B, H, G, state):
    """Returns how many programs share the heads.

    G, or a multiple where states take much memory or one program would leave a second core idle.
    """
    sizes = [G * times for times in range(1, H // G + 1) if (H // G) % times == 0]
    fits = [n for n in sizes if 4 * state * (H // n) <= STATES_LIMIT] or sizes[-1:]
    several = [n for n in fits if B * n > 1]
    return (several or fits)[0]
