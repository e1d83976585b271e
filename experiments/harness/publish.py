"""From records to what is read: tables, figures and pages, the same bytes for the same records."""

import pathlib
import shutil
from collections.abc import Mapping, Sequence

from tilescan.configs.common import SCALES
from tilescan.experiments.harness import figures, html, markdown, matrix, provenance, registry
from tilescan.experiments.harness import records as records_lib
from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.harness.results import Results, collect
from tilescan.experiments.harness.runner import kept_config
from tilescan.files import write_atomically


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
    found = []
    for name in registry.NAMES:
        for scale in SCALES:
            folder = root / name / scale
            if (folder / "config.json").exists():
                found.append(collect(registry.load(name), folder, f"{name}/{scale}"))
    return found


def rebuild(
    root: pathlib.Path, code: Mapping[str, str] | None = None, only: str | None = None
) -> dict[pathlib.Path, str]:
    """Returns the generated files under `root` with their text, RESULTS.md beside it included.

    Args:
      root: the folder of results.
      code: {folder: what became of the code since}, `code_since` by default.
      only: the paper whose own files are made; of every one by default.
    """
    found = gather(root)
    code = code_since(found) if code is None else code
    made = {}
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


def code_since(found: Sequence[Results]) -> dict[str, str]:
    """Returns {folder: whether the code under its records changed since they were measured}."""
    since = {}
    for results in found:
        then = {record.cell: record.environment.get("code") for record in results.records}
        if not all(then.values()):
            since[results.folder] = matrix.UNKNOWN
            continue
        config = registry.load_config(results.paper.name, results.scale)
        today = {
            cell.id: provenance.digest(provenance.code_of(cell.measure))
            for cell in results.paper.cells(config)
        }
        if all(today.get(cell) == digest for cell, digest in then.items()):
            since[results.folder] = matrix.UNCHANGED
        else:
            since[results.folder] = matrix.CHANGED
    return since


def publish(paper: Paper, workdir: pathlib.Path, root: pathlib.Path) -> None:
    """Copies the records of a run to `root`/PAPER/SCALE and rebuilds all that is made of them."""
    results = collect(paper, workdir)
    target = root / paper.name / results.scale
    if target.resolve() != workdir.resolve():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(workdir / "cells", target / "cells")
        for name in ("config.json", "code.json"):
            if (workdir / name).exists():
                shutil.copy2(workdir / name, target / name)
    shutil.rmtree(target / "figures", ignore_errors=True)
    write_all(root, only=paper.name)


def write_all(root: pathlib.Path, only: str | None = None) -> list[pathlib.Path]:
    """Writes what `rebuild` makes, removes figures that are no more; returns the paths."""
    made = rebuild(root, only=only)
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
