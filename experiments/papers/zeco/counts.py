"""ZeCO's cells: schedules of a scan over devices, compared with one device and counted."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.experiments.measurements import devices as cells
from tilescan.ops import masks
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.ops.sequence_parallel import ATTENTION, SCAN_KINDS, scans
from tilescan.ops.sequence_parallel.affine_scan import affine_scan


def exactness(settings: Mapping[str, Any], seed: int) -> dict:
    """{"float32 scalar": {kind: {"output", "gradients"}}}: largest differences from one device.

    Settings: "devices", "length" of one of them, "heads", "dim", "decays" ("scalar", "vector"),
    "dtypes".
    """
    s, found = settings, {}
    cells.devices(s["devices"])  # before the first array is made
    for dtype in s["dtypes"]:
        with jax.enable_x64(dtype == "float64"):
            for decay in s["decays"]:
                arrays = _inputs(s, decay, dtype, seed)
                whole = _values_and_gradients(gated_linear_attention)(*arrays)
                found[f"{dtype} {decay}"] = {
                    kind: _differences(kind, s["devices"], arrays, whole) for kind in SCAN_KINDS
                }
    return found


def _inputs(s, decay, dtype, seed):
    """q, k, v, log_decay and the output's cotangent; decays that reach over several devices."""
    rng = np.random.default_rng(seed)
    shape = (2, s["length"] * s["devices"], s["heads"], s["dim"])
    q, k, v, do = (rng.standard_normal(shape) for _ in range(4))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    log_decay = -rng.exponential(0.5 / s["length"], shape if decay == "vector" else shape[:3])
    return [jnp.asarray(x, dtype) for x in (q, k, v, log_decay, do)]


def _values_and_gradients(op):
    def run(q, k, v, log_decay, do):
        o, pull = jax.vjp(lambda *x: op(*x)[0], q, k, v, log_decay)
        return o, pull(do)

    return jax.jit(run)


def _differences(kind, count, arrays, whole):
    op = lambda *x: (_scanned(kind, cells.mesh_of(count))(*x),)
    o, gradients = _values_and_gradients(op)(*arrays)
    return {
        "output": cells.difference(o, whole[0]),
        "gradients": cells.difference(gradients, whole[1]),
    }


def _scanned(kind, mesh):
    op = lambda *x: scans.gated_linear_attention(*x, kind=kind)[0]
    return cells.over_time(op, mesh)


def traffic(settings: Mapping[str, Any], seed: int) -> dict:
    """{way: {"forward": counts, "both": counts}} of the compiled operator, by `cells.sent`.

    Ways are SCAN_KINDS, with a decay for each key dimension, and of softmax attention "ring" and
    "ulysses", the latter if there are heads for all devices. Counts have "messages" too: how many
    states, blocks or keys a device sends one after the other, forward.

    Settings: "devices", "length" of one of them, "heads", "dim".
    """
    s = settings
    mesh = cells.mesh_of(s["devices"])
    shape = (1, s["length"] * s["devices"], s["heads"], s["dim"])
    x = cells.struct(mesh, shape, None, cells.AXIS)
    found = {kind: _counts(_scanned(kind, mesh), [x] * 4) for kind in SCAN_KINDS}
    for kind in ("ring", "ulysses"):
        if kind == "ring" or s["heads"] % s["devices"] == 0:
            op = lambda q, k, v, kind=kind: ATTENTION[kind](q, k, v, mask=masks.Causal())
            found[kind] = _counts(cells.over_time(op, mesh), [x] * 3)
    return found


def _counts(op, arguments):
    total = lambda *x: jnp.sum(op(*x))
    both = jax.grad(total, tuple(range(len(arguments))))
    forward = cells.compiled(op, *arguments)
    return {
        "forward": cells.sent(forward),
        "messages": messages(forward),
        "both": cells.sent(cells.compiled(both, *arguments)),
    }


def messages(program) -> int:
    """How often the program sends its largest piece: states, blocks of them, or keys."""
    found = cells.collectives(program.as_text())
    most = max(c.operand_bytes for c in found)
    return sum(c.times for c in found if c.operand_bytes == most)


def blocks(settings: Mapping[str, Any], seed: int) -> dict:
    """All-Scan alone: {"bytes" sent, "messages" one after the other, "useful_bytes"}.

    Settings: "devices", "blocks", and the state's "heads" and "dim" (of keys and of values).
    """
    s = settings
    mesh, heads, dim = cells.mesh_of(s["devices"]), s["heads"], s["dim"]
    scan = lambda a, S: affine_scan(a, S, cells.AXIS, blocks=s["blocks"])[0]
    spec = jax.sharding.PartitionSpec(cells.AXIS)
    program = cells.compiled(
        jax.shard_map(scan, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False),
        cells.struct(mesh, (s["devices"], heads, dim, 1), cells.AXIS),
        cells.struct(mesh, (s["devices"], heads, dim, dim), cells.AXIS),
    )
    state = 4 * heads * dim * dim
    return {
        "bytes": cells.total_bytes(cells.sent(program)),
        "messages": messages(program),
        "useful_bytes": useful_blocks(s["devices"], s["blocks"]) * state / s["blocks"],
        "state_bytes": state,
    }


def useful_blocks(devices: int, count: int) -> int:
    """How many blocks a device must send, the most of all devices, by a replay of the schedule.

    At tick t device p has block t - p if there is one; the last device has nobody to send to.
    """
    busy = [
        sum(0 <= tick - p < count for tick in range(devices + count - 2))
        for p in range(devices - 1)
    ]
    return max(busy, default=0)
