"""ZeCO's All-Scan with remote copies: states pass from device to device block by block.

S_in(0) = 0 and S_in(p + 1) = A(p) S_in(p) + S(p), by elements (arXiv 2507.01004, section 3.2). The
state's rows are cut into K blocks. As soon as a block of S_in has arrived, what leaves the device
of it is computed and copied straight into the next device's S_in, while later blocks are still on
their way: P + K - 2 blocks of time, one state of traffic, and no idle messages, which a loop of
collectives sends in its first and last rounds.

A device must not write into its neighbour before that has entered the kernel: a barrier between
neighbours says so. Every block has a place and semaphores of its own, so nothing is overwritten.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Rows of a float32 tile in VMEM.
SUBLANES = 8
# Distinguishes the barrier of this kernel from those of others.
COLLECTIVE_ID = 11


def all_scan(
    A: jax.Array,
    S: jax.Array,
    *,
    axis_name: str,
    blocks: int,
    reverse: bool = False,
    interpret=False,
) -> jax.Array:
    """S_in [rows, V] of each device; called inside `jax.shard_map`.

    Args:
      A: decays of a device's stretch, float32 [rows, V] or [rows, 1].
      S: what the stretch leaves, starting from zeros, float32 [rows, V]; rows is a multiple of
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
    """Bytes of VMEM that the kernel takes: S, S_in and what is sent, and the decays."""
    lanes = lambda width: -(-width // 128) * 128
    return 4 * rows * (3 * lanes(V) + lanes(decays))


def _kernel(A, S, S_in, leaving, sent, received, *, axis_name, devices, blocks, n, reverse):
    p = jax.lax.axis_index(axis_name)
    step = -1 if reverse else 1
    place = devices - 1 - p if reverse else p
    has_before, has_after = place > 0, place < devices - 1
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
        """Of block k, to the device behind; the same object waits for what comes from before."""
        return pltpu.make_async_remote_copy(
            leaving.at[k],
            S_in.at[pl.ds(k * n, n)],
            sent.at[k],
            received.at[k],
            device_id={axis_name: p + step},
        )

    for k in range(blocks):
        rows = pl.ds(k * n, n)

        @pl.when(has_before)
        def _(k=k):
            copy(k).wait_recv()

        @pl.when(has_after)
        def _(k=k, rows=rows):
            leaving[k] = A[rows] * S_in[rows] + S[rows]
            copy(k).start()

    for k in range(blocks):

        @pl.when(has_after)
        def _(k=k):
            copy(k).wait_send()
