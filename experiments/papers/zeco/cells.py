"""ZeCO's measurements: schedules of a scan over devices, compared with one device and counted."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.measurements.compiled import compiled
from tilescan.experiments.measurements.devices import AXIS, devices, mesh_of, over_time, struct
from tilescan.experiments.measurements.exactness import errors, values_and_gradients
from tilescan.experiments.measurements.sharded_training import train, training_settings
from tilescan.experiments.measurements.traffic import messages, sent, total_bytes
from tilescan.experiments.measurements.words import recorded
from tilescan.ops import masks
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.ops.sequence_parallel import ATTENTION, SCAN_KINDS, scans
from tilescan.ops.sequence_parallel.affine_scan import affine_scan

ALONE = "one device"  # a schedule's name in records


def cells(config) -> list[Cell]:
    """Returns all measurements of the config."""
    c = config
    kinds, dtypes = c.training.kinds, c.training.dtypes

    def trained(parts: int, schedule: str | None = None, **point: Any) -> dict[str, Any]:
        sharded = {"sequence_parallel": schedule} if schedule else {}
        model = {"pattern": ["gla", "mlp"], "mixers": {"gla": {"n_heads": c.training.n_heads}}}
        settings = training_settings(c.training, **model, **sharded)
        return {**settings, "schedule": schedule or ALONE, "parts": parts}

    seconds = 5 + c.training.steps / 10
    return [
        *sweep(
            "exactness-P{devices}",
            exactness,
            recorded(
                c.exactness, "seq_len", "n_heads", "head_dim", "decays", "dtypes", kind="exactness"
            ),
            seconds=lambda devices: 20 + 4 * devices,
            devices=c.exactness.devices,
        ),
        *sweep(
            "traffic-P{devices}",
            traffic,
            recorded(c.traffic, "seq_len", "n_heads", "head_dim", kind="traffic"),
            seconds=20,
            devices=c.traffic.devices,
        ),
        *sweep(
            "blocks-P{devices}-K{blocks}",
            all_scan,
            recorded(c.traffic, "n_heads", "head_dim", kind="blocks"),
            seconds=0.5,
            devices=c.blocks.devices,
            blocks=c.blocks.blocks,
        ),
        *sweep(
            "training-{dtype}-one-device", train, lambda dtype: trained(1), seconds=seconds,
            dtype=dtypes,
        ),
        *sweep(
            "training-{dtype}-{schedule}",
            train,
            lambda dtype, schedule: trained(c.training.devices, schedule),
            seconds=seconds,
            # Schedules differ in their rounding alone, which float64 hides; one shows its growth.
            where=lambda dtype, schedule: dtype == dtypes[0] or schedule == kinds[0],
            dtype=dtypes,
            schedule=kinds,
        ),
    ]  # fmt: skip


def exactness(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns {"float32 scalar": {kind: {"output", "gradients"}}}: differences from one device.

    Settings: "devices", "length" of one of them, "heads", "dim", "decays" ("scalar", "vector"),
    "dtypes".
    """
    s, found = settings, {}
    devices(s["devices"])  # before the first array is made
    alone = lambda *x: gated_linear_attention(*x)[0]
    for dtype in s["dtypes"]:
        with jax.enable_x64(dtype == "float64"):
            for decay in s["decays"]:
                arrays = _inputs(s, decay, dtype, seed)
                want = values_and_gradients(alone)(*arrays)
                found[f"{dtype} {decay}"] = {
                    kind: errors(values_and_gradients(op)(*arrays), want)
                    for kind, op in _scanned(s["devices"]).items()
                }
    return found


def _inputs(s: Mapping[str, Any], decay: str, dtype: str, seed: int) -> list[jax.Array]:
    """Returns the output's cotangent, q, k, v, log_decay; decays reach over several devices."""
    rng = np.random.default_rng(seed)
    shape = (2, s["length"] * s["devices"], s["heads"], s["dim"])
    q, k, v, do = (rng.standard_normal(shape) for _ in range(4))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    log_decay = -rng.exponential(0.5 / s["length"], shape if decay == "vector" else shape[:3])
    return [jnp.asarray(x, dtype) for x in (do, q, k, v, log_decay)]


def _scanned(count: int) -> dict[str, Callable]:
    """Returns {kind: gated linear attention over so many devices by that schedule}."""
    op = lambda kind: lambda *x: scans.gated_linear_attention(*x, kind=kind)[0]
    return {kind: over_time(op(kind), mesh_of(count)) for kind in SCAN_KINDS}


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
    found = {kind: _counts(op, [x] * 4) for kind, op in _scanned(s["devices"]).items()}
    for kind in ("ring", "ulysses"):
        if kind == "ring" or s["heads"] % s["devices"] == 0:
            op = lambda q, k, v, kind=kind: ATTENTION[kind](q, k, v, mask=masks.Causal())
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
