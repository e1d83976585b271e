"""The mesh, and where each array lives on it.

Axes: `data` (copies of the model), `fsdp` (parameters sharded along their embedding dimension, and
the batch), `sequence` (time of activations) and `tensor` (heads, MLP width, recurrent channels,
vocabulary). Modules name the dimensions of their parameters; RULES is the one place that maps those
names to mesh axes. The compiler inserts the communication; attention, which may be a kernel that it
cannot partition, is partitioned by ops.partitioned, and what mixes over time communicates by
ops.sequence_parallel.
"""

import contextlib
from collections.abc import Sequence

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from tilescan.ops.mesh_axes import BATCH_AXES, HEAD_AXIS, TIME_AXIS
from tilescan.ops.sequence_parallel import layouts
from tilescan.training.settings import MeshConfig

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH = P(BATCH_AXES)

Rules = dict[str, str | tuple[str, ...] | None]

# Logical name of a dimension -> mesh axis. A dimension that its axis does not divide stays whole.
RULES: Rules = {
    "batch": BATCH_AXES,
    "time": TIME_AXIS,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": HEAD_AXIS,
    "kv_heads": HEAD_AXIS,
    "mlp": "tensor",
    "head_dim": None,
    "layers": None,
    "classes": None,
    "norm": None,
    "position": None,
    "inputs": None,
    "inner": "tensor",
    "state": None,
    "rank": None,
    "window": None,
}


def rules(config: MeshConfig) -> Rules:
    """Returns RULES, or those that shard parameters over `sequence` as well.

    That is ZeRO-3 over the devices that share rows and those that share a sequence, as DeepSpeed-
    Ulysses has it (arXiv 2309.14509): layers gather their parameters, and what is left of their
    gradients is a device's shard.
    """
    if not config.parameters_over_sequence:
        return RULES
    return RULES | {"embed": ("fsdp", TIME_AXIS)}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the configured sizes.

    Args:
        config: sizes of the axes.
        devices: attached ones or descriptions; None takes all devices that JAX has.

    Raises:
        ValueError: the sizes do not multiply to the number of devices; the message holds both
            numbers.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes:
        if len(devices) % fixed:
            raise ValueError(
                f"{asked}: {fixed} does not divide the {len(devices)} devices, so mesh.data=-1 "
                "has no size"
            )
        sizes[sizes.index(-1)] = len(devices) // fixed
    elif fixed != len(devices):
        raise ValueError(
            f"{asked} multiply to {fixed}, but there are {len(devices)} devices "
            f"({devices[0].device_kind}); mesh.data=-1 takes what the other axes leave"
        )
    # Auto: the compiler propagates shardings; jax.make_mesh's own default makes them part of types.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Raises ValueError unless every device gets the same number of rows of every microbatch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (parts * microbatches):
        raise ValueError(
            f"data.batch_size = {batch_size} must be a multiple of {parts * microbatches}: "
            f"mesh.data {mesh.shape['data']} x mesh.fsdp {mesh.shape['fsdp']} x "
            f"train.microbatches {microbatches}"
        )


def _axes(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def spec_of(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES
) -> P:
    """Maps the logical names of an array's dimensions to mesh axes.

    A mesh axis is used once per array, by the first dimension that asks for it, and only where it
    divides the dimension: one key-value head on two tensor devices stays whole. Of several axes
    for a dimension the first ones are used, as many as divide it.

    Raises:
        ValueError: a name that RULES does not have.
    """
    entries, used = [], set()
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise ValueError(
                f"the logical axis {name!r} is not in training.sharding.RULES: {', '.join(rules)}"
            )
        axes, parts = (), 1
        for axis in _axes(rules[name] if name else None):
            if mesh.shape[axis] == 1 or axis in used:
                continue
            if size % (parts * mesh.shape[axis]):
                break
            axes, parts = (*axes, axis), parts * mesh.shape[axis]
        used |= set(axes)
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return P(*entries)


def param_shardings(params: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """Returns shardings of a tree of (abstract) parameters, `nn.LogicallyPartitioned` or bare.

    Leaves without names are copied to every device. The result has the structure of the tree
    without boxes.
    """

    def one(leaf):
        if isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, spec_of(leaf.names, leaf.value.shape, mesh, rules))
        return NamedSharding(mesh, P())

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def optimizer_shardings(
    tx: optax.GradientTransformation, params: PyTree, shardings: PyTree, mesh: Mesh
) -> PyTree:
    """Returns shardings of `tx`'s state: moments lie with their parameters, counters everywhere.

    Args:
        tx: the optimizer.
        params: parameters, or their shapes.
        shardings: the parameters' own, a tree like `params`.
        mesh: of the counters.
    """
    state = jax.eval_shape(tx.init, params)
    return optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): which shard of each batch's rows this process feeds, and of how many.

    Processes along `sequence` or `tensor` feed the same rows.

    Raises:
        ValueError: processes whose rows overlap without being the same.
    """
    rows: dict[int, set[int]] = {}
    parts = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    for row, devices in enumerate(parts):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    shards = sorted({tuple(sorted(part)) for part in rows.values()})
    if sum(map(len, shards)) != len(parts):
        raise ValueError(
            f"mesh {dict(mesh.shape)}: the rows of a batch do not split by processes: "
            f"{shards}; let mesh.sequence * mesh.tensor be a multiple or a divisor of the devices "
            "of a process"
        )
    return shards.index(tuple(sorted(rows[jax.process_index()]))), len(shards)


def in_order(
    batch: dict[str, np.ndarray], mesh: Mesh, balance: str = "contiguous"
) -> dict[str, np.ndarray]:
    """Puts the tokens of a batch in the order of `balance` (ops.sequence_parallel.layouts).

    Positions are added where they can no longer be counted.

    Raises:
        ValueError: time that the devices along `sequence` cannot share equally.
    """
    parts, T = mesh.shape[TIME_AXIS], batch["tokens"].shape[1]
    if parts == 1:
        return batch
    layouts.check(T, parts, balance)
    if balance == "contiguous":
        return batch
    order = layouts.order(T, parts, balance)
    batch = {"positions": _positions(batch)} | batch
    return {k: np.asarray(v)[:, order] if np.ndim(v) > 1 else v for k, v in batch.items()}


def batch_spec(ndim: int) -> P:
    """Returns how an array of a batch is sharded: rows and, if it has it, time."""
    return P(BATCH_AXES, TIME_AXIS) if ndim > 1 else BATCH


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, balance: str = "contiguous"
) -> dict[str, jax.Array]:
    """Sends this process's rows [B / shards, T, ...] to its devices; returns the global arrays.

    Time is sharded over `sequence`, in the order of `balance`, as `in_order` says.
    """
    index, count = data_shard(mesh)

    def put(rows):
        rows = np.asarray(rows)
        first = index * len(rows)

        def part(where):
            start, stop, _ = where[0].indices(len(rows) * count)
            return rows[(slice(start - first, stop - first), *where[1:])]

        shape = (len(rows) * count, *rows.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, batch_spec(rows.ndim)), part)

    return {name: put(value) for name, value in in_order(batch, mesh, balance).items()}


def _positions(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Counts positions [B, T] from 0 in each segment, as models count them by themselves."""
    B, T = batch["tokens"].shape[:2]
    index = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    if "segment_ids" not in batch:
        return index
    ids = batch["segment_ids"]
    starts = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


def use(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Returns a context in which what is traced knows the mesh, for `jax.shard_map` inside ops."""
    return jax.set_mesh(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device of the mesh holds whole."""
    return NamedSharding(mesh, P())
