"""A paper as values: its cells (independent measurements) and pure functions of their records."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import ml_collections

from tilescan.experiments.harness.catalogue import Titled
from tilescan.experiments.harness.claims import Claim
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.tables import PUBLISHED, QUOTED, Table


@dataclasses.dataclass(frozen=True)
class Cell:
    """One independent measurement.

    Attributes:
      id: unique in its paper, and a file's name: letters, digits and "._-=".
      measure: `measure(settings, seed) -> result`; a measurement that keeps files or shares
        trained models has a third parameter, `workspace`: see `workspace.Workspace`.
      settings: all that the result depends on, as plain values; they decide whether a finished
        record still holds.
      seed: random seed.
      seconds: rough duration, for the estimate of the time left.
    """

    id: str
    measure: Callable[..., Mapping[str, Any]]
    settings: Mapping[str, Any]
    seed: int = 0
    seconds: float = 1.0

    def __post_init__(self):
        if not self.id or not all(c.isalnum() or c in "._-=" for c in self.id):
            raise ValueError(f"id={self.id!r} is not a file name of letters, digits and '._-='")


@dataclasses.dataclass(frozen=True)
class Paper(Titled):
    """A paper: how to measure its cells and how to read their records.

    Attributes:
      name: its folder's and its config's name.
      title: the paper's title, with its source.
      summary: two sentences for a reader of the results.
      short: what tables of many papers call it; the beginning of the title by default.
      family: under which RESULTS.md lists it: one of `catalogue.FAMILIES`.
      source: how the numbers are known that claims quote, one of `tables.QUOTED`; a claim may have
        a source of its own.
      cells: the measurements that a config asks for.
      tables, claims, figures: pure functions of the records; figures gives {name: SVG text}.
        A figure stands beside the table whose name has most of the words that its own begins with.
    """

    name: str
    title: str
    summary: str
    cells: Callable[[ml_collections.ConfigDict], Sequence[Cell]]
    tables: Callable[[Records], Sequence[Table]]
    claims: Callable[[Records], Sequence[Claim]]
    figures: Callable[[Records], Mapping[str, str]] = lambda records: {}
    family: str = "kernels"
    short: str = ""
    source: str = PUBLISHED

    def __post_init__(self):
        super().__post_init__()
        if self.source not in QUOTED:
            raise ValueError(f"source={self.source!r} of {self.name!r} is not one of {QUOTED}")

    @classmethod
    def of(cls, modules: Sequence[ModuleType], **about: str) -> "Paper":
        """Returns the paper whose folder has these modules, by its folder's name.

        Args:
          modules: their functions cells, tables, claims and figures are the paper's.
          **about: the texts, as of the class.
        """
        parts = ("cells", "tables", "claims", "figures")
        found = {p: vars(m)[p] for m in modules for p in parts if callable(vars(m).get(p))}
        return cls(name=modules[0].__name__.split(".")[-2], **found, **about)


def sweep(
    cell_id: str | Callable[..., str],
    measure: Callable[..., Mapping[str, Any]],
    settings: Mapping[str, Any] | Callable[..., Mapping[str, Any]],
    *,
    seeds: Sequence[int] = (0,),
    seconds: float | Callable[..., float] = 1.0,
    where: Callable[..., bool] = lambda **point: True,
    **axes: Sequence[Any],
) -> list[Cell]:
    """Makes a cell for each point of the grid of `axes` and each seed.

    Args:
      cell_id: format string of the axes and "seed", e.g. "mqar{pairs}-{model}-seed{seed}", or a
        function of them (by name).
      measure: see `Cell`.
      settings: what is the same at every point, or a function of the axes (by name) that returns
        it; the point itself is added, so that tables can select and group by it.
      seeds: a cell each.
      seconds: rough duration of a cell, or a function of the axes.
      where: function of the axes (by name): False leaves a point out.
      **axes: {name: values}; the last one varies fastest.
    """
    name = cell_id if callable(cell_id) else cell_id.format
    made = []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        if not where(**point):
            continue
        own = settings(**point) if callable(settings) else settings
        cost = seconds(**point) if callable(seconds) else seconds
        made += [
            Cell(name(**point, seed=seed), measure, {**own, **point}, seed, cost) for seed in seeds
        ]
    return made
