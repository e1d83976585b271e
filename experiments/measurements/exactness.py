"""Differences of ops over devices from one device, of outputs and of gradients."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tilescan.experiments.harness.groups import Group
from tilescan.experiments.harness.records import Record
from tilescan.experiments.harness.tables import LABEL, MEASURED, Table, columns, table

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
