"""Whether the code under committed records changed since they were measured, and in which files."""

import json
import pathlib
from collections.abc import Mapping, Sequence

from tilescan.experiments.harness import matrix, provenance, registry
from tilescan.experiments.harness.results import Results

_MOST = 3  # files that are named
_IN_NUMBERS = ("shared_models", "statistics", "workspace")  # of the harness, what makes numbers


def code_since(found: Sequence[Results], root: pathlib.Path) -> dict[str, str]:
    """Returns {folder: whether the code under its records changed, and which files}, in words.

    Args:
      found: all results.
      root: the folder of results, where code.json of each has the files of its records.
    """
    return {results.folder: _of_one(results, root / results.folder) for results in found}


def _of_one(results: Results, folder: pathlib.Path) -> str:
    then = {record.cell: record.environment.get("code") for record in results.records}
    known = {cell: digest for cell, digest in then.items() if digest}
    if not known:
        return matrix.UNKNOWN
    config = registry.load_config(results.paper.name, results.scale)
    today = {
        cell.id: provenance.code_of(cell.measure)
        for cell in results.paper.cells(config)
        if cell.id in known
    }
    kept = json.loads((folder / "code.json").read_text("utf-8")) if _kept(folder) else {}
    changed, files = 0, set()
    for cell, digest in known.items():
        if provenance.digest(today.get(cell, {})) == digest:
            continue
        # Of records whose files were not kept, nothing is known but that some are others.
        differing = _differing(kept[digest], today.get(cell, {})) if digest in kept else None
        changed += differing is None or bool(differing)
        files |= differing or set()
    return _in_words(len(then), len(then) - len(known), changed, sorted(files))


def _kept(folder: pathlib.Path) -> bool:
    return (folder / "code.json").exists()


def _differing(then: Mapping[str, str], now: Mapping[str, str]) -> set[str]:
    """Returns the files that numbers hang on whose code is not the same."""
    return {f for f in {*then, *now} if then.get(f) != now.get(f) and not _of_the_harness(f)}


def _of_the_harness(file: str) -> bool:
    """Returns whether a file keeps and shows numbers, and makes none."""
    path = pathlib.PurePath(file)
    harness = path.parent.name == "harness" and path.stem not in _IN_NUMBERS
    return harness or path.parts[1:] == ("experiments", "__init__.py")


def _in_words(records: int, unknown: int, changed: int, files: Sequence[str]) -> str:
    """Returns the state of some records in words; the files that changed are named."""
    if not changed:
        text = matrix.UNCHANGED
    else:
        text = f"{matrix.CHANGED} under {changed} of {records} records"
        named = [file.removeprefix("tilescan/") for file in files[:_MOST]]
        more = [f"{len(files) - _MOST} more"] if len(files) > _MOST else []
        text += f" ({', '.join([*named, *more])})" if named else ""
    return f"{text}, {matrix.UNKNOWN} of {unknown}" if unknown else text
