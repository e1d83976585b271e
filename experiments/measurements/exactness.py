"""Differences of ops over devices from one device, of outputs and of gradients."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.experiments.harness.groups import Group
from tilescan.experiments.harness.records import Record
from tilescan.experiments.harness.tables import LABEL, MEASURED, Table, columns, table
from tilescan.experiments.measurements.devices import mesh_of, over_time

# {key of the errors: heading}
PARTS = {"output": "output", "gradients": "gradients"}


def values_and_gradients(op: Callable) -> Callable:
    """Returns the compiled function (do, *arrays) -> (o, gradients of all arrays) of an op."""

    def run(do, *arrays):
        o, pull = jax.vjp(op, *arrays)
        return o, pull(do)

    return jax.jit(run)


def errors(got: tuple, want: tuple) -> dict[str, float]:
    """Returns the `difference`s of two results of `values_and_gradients`, by PARTS."""
    return {part: difference(a, b) for part, a, b in zip(PARTS, got, want, strict=True)}


def errors_over_devices(
    ops: Mapping[str, Callable],
    alone: Callable,
    arrays: Sequence[np.ndarray],
    count: int,
    dtype: str,
) -> dict[str, dict[str, float]]:
    """Returns {name: `errors` of an op whose time is sharded over devices}.

    Args:
      ops: {name: function of one device's shards}.
      alone: what one device computes of the whole arrays.
      arrays: the output's cotangent, and the arguments, all [B, T, ...].
      count: devices.
      dtype: in which all is computed, "float32" or "float64".
    """
    mesh = mesh_of(count)  # before the first array is made
    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(x, dtype) for x in arrays]
        want = values_and_gradients(alone)(*arrays)
        return {
            name: errors(values_and_gradients(over_time(op, mesh))(*arrays), want)
            for name, op in ops.items()
        }


def difference(got: Any, want: Any) -> float:
    """Returns the max abs. difference of two trees of arrays, relative to each array's max abs."""
    found = [
        np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))
        / max(np.max(np.abs(np.asarray(b, np.float64))), 1e-30)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    ]
    return float(max(found))


def worst(found: Iterable[tuple[str, Any]]) -> dict[str, float]:
    """Returns {name: its largest error} of pairs of a name and errors, nested in mappings."""
    largest: dict[str, float] = {}
    for name, tree in found:
        largest[name] = max(largest.get(name, 0.0), *jax.tree.leaves(dict(tree)))
    return largest


def exactness_table(
    title: str,
    labels: Sequence[str],
    rows: Iterable[tuple[Sequence[str], Mapping[str, float], Record | Group]],
    note: str,
    names: Mapping[str, str] = PARTS,
) -> Table:
    """Returns the table of errors.

    Args:
      title, note: the paper's.
      labels: headings of what names a row.
      rows: (a text for each label, errors, where they were measured).
      names: {key of the errors: heading}.
    """
    shown = columns(LABEL, {n: lambda row, i=i: row[0][i] for i, n in enumerate(labels)})
    shown += columns(MEASURED, {n: lambda row, k=k: row[1][k] for k, n in names.items()})
    return table("exactness", title, rows, shown, note)
