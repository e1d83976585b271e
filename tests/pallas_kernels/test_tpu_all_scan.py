"""All-Scan by remote copies: right, free of races, and what TPU programs run."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tilescan.ops.sequence_parallel import all_scan_tpu
from tilescan.ops.sequence_parallel.schedules import Schedule
from tilescan.pallas_kernels.tpu import all_scan as kernels

# Copies are made when they are started: only so is reading too early detected.
RACES = functools.partial(
    pltpu.InterpretParams, detect_races=True, on_race="raise", dma_execution_mode="eager"
)


def mesh_of(n):
    return jax.make_mesh((n,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:n])


def on_devices(n, f):
    """Returns f of each device's shard, for arrays whose first dimension is n."""
    part = lambda *arrays: f(*(x[0] for x in arrays))[None]
    specs = dict(in_specs=P("sequence"), out_specs=P("sequence"), check_vma=False)
    return jax.jit(jax.shard_map(part, mesh=mesh_of(n), **specs))


def by_definition(A, S, reverse):
    """float64, device after device."""
    A, S = (np.asarray(x, np.float64) for x in (A, S))
    S_in, state = np.zeros(S.shape), np.zeros(S.shape[1:])
    for p in reversed(range(len(S))) if reverse else range(len(S)):
        S_in[p] = state
        state = A[p] * state + S[p]
    return S_in


# Devices, shapes of decays and states, blocks, direction. Races show from four devices on.
CASES = [
    (4, (2, 24, 1), (2, 24, 64), None, False),
    (4, (40,), (40,), 2, True),
    pytest.param(8, (3, 7, 1), (3, 7, 64), None, True, marks=pytest.mark.slow),
    pytest.param(8, (2, 1, 1), (2, 16, 96), 4, False, marks=pytest.mark.slow),
    pytest.param(2, (5, 32), (5, 32), 1, False, marks=pytest.mark.slow),
    pytest.param(1, (8, 1), (8, 64), 1, False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("n", "decays", "states", "blocks", "reverse"), CASES)
def test_states_are_those_of_the_definition_and_no_copy_races(n, decays, states, blocks, reverse):
    keys = jax.random.split(jax.random.key(0))
    A = jax.random.uniform(keys[0], (n, *decays), jnp.float32)
    A = A.at[-1].set(0.0)  # forgets all
    S = jax.random.normal(keys[1], (n, *states), jnp.float32)
    schedule = Schedule("sequence", False, "all_scan", blocks, -1, reverse)
    scan = functools.partial(all_scan_tpu.scan, schedule=schedule, interpret=RACES())
    np.testing.assert_allclose(
        on_devices(n, scan)(A, S), by_definition(A, S, reverse), rtol=1e-6, atol=1e-6
    )


def test_a_device_that_does_not_wait_for_a_block_is_seen_as_a_race(monkeypatch):
    """The check can fail: a twin of the kernel that reads a block before it has arrived."""
    real = kernels.pltpu.make_async_remote_copy
    monkeypatch.setattr(
        kernels.pltpu, "make_async_remote_copy", lambda *a, **k: Unwaited(real(*a, **k))
    )
    A, S = jnp.ones((4, 16, 1)), jnp.ones((4, 16, 64))
    schedule = Schedule("sequence", False, "all_scan", 2, -1, False)
    scan = functools.partial(all_scan_tpu.scan, schedule=schedule, interpret=RACES())
    with pytest.raises(Exception, match="(?i)race"):
        jax.block_until_ready(on_devices(4, scan)(A, S))
    with contextlib.suppress(Exception):  # the failure of the other devices
        jax.effects_barrier()
    pltpu.reset_tpu_interpret_mode_state()


class Unwaited:
    """A remote copy whose receiver does not wait."""

    def __init__(self, copy):
        self.start, self.wait_send = copy.start, copy.wait_send

    def wait_recv(self):
        pass
