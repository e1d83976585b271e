"""What a ring of devices sends while it attends: remote copies around the attention kernels.

A call of `flash_attention.forward`, `backward_dq` or `backward_dkv` with a `Carry` computes what it
always does. Besides, at its first grid step, it starts to copy whole arrays from this device's HBM
into the outputs of the same call on the device `hops` places later in the ring, and at its last
grid step it waits for its own copies to be sent and for those of the device `hops` places earlier
to be received. So transfer and computation overlap by construction, however the compiler schedules
calls. The arrays may be the keys that the kernel reads at the same time: no copy writes them.

- A device must not write into another before that one runs the same call: a barrier ensures it. A
  device signals the one that will write to it, and waits for the one that it will write to. Each
  signals and is signaled once a call, and returns from the call only after both copies; so the
  counter is never above 1 and never of another call, as long as all calls with one `collective_id`
  send between the same pairs of devices.
- Two cores of a chip (v4, v5p) share a grid along one "parallel" axis of that length, the form in
  which JAX's documentation gives a kernel its core's number; all other axes are "arbitrary", hence
  in order. Only the first core sends and waits, from its own first step to its own last: semaphores
  are a core's, and copies between HBMs need no second one.

The method is Ring Attention's (arXiv 2310.01889).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True)
class Carry:
    """Arrays to send to the device `hops` places later along a mesh axis, inside of `shard_map`.

    arrays: of this device; what it receives has their shapes and dtypes.
    collective_id: of one pattern of devices (axis and hops) alone.
    cores: TensorCores of a device that share a kernel's grid.
    """

    arrays: tuple[jax.Array, ...]
    axis_name: str
    hops: int
    collective_id: int
    cores: int = 1

    def named(self, interpret: bool | pltpu.InterpretParams = False) -> dict[str, jax.Array]:
        """Returns the arrays in HBM, by names that no input of a kernel has."""
        in_hbm = lambda x: x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)
        return {f"carried {i}": in_hbm(x) for i, x in enumerate(self.arrays)}

    def share(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], Callable[[tuple], tuple]]:
        """Returns (the grid to launch, its indices -> those of `grid`).

        With several cores, the launched grid begins with a core's number, and the first axis
        (batch, heads, tiles) that they divide is divided among them. Without such an axis the first
        core does everything.
        """
        even = [axis for axis, n in enumerate(grid[:3]) if n % self.cores == 0]
        if self.cores == 1 or not even:
            return grid, lambda ids: ids
        axis, part = even[0], grid[even[0]] // self.cores

        def indices(ids):
            core, *ids = ids
            ids[axis] = ids[axis] + core * part
            return tuple(ids)

        return (self.cores, *grid[:axis], part, *grid[axis + 1 :]), indices

    def options(self, launched: tuple[int, ...], grid: tuple[int, ...]) -> dict:
        """Returns arguments of `pltpu.CompilerParams`, for a launched grid."""
        shared = len(launched) > len(grid)
        semantics = ("parallel",) * shared + ("arbitrary",) * len(grid)
        return dict(
            dimension_semantics=semantics, collective_id=self.collective_id, has_side_effects=True
        )

    def around(
        self,
        compute: Callable[[], None],
        refs: dict[str, jax.Ref],
        ids: tuple,
        launched: tuple[int, ...],
        grid: tuple[int, ...],
    ) -> None:
        """Runs a grid step of a kernel: `compute`, and the copies at the first and the last one."""
        shared = len(launched) > len(grid)
        ends = tuple(0 if i < shared else n - 1 for i, n in enumerate(launched))
        pl.when(_equal(ids, (0,) * len(ids)))(lambda: self._start(refs))
        compute()
        pl.when(_equal(ids, ends))(lambda: self._finish(refs))

    def _start(self, refs):
        barrier = pltpu.get_barrier_semaphore()
        pl.semaphore_signal(barrier, 1, device_id=self._device(-self.hops))
        pl.semaphore_wait(barrier, 1)
        for copy in self._copies(refs):
            copy.start()

    def _finish(self, refs):
        for copy in self._copies(refs):
            copy.wait_recv()
        for copy in self._copies(refs):
            copy.wait_send()

    def _copies(self, refs):
        """Returns the copies to the later device; they also wait for the earlier one's."""
        return [
            pltpu.make_async_remote_copy(
                refs[name],
                refs[f"arriving {name}"],
                refs["sent"].at[i],
                refs["received"].at[i],
                device_id=self._device(self.hops),
            )
            for i, name in enumerate(f"carried {i}" for i in range(len(self.arrays)))
        ]

    def _device(self, hops):
        devices = lax.axis_size(self.axis_name)
        index = lax.axis_index(self.axis_name) + hops % devices
        return {self.axis_name: lax.rem(index, jnp.asarray(devices, index.dtype))}


def _equal(ids, values):
    return functools.reduce(jnp.logical_and, [i == n for i, n in zip(ids, values, strict=True)])
