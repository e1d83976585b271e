"""From records to what is read: tables, figures and pages, the same bytes for the same records."""

import dataclasses
import pathlib
import shutil
import types
from collections.abc import Iterable, Mapping
from typing import Any

from tilescan.configs.common import SCALES
from tilescan.experiments.harness import (
    criteria,
    figures,
    html,
    markdown,
    matrix,
    registry,
    staleness,
)
from tilescan.experiments.harness import records as records_lib
from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.results import Results, collect
from tilescan.experiments.harness.runner import kept_config
from tilescan.files import write_atomically
from tilescan.training.environment import git


def files(results: Results) -> dict[str, str]:
    """Returns the files of one results folder that are made of its records, by relative path."""
    tables = {
        "paper": results.paper.name,
        "scale": results.scale,
        "claims": [claim.to_json() for claim in results.claims],
        "tables": [table.to_json() for table in results.tables],
    }
    drawn = {f"figures/{name}.svg": text for name, text in results.figures.items()}
    return {"tables.json": records_lib.dumps(tables), **drawn}


def write(results: Results, folder: pathlib.Path) -> None:
    """Writes the tables and figures of a run's folder, README.md among them."""
    shutil.rmtree(folder / "figures", ignore_errors=True)
    for name, text in files(results).items():
        write_atomically(folder / name, text)
    head = f"# {results.paper.title}\n\n{results.paper.summary}\n\n"
    write_atomically(folder / "README.md", head + markdown.scale(results) + "\n")


def gather(root: pathlib.Path) -> list[Results]:
    """Returns the results of all papers and scales under `root`, by the papers' names."""
    found, ledger = [], criteria.load(root)
    for name in registry.NAMES:
        for scale in SCALES:
            folder = root / name / scale
            if (folder / "config.json").exists():
                of_folder = ledger.get(f"{name}/{scale}", {})
                results = collect(registry.load(name), folder, f"{name}/{scale}")
                found.append(dataclasses.replace(results, entries=of_folder))
    return found


def rebuild(
    root: pathlib.Path,
    code: Mapping[str, str] | None = None,
    only: str | None = None,
    *,
    reworded: Iterable[str] = (),
    begun: criteria.Ledger = types.MappingProxyType({}),
) -> dict[pathlib.Path, str]:
    """Returns the generated files under `root` with their text, RESULTS.md beside it included.

    Args:
      root: the folder of results.
      code: {folder: what became of the code since}, `staleness.code_since` by default.
      only: the paper whose own files are made; of every one by default.
      reworded, begun: as of `criteria.updated`.
    """
    found = gather(root)
    chosen = [results for results in found if only in (None, results.paper.name)]
    claims = {results.folder: results.paper.claims(results.records) for results in chosen}
    head, now = git("rev-parse", "HEAD"), records_lib.now()
    ledger = criteria.updated(
        criteria.load(root), claims, now, head, reworded=reworded, begun=begun
    )
    found = [
        dataclasses.replace(results, entries=ledger.get(results.folder, {})) for results in found
    ]
    code = staleness.code_since(found, root) if code is None else code
    made = {root / criteria.FILE: records_lib.dumps(ledger)}
    for name in [only] if only else dict.fromkeys(results.paper.name for results in found):
        of_paper = [results for results in found if results.paper.name == name]
        for results in of_paper:
            made |= {root / results.folder / path: text for path, text in files(results).items()}
        made[root / name / "README.md"] = markdown.paper_page(of_paper)
        made[root / name / "index.html"] = html.paper_page(of_paper)
    made[root / "code.json"] = records_lib.dumps(code)
    made[root / "index.html"] = html.overview(found, code)
    made[root.parent / "RESULTS.md"] = markdown.overview(found, code, root.name)
    if matrix.effects(found):
        made[root / "effects.svg"] = figures.effects_chart(matrix.effects(found))
    return made


def publish(
    paper: Paper, workdir: pathlib.Path, root: pathlib.Path, *, allow_modified: bool = False
) -> None:
    """Copies the records of a run to `root`/PAPER/SCALE and rebuilds all that is made of them.

    Args:
      paper: whose records they are.
      workdir: of the run.
      root: the folder of results.
      allow_modified: publish records of a modified work tree, too.

    Raises:
      ValueError: a record was made from a modified work tree, which no commit gives back.
    """
    results = collect(paper, workdir)
    if not allow_modified:
        _refuse_modified(results.records, workdir)
    target = root / paper.name / results.scale
    if target.resolve() != workdir.resolve():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(workdir / "cells", target / "cells")
        for name in ("config.json", "code.json"):
            if (workdir / name).exists():
                shutil.copy2(workdir / name, target / name)
    shutil.rmtree(target / "figures", ignore_errors=True)
    write_all(root, only=paper.name, begun=criteria.load(workdir))


def _refuse_modified(records: Records, workdir: pathlib.Path) -> None:
    """Raises ValueError for records of a work tree that was not as committed; names them."""
    if cells := [record.cell for record in records if record.environment["modified"]]:
        named = ", ".join(cells[:10]) + (f" and {len(cells) - 10} more" if len(cells) > 10 else "")
        raise ValueError(
            f"{len(cells)} of {len(records)} records in {workdir} were made from a modified work "
            f"tree, which no commit gives back: {named}; commit, delete them from cells/ and "
            "measure them again, or keep them as they are by --allow-modified"
        )


def write_all(root: pathlib.Path, only: str | None = None, **options: Any) -> list[pathlib.Path]:
    """Writes what `rebuild` makes, removes figures that are no more; returns the paths."""
    made = rebuild(root, only=only, **options)
    for old in set(root.glob(f"{only or '*'}/*/figures/*.svg")) - set(made):
        old.unlink()
    for path, text in made.items():
        write_atomically(path, text)
    return list(made)


def paper_of(source: pathlib.Path) -> str:
    """Returns the name of the paper whose records lie in a workdir.

    Raises:
      ValueError: it is no workdir.
    """
    try:
        return kept_config(source)["paper"]
    except ValueError as error:
        raise ValueError(
            f"--from={source} is not the workdir of a run: {error}; give the folder that "
            "`tilescan run` named, e.g. runs/flash_attention/cpu"
        ) from error
