"""ZeCO's All-Scan with remote copies: states pass from device to device block by block.

S_in(0) = 0 and S_in(p + 1) = A(p) S_in(p) + S(p), by elements (arXiv 2507.01004, section 3.2). The
state's rows are divided into K blocks. As soon as a block of S_in(p) has arrived, that block of
S_in(p + 1) is computed and copied straight into the next device's S_in, while later blocks are
still in flight: P + K - 2 blocks of time, one state of traffic, and no idle messages, which a loop
of collectives sends in its first and last rounds.

A device must not write into its neighbor before the neighbor runs the kernel: a barrier between
neighbors ensures it. Every block has a buffer and semaphores of its own, so nothing is overwritten.

Dimensions: rows and V of a state, K blocks of rows, P devices.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

# Rows of a float32 tile in VMEM.
SUBLANES = 8
# Distinguishes the barrier of this kernel from those of others.
COLLECTIVE_ID = 11


def all_scan(
    A: Float[Array, "rows #V"],
    S: Float[Array, "rows V"],
    *,
    axis_name: str,
    blocks: int,
    reverse: bool = False,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "rows V"]:
    """Returns S_in of each device; called inside `jax.shard_map`.

    Args:
      A: the decay of a device's shard of time, float32.
      S: the state after a device's shard, starting from zeros, float32; rows is a multiple of
        SUBLANES * blocks.
      axis_name: of the mesh, in the order of time.
      blocks: K.
      reverse: from the last device to the first.
      interpret: False, or `pltpu.InterpretParams` on CPUs.
    """
    rows, V = S.shape
    n = rows // blocks
    return pl.pallas_call(
        functools.partial(
            _kernel, axis_name=axis_name, devices=jax.lax.axis_size(axis_name), blocks=blocks, n=n,
            reverse=reverse,
        ),
        out_shape=jax.ShapeDtypeStruct(S.shape, S.dtype),
        in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)] * 2,
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        scratch_shapes=[
            pltpu.VMEM((blocks, n, V), S.dtype),
            pltpu.SemaphoreType.DMA((blocks,)),
            pltpu.SemaphoreType.DMA((blocks,)),
        ],
        compiler_params=pltpu.CompilerParams(
            collective_id=COLLECTIVE_ID, has_side_effects=True,
            vmem_limit_bytes=vmem(rows, V, A.shape[1]) + 2**20,
        ),
        interpret=interpret,
        name="all_scan",
    )(A, S)  # fmt: skip


def vmem(rows: int, V: int, decays: int) -> int:
    """Returns the bytes of VMEM that the kernel takes: S, S_in, what is sent, and the decays."""
    lanes = lambda width: -(-width // 128) * 128
    return 4 * rows * (3 * lanes(V) + lanes(decays))


def _kernel(A, S, S_in, S_out, sent, received, *, axis_name, devices, blocks, n, reverse):
    # The device's index in the order of time, in which `step` leads to the next one.
    p = jax.lax.axis_index(axis_name)
    step = -1 if reverse else 1
    rank = devices - 1 - p if reverse else p
    has_before, has_after = rank > 0, rank < devices - 1
    # The one before may write once it is signaled; the first device starts from zeros.
    barrier = pltpu.get_barrier_semaphore()

    @pl.when(has_before)
    def _():
        pl.semaphore_signal(barrier, 1, device_id={axis_name: p - step})

    @pl.when(jnp.logical_not(has_before))
    def _():
        S_in[...] = jnp.zeros_like(S_in)

    @pl.when(has_after)
    def _():
        pl.semaphore_wait(barrier, 1)

    def copy(k):
        """Returns the copy of block k to the next device; it also waits for the previous one's."""
        return pltpu.make_async_remote_copy(
            S_out.at[k],
            S_in.at[pl.ds(k * n, n)],
            sent.at[k],
            received.at[k],
            device_id={axis_name: p + step},
        )

    # S_out = A S_in + S, block by block, each sent as soon as its S_in is there.
    for k in range(blocks):
        rows = pl.ds(k * n, n)

        @pl.when(has_before)
        def _(k=k):
            copy(k).wait_recv()

        @pl.when(has_after)
        def _(k=k, rows=rows):
            S_out[k] = A[rows] * S_in[rows] + S[rows]
            copy(k).start()

    # The buffers are freed at the end: all copies must have been read from them.
    for k in range(blocks):

        @pl.when(has_after)
        def _(k=k):
            copy(k).wait_send()
