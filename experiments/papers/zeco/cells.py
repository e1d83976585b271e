"""ZeCO's measurements: schedules of a scan over devices, compared with one device and counted."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.measurements.compiled import compiled
from tilescan.experiments.measurements.devices import AXIS, mesh_of, over_time, struct
from tilescan.experiments.measurements.exactness import errors_over_devices
from tilescan.experiments.measurements.sharded_training import train, training_settings
from tilescan.experiments.measurements.sharded_transformer import divides_heads
from tilescan.experiments.measurements.traffic import messages, sent, total_bytes
from tilescan.experiments.measurements.words import recorded
from tilescan.ops import masks
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.ops.sequence_parallel import ATTENTION, SCAN_KINDS, scans
from tilescan.ops.sequence_parallel.affine_scan import affine_scan

ALONE = "one device"  # a schedule's name in records
# {kind: gated linear attention of one device's shards by that schedule}
SCHEDULES = {
    kind: lambda *x, kind=kind: scans.gated_linear_attention(*x, kind=kind)[0]
    for kind in SCAN_KINDS
}


def cells(config: ConfigDict) -> list[Cell]:
    """Returns all measurements of the config."""
    c = config
    kinds, dtypes = c.training.kinds, c.training.dtypes

    def model(schedule: str | None, parts: int) -> dict[str, Any]:
        gla = {"pattern": ["gla", "mlp"], "mixers": {"gla": {"n_heads": c.training.n_heads}}}
        sharded = {"sequence_parallel": schedule} if schedule else {}
        settings = training_settings(c.training, **gla, **sharded)
        return {**settings, "schedule": schedule or ALONE, "parts": parts}

    alone = lambda dtype: model(None, 1)
    shared = lambda dtype, schedule: model(schedule, c.training.devices)
    # Schedules differ in their rounding alone, which float64 hides; one shows its growth.
    trained = lambda dtype, schedule: dtype == dtypes[0] or schedule == kinds[0]
    each = {"seconds": 5 + c.training.steps / 10, "seeds": c.training.seeds}

    # Settings that all points of a sweep share, and the axes.
    shape = ("seq_len", "n_heads", "head_dim")
    exact = recorded(c.exactness, *shape, "decays", "dtypes", kind="exactness")
    cost = lambda devices: 20 + 4 * devices
    sent = recorded(c.traffic, *shape, kind="traffic")
    state = recorded(c.traffic, "n_heads", "head_dim", kind="blocks")
    runs = {"dtype": dtypes, "schedule": kinds}
    return [
        *sweep("exactness-P{devices}", exactness, exact, seconds=cost, devices=c.exactness.devices),
        *sweep("traffic-P{devices}", traffic, sent, seconds=20, devices=c.traffic.devices),
        *sweep("blocks-P{devices}-K{blocks}", all_scan, state, seconds=0.5, **c.blocks),
        *sweep("training-{dtype}-one-device-seed{seed}", train, alone, dtype=dtypes, **each),
        *sweep(
            "training-{dtype}-{schedule}-seed{seed}", train, shared, where=trained, **each, **runs
        ),
    ]


def exactness(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns {"float32 scalar": {kind: {"output", "gradients"}}}: differences from one device.

    Settings: "devices", "length" of one of them, "heads", "dim", "decays" ("scalar", "vector"),
    "dtypes".
    """
    count, alone = settings["devices"], lambda *x: gated_linear_attention(*x)[0]
    inputs = {decay: _inputs(settings, decay, seed) for decay in settings["decays"]}
    return {
        f"{dtype} {decay}": errors_over_devices(SCHEDULES, alone, arrays, count, dtype)
        for dtype in settings["dtypes"]
        for decay, arrays in inputs.items()
    }


def _inputs(s: Mapping[str, Any], decay: str, seed: int) -> tuple[np.ndarray, ...]:
    """Returns the output's cotangent, q, k, v, log_decay; decays reach over several devices."""
    rng = np.random.default_rng(seed)
    shape = (2, s["length"] * s["devices"], s["heads"], s["dim"])
    q, k, v, do = (rng.standard_normal(shape) for _ in range(4))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    log_decay = -rng.exponential(0.5 / s["length"], shape if decay == "vector" else shape[:3])
    return do, q, k, v, log_decay


def traffic(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns {strategy: {"forward": counts, "both": counts, "messages"}} of compiled operators.

    Strategies are SCAN_KINDS, with a decay for each key dimension, and of softmax attention "ring"
    and "ulysses", the latter if there are heads for all devices. Messages: how many states, blocks
    or keys a device sends one after the other, forward.

    Settings: "devices", "length" of one of them, "heads", "dim".
    """
    s = settings
    mesh = mesh_of(s["devices"])
    x = struct(mesh, (1, s["length"] * s["devices"], s["heads"], s["dim"]), None, AXIS)
    found = {kind: _counts(over_time(op, mesh), [x] * 4) for kind, op in SCHEDULES.items()}
    for kind in ("ring", "ulysses"):
        if divides_heads(kind, s["heads"], s["devices"]):
            op = functools.partial(ATTENTION[kind], mask=masks.Causal())
            found[kind] = _counts(over_time(op, mesh), [x] * 3)
    return found


def _counts(op: Callable, arguments: list) -> dict[str, Any]:
    both = jax.grad(lambda *x: jnp.sum(op(*x)), tuple(range(len(arguments))))
    forward = compiled(op, *arguments)
    return {
        "forward": sent(forward),
        "messages": messages(forward),
        "both": sent(compiled(both, *arguments)),
    }


def all_scan(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns All-Scan's {"bytes" sent, "messages", "useful_bytes", "state_bytes"}.

    Settings: "devices", "blocks", and the state's "heads" and "dim" (of keys and of values).
    """
    s = settings
    mesh, heads, dim = mesh_of(s["devices"]), s["heads"], s["dim"]
    scan = lambda a, S: affine_scan(a, S, AXIS, blocks=s["blocks"])[0]
    spec = jax.sharding.PartitionSpec(AXIS)
    program = compiled(
        jax.shard_map(scan, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False),
        struct(mesh, (s["devices"], heads, dim, 1), AXIS),
        struct(mesh, (s["devices"], heads, dim, dim), AXIS),
    )
    state = 4 * heads * dim * dim
    return {
        "bytes": total_bytes(sent(program)),
        "messages": messages(program),
        "useful_bytes": useful_blocks(s["devices"], s["blocks"]) * state / s["blocks"],
        "state_bytes": state,
    }


def useful_blocks(devices: int, count: int) -> int:
    """Returns how many of `count` blocks a device must send, the most of all, by a replay.

    At tick t device p has block t - p if there is one; the last device has nobody to send to.
    """
    ticks = range(devices + count - 2)
    busy = [sum(0 <= tick - p < count for tick in ticks) for p in range(devices - 1)]
    return max(busy, default=0)
