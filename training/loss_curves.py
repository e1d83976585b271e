"""Reads loss curves, for `training.annealing_law`, from runs and from tables of other trainers."""

import csv
import dataclasses
import os

import numpy as np
from etils import epath

from tilescan.training.annealing_law import Curve
from tilescan.training.metrics import read_rows
from tilescan.training.schedule_config import FILE
from tilescan.training.schedules import first_peak, rates
from tilescan.training.trained import is_run, saved_settings

# Names of the columns of a table, the first of them that is there.
COLUMNS = {
    "step": ("step", "steps", "iteration"),
    "lr": ("lr", "learning_rate"),
    "loss": ("loss", "validation_loss", "val_loss"),
}
ENOUGH = 10  # validations, which are a curve


def read_curve(
    path: str | os.PathLike, *, split: str | None = None, warmup: int | None = None
) -> Curve:
    """Reads a run's work folder, finished or not, or a CSV file.

    Args:
      path: of either. A file has the columns step (updates made), lr and loss, of any updates:
        between them the rate is taken to change evenly, and before the first to be the first's.
      split: of a run, "validation" or "train"; None takes validation where it has ENOUGH losses.
      warmup: updates until the peak; None is a run's own, a file's first row of the highest rate.

    Raises:
      ValueError: neither a run nor such a file; no losses in it.
      OSError: a file that cannot be read.
    """
    if is_run(path):
        return _of_run(epath.Path(path), split, warmup)
    if epath.Path(path).is_dir() or not epath.Path(path).exists():
        raise ValueError(f"{path} is neither the work folder of a run nor a CSV file")
    text = epath.Path(path).read_text(encoding="utf-8")
    return parse_table(text, str(path), warmup)._replace(name=epath.Path(path).stem)


def _of_run(workdir: epath.Path, split: str | None, warmup: int | None) -> Curve:
    c = saved_settings(workdir)
    optimizer = c.optimizer
    if optimizer.schedule.startswith(FILE):  # the run's own copy
        kept = f"{FILE}{workdir / 'schedule.txt'}"
        optimizer = dataclasses.replace(optimizer, schedule=kept)
    learning_rates = rates(optimizer, c.train.steps)

    # The losses of one split.
    found = {"validation": [], "train": []}
    for row in read_rows(workdir / "metrics.jsonl"):
        if row["step"] > 0 and row["split"] in found:
            found[row["split"]].append((row["step"], row["loss"]))
    if split is None:
        split = "validation" if len(found["validation"]) >= ENOUGH else "train"
    if split not in found or not found[split]:
        raise ValueError(
            f"{workdir} has no losses of split {split!r}; it has "
            f"{ {name: len(rows) for name, rows in found.items()} }"
        )
    steps, losses = map(np.array, zip(*found[split], strict=True))
    if warmup is None:
        warmup = first_peak(optimizer, c.train.steps)
    return Curve(learning_rates, steps, losses, warmup, workdir.name)


def parse_table(text: str, name: str, warmup: int | None = None) -> Curve:
    """Parses a table as `read_curve` reads it from a CSV file.

    Args:
      text: of the table.
      name: of the curve, and in errors.
      warmup: as of `read_curve`.

    Raises:
      ValueError: no such table.
    """
    rows = list(csv.DictReader(text.splitlines()))
    if not rows:
        raise ValueError(f"{name} holds no rows; it needs a header and columns step, lr and loss")
    columns = {}
    for column, names in COLUMNS.items():
        known = [title for title in names if title in rows[0]]
        if not known:
            raise ValueError(
                f"{name} has no column {column!r}; it has {', '.join(map(str, rows[0]))}"
            )
        columns[column] = known[0]
    try:
        table = {
            column: np.array([float(row[name]) for row in rows]) for column, name in columns.items()
        }
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: a row is not of numbers: {error}") from error
    steps = table["step"].astype(int)
    if np.any(np.diff(steps) <= 0) or steps[0] < 1:
        raise ValueError(f"{name}: column {columns['step']!r} must rise, from 1 on")
    learning_rates = np.interp(np.arange(1, steps[-1] + 1), steps, table["lr"])
    if warmup is None:
        warmup = int(steps[np.argmax(table["lr"])]) - 1
    return Curve(learning_rates, steps, table["loss"], warmup, name)
