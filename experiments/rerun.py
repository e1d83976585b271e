"""Measures one committed number again, and shows the old and the new ones beside each other."""

import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from tilescan import terminal
from tilescan.experiments.harness import load, registry, runner
from tilescan.experiments.harness import records as records_lib
from tilescan.experiments.harness.tables import format_value
from tilescan.spelling import did_you_mean


def rerun(paper: str, cell: str, folder: pathlib.Path) -> int:
    """Measures a cell again in a folder of its own and prints both; returns the exit status.

    Args:
      paper: its name.
      cell: id of the record.
      folder: of the records: results/PAPER/SCALE or the workdir of a run.

    Raises:
      ValueError: no such paper or record, or a record of settings that the config no longer has.
    """
    old = _record(folder, cell)
    scale = runner.kept_config(folder)["scale"]
    config = registry.load_config(paper, scale)
    cells = {c.id: c for c in registry.load(paper).cells(config)}
    if cell not in cells:
        raise ValueError(f"cell={cell!r} is no cell of {paper} at scale {scale} any more")
    again = cells[cell]
    digest = records_lib.digest(paper, cell, again.settings, again.seed)
    if digest != old.digest:
        print(f"The settings of {cell} changed since: the numbers are of different measurements.")
    quiet = load.patient(0.0 if scale == "smoke" else load.PATIENCE)
    with quiet, tempfile.TemporaryDirectory(prefix="tilescan-rerun-") as workdir:
        new = runner.measure(paper, again, digest, pathlib.Path(workdir))
    show(old, new)
    return 0


def show(old: records_lib.Record, new: records_lib.Record) -> None:
    """Prints the numbers of two records of one cell beside each other."""
    headings, rows, width = ("number", "recorded", "again", "difference"), [], terminal.width()
    before, after = dict(numbers(old.result)), dict(numbers(new.result))
    same = 0
    for name in [*before, *(name for name in after if name not in before)]:
        a, b = before.get(name), after.get(name)
        same += a == b
        rows.append((name, format_value(a, 6), format_value(b, 6), _difference(a, b)))
    print(terminal.paint(f"{old.paper}: {old.cell}", "bold"))
    print(*terminal.tables(headings, rows, width, labels=(True, False, False, False)), sep="\n\n")
    print(f"{same} of {len(rows)} numbers are equal in every digit.")
    for record, word in ((old, "recorded"), (new, "again")):
        e = record.environment
        commit = (e["commit"] or "unknown")[:10] + ("+changes" if e["modified"] else "")
        where = f"{e['device']}, JAX {e['packages']['jax']}, commit {commit}, {e['finished']}"
        print(terminal.fill(f"{word}: {record.seconds:.1f} s on {where}", width))


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, number or text) of everything in a nested result."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from numbers(item, f"{name}[{index}]")
    else:
        yield name, value


def _difference(old: Any, new: Any) -> str:
    if old == new:
        return "equal"
    if not isinstance(old, int | float) or not isinstance(new, int | float) or not old:
        return "differs"
    return f"{(new - old) / abs(old):+.1e}"


def _record(folder: pathlib.Path, cell: str) -> records_lib.Record:
    path = folder / "cells" / f"{cell}.json"
    if path.exists():
        return records_lib.Record.from_json(path.read_text(encoding="utf-8"))
    known = recorded(folder)
    raise ValueError(
        f"there is no record {cell!r} in {folder}; {did_you_mean(cell, known)}The command without "
        f"a record lists all {len(known)}"
    )


def recorded(folder: pathlib.Path) -> list[str]:
    """Returns the ids of the records in a folder, sorted.

    Raises:
      ValueError: there are none.
    """
    known = sorted(path.stem for path in (folder / "cells").glob("*.json"))
    if not known:
        raise ValueError(
            f"{folder} holds no records; give --workdir=FOLDER of a run, or go to a checkout, "
            "whose results/ holds the published ones (a wheel has none)"
        )
    return known
