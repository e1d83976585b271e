"""Runs a paper's cells one after another, keeps what finishes, and goes on where it stopped.

Each finished cell is one JSON file under `workdir`/cells, written atomically: a run that is
interrupted, by Ctrl-C or a loss of power, goes on with the first cell that has no file. A cell
whose settings changed is measured again.
"""

import contextlib
import dataclasses
import functools
import inspect
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import rich.console
import rich.progress

from tilescan.experiments.harness import criteria, locks, parallel, provenance, shared_models
from tilescan.experiments.harness import records as records_lib
from tilescan.experiments.harness.cells import Cell, Paper
from tilescan.experiments.harness.records import Record
from tilescan.experiments.harness.workspace import Workspace
from tilescan.files import write_atomically
from tilescan.training.environment import git


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Ids of the cells of a run: measured now, kept from before, failed (with the reason)."""

    done: tuple[str, ...]
    kept: tuple[str, ...]
    failed: Mapping[str, str]


def run(
    paper: Paper,
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    *,
    only: str = "",
    jobs: int = 1,
    console: rich.console.Console | None = None,
) -> Outcome:
    """Measures the cells of `paper` that have no valid record in `workdir` yet.

    Args:
      paper: what to measure.
      config: the paper's config; kept beside the records as config.json.
      workdir: folder of the records; made if absent.
      only: measure just the cells whose id contains this.
      jobs: how many cells are measured at once; those that take times have the machine alone.
      console: where progress goes; the terminal by default.

    Returns:
      What happened to each cell. A failing cell does not stop the others: its traceback is kept
      under `workdir`/errors and its reason is in the outcome.

    Raises:
      ValueError: two cells share an id, nothing matches `only`, `workdir` holds another paper, or
        jobs is below 1.
      OSError: `workdir` cannot be written.
    """
    console = console or rich.console.Console()
    workdir = pathlib.Path(workdir)
    cells = _cells(paper, config)
    _check_unique(paper, cells)
    chosen = [cell for cell in cells if only in cell.id]
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    if not chosen:
        raise ValueError(f"only={only!r} is in no cell's id; they are {[c.id for c in cells]}")
    _prepare(workdir, paper, config)
    if "scale" in config:  # criteria are as old as the first run that had them
        claims, commit = paper.claims(records_lib.Records([])), git("rev-parse", "HEAD")
        folder = f"{paper.name}/{config.scale}"
        criteria.begin(workdir, folder, claims, records_lib.now(), commit)
    digests = {c.id: records_lib.digest(paper.name, c.id, c.settings, c.seed) for c in cells}
    finished = _retire_stale(workdir, digests)
    kept = [cell for cell in chosen if cell.id in finished]
    pending = [cell for cell in chosen if cell.id not in finished]
    if kept:
        console.print(f"{len(kept)} of {len(chosen)} cells are finished already and are kept.")

    done, failed = [], {}
    one = functools.partial(_measure_cell, paper.name, digests, workdir)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(_progress(console))
        total = sum(cell.seconds for cell in pending)
        bar = progress.add_task(paper.name, total=total, cell=f"{jobs} at once" if jobs > 1 else "")
        begin = lambda cell: progress.update(bar, cell=cell.id)
        # Closed at once: on a full disk, or an interrupt here, no worker goes on.
        outcomes = stack.enter_context(
            contextlib.closing(parallel.measured(one, pending, jobs, begin))
        )
        for cell, record, trace in outcomes:
            if isinstance(record, Exception):
                reason = _shortened(f"{type(record).__name__}: {record}")
                failed[cell.id] = reason
                _keep_error(workdir, cell.id, trace)
                console.print(f"[red]failed[/red] {cell.id}: {reason}", highlight=False)
            else:
                _keep(workdir, cell.id, record)  # a full disk stops the run
                (workdir / "errors" / f"{cell.id}.txt").unlink(missing_ok=True)
                shutil.rmtree(_scratch(workdir, cell, digests[cell.id]), ignore_errors=True)
                done.append(cell.id)
                console.print(f"{cell.id}: {record.seconds:.1f} s", highlight=False)
            progress.advance(bar, cell.seconds)
    return Outcome(tuple(done), tuple(cell.id for cell in kept), failed)


def _measure_cell(
    paper: str, digests: Mapping[str, str], workdir: pathlib.Path, cell: Cell
) -> Record:
    return measure(paper, cell, digests[cell.id], workdir)


def measure(paper: str, cell: Cell, digest: str, workdir: pathlib.Path) -> Record:
    """Measures one cell of the paper of this name; its scratch folder is under `workdir`.

    Raises:
      FloatingPointError: a measured number is not finite.
    """
    folder = _scratch(workdir, cell, digest)
    start = time.perf_counter()
    wants = "workspace" in inspect.signature(cell.measure).parameters
    workspace = Workspace(folder, workdir / "models")
    options = {"workspace": workspace} if wants else {}
    result = records_lib.plain(cell.measure(cell.settings, cell.seed, **options))
    seconds = round(time.perf_counter() - start, 3)
    if not records_lib.is_finite(result):
        raise FloatingPointError(f"a measured number is not finite: {result}")
    return Record(
        paper=paper,
        cell=cell.id,
        digest=digest,
        settings=records_lib.plain(cell.settings),
        seed=cell.seed,
        result=result,
        seconds=seconds,
        environment={
            **records_lib.environment(),
            "finished": records_lib.now(),
            "code": _keep_code(workdir, provenance.code_of(cell.measure)),
            "data": _data_checksums(cell, workspace),
        },
        curve=_curve(folder, workspace),
        models=workspace.used or None,
    )


def _data_checksums(cell: Cell, workspace: Workspace) -> dict[str, str | None]:
    """Returns the checksums of the sources of a cell and of the shared models that it read."""
    settings = [cell.settings, *(model["settings"] for model in workspace.used.values())]
    return {k: v for part in settings for k, v in provenance.data_checksums(part).items()}


def _curve(folder: pathlib.Path, workspace: Workspace) -> dict[str, list[float]] | None:
    """Returns the curve of a cell's own training, or else of the only model that it read."""
    own = provenance.training_curve(folder)
    if own or len(workspace.used) != 1:
        return own
    return provenance.training_curve(workspace.models / next(iter(workspace.used)))


def _keep(workdir: pathlib.Path, cell_id: str, record: Record) -> None:
    try:
        write_atomically(_cell_path(workdir, cell_id), record.to_json())
    except OSError as error:
        raise OSError(
            f"the record of {cell_id} cannot be written to workdir={str(workdir)!r} "
            f"({error.strerror}); the cells before it are kept: make room, then run the same "
            "command to go on"
        ) from error


def _keep_code(workdir: pathlib.Path, code: Mapping[str, str]) -> str:
    """Adds the files that a measurement hangs on to `workdir`/code.json; returns their digest."""
    path, digest = workdir / "code.json", provenance.digest(code)
    with locks.locked(workdir / "code.lock", timeout=60, every=0.05):  # of cells side by side
        known = records_lib.json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if digest not in known:
            write_atomically(path, records_lib.dumps({**known, digest: code}))
    return digest


def _shortened(text: str, most: int = 1000) -> str:
    """Returns one line of bounded length; the end stays, where errors say what to do."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most // 4]} ... {text[-3 * most // 4 :]}"


def _cells(paper: Paper, config: ml_collections.ConfigDict) -> list[Cell]:
    try:
        return list(paper.cells(config))
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ValueError(
            f"the config of {paper.name!r} makes no cells ({type(error).__name__}: {error}); "
            f"compare its values with those of configs/{paper.name}.py"
        ) from error


def _check_unique(paper: Paper, cells: Sequence[Cell]) -> None:
    ids = [cell.id for cell in cells]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise ValueError(f"paper {paper.name!r} has several cells with the id {', '.join(twice)}")


def _prepare(workdir: pathlib.Path, paper: Paper, config: ml_collections.ConfigDict) -> None:
    """Makes the folder and its config.json, or says why it cannot be."""
    text = records_lib.dumps({"paper": paper.name, "config": records_lib.plain(config.to_dict())})
    try:
        (workdir / "cells").mkdir(parents=True, exist_ok=True)
        previous = workdir / "config.json"
        if previous.exists():
            try:
                other = kept_config(workdir)["paper"]
            except ValueError as error:
                raise ValueError(f"{error}; remove it, or give another workdir") from error
            if other != paper.name:
                raise ValueError(
                    f"workdir={str(workdir)!r} holds records of {other!r}, not of {paper.name!r}; "
                    f"give another folder"
                )
        write_atomically(previous, text)
    except OSError as error:
        raise OSError(
            f"workdir={str(workdir)!r} cannot be written ({error.strerror}); "
            f"give a folder that you may write, e.g. --workdir=runs/{paper.name}"
        ) from error


def kept_config(workdir: pathlib.Path) -> Mapping[str, Any]:
    """Returns the config that a run keeps beside its records.

    Raises:
      ValueError: there is none, or it cannot be read; the message names the file.
    """
    path = workdir / "config.json"
    try:
        config = records_lib.json.loads(path.read_text(encoding="utf-8"))["config"]
        return {"paper": config["paper"], "scale": config["scale"], **config}
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is not the config of a run ({error})") from error


def _retire_stale(workdir: pathlib.Path, digests: Mapping[str, str]) -> set[str]:
    """Moves records of other settings to stale/; returns the ids of those that still hold."""
    valid = set()
    for path in sorted((workdir / "cells").glob("*.json")):
        try:
            record = Record.from_json(path.read_text(encoding="utf-8"))
            holds = digests.get(record.cell) == record.digest and all(
                shared_models.digest(model["settings"], model["seed"]) == digest
                for digest, model in (record.models or {}).items()
            )
        except ValueError:
            holds = False
        if holds:
            valid.add(record.cell)
        else:
            (workdir / "stale").mkdir(exist_ok=True)
            path.replace(workdir / "stale" / path.name)
    return valid


def _keep_error(workdir: pathlib.Path, cell_id: str, text: str) -> None:
    write_atomically(workdir / "errors" / f"{cell_id}.txt", text)


def _cell_path(workdir: pathlib.Path, cell_id: str) -> pathlib.Path:
    return workdir / "cells" / f"{cell_id}.json"


def _scratch(workdir: pathlib.Path, cell: Cell, digest: str) -> pathlib.Path:
    return workdir / "scratch" / f"{cell.id}-{digest}"


def _progress(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[cell]}"),
        console=console,
        transient=True,
    )
