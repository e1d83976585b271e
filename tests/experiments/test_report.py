"""What is shown is made of the records alone, in the same bytes every time."""

import dataclasses
import functools
import html
import json
import pathlib
import sys
import types
import xml.etree.ElementTree

import ml_collections
import pytest

from tilescan import terminal
from tilescan.experiments import report, run
from tilescan.experiments.harness import cells as cells_lib
from tilescan.experiments.harness import claims, figures, layout, locks, markdown, publish, tables
from tilescan.experiments.harness import registry as papers
from tilescan.experiments.harness import runner as harness
from tilescan.experiments.harness.results import collect
from tilescan.experiments.harness.tables import Column, Table

ROOT = pathlib.Path(__file__).resolve().parents[2]


def toy_tables(records):
    rows = [[r.settings["x"], 1.0, r.result["value"]] for r in records]
    columns = [Column("x"), Column("y", tables.PUBLISHED), Column("y", tables.MEASURED)]
    return [Table("values", "Values <of x>", columns, rows)]


def toy_claims(records):
    value = max((r.result["value"] for r in records), default=None)
    holds = None if value is None else value > 1
    return [claims.judge("grows", "y grows", "y > 1", holds, f"largest y {value}")]


def toy_figures(records):
    x = [r.settings["x"] for r in records]
    y = [r.result["value"] for r in records]
    lines = {"y": (x, y)}
    return {"values": figures.line_chart({"panel": lines}, x_label="x", y_label="y")}


@pytest.fixture
def toy(monkeypatch):
    """A paper named toy that `papers` knows."""

    def cells(config):
        measure = lambda settings, seed: {"value": settings["x"] ** 2}
        return [cells_lib.Cell(f"x{x}", measure, {"x": x}) for x in (1, 2)]

    paper = cells_lib.Paper(
        "toy", "Toy & paper", "About toys.", cells, toy_tables, toy_claims, toy_figures
    )
    monkeypatch.setattr(papers, "NAMES", ("toy",))
    module = types.SimpleNamespace(PAPER=paper)
    monkeypatch.setitem(sys.modules, "tilescan.experiments.papers.toy", module)
    config = ml_collections.ConfigDict({"paper": "toy", "scale": "cpu"})
    of_config = types.SimpleNamespace(get_config=lambda scale: config)
    monkeypatch.setitem(sys.modules, "tilescan.configs.toy", of_config)
    return paper


def test_publish_writes_tables_figures_and_pages(toy, tmp_path, capsys):
    config = ml_collections.ConfigDict({"paper": "toy", "scale": "cpu"})
    workdir, root = tmp_path / "run", tmp_path / "results"
    harness.run(toy, config, workdir)
    options = ["--allow-modified", "--from", str(workdir)]
    assert report.main([*options, "--results", str(root)]) == 0

    folder = root / "toy" / "cpu"
    written = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert written == {
        "config.json", "cells/x1.json", "cells/x2.json",
        "code.json", "tables.json", "figures/values.svg",
    }  # fmt: skip
    assert json.loads((folder / "tables.json").read_text())["claims"][0]["status"] == "shown"
    overview = (tmp_path / "RESULTS.md").read_text()
    assert "| [Toy & paper](results/toy/README.md) | ✓ | 1 of 1 | 1 |" in overview
    markdown = (root / "toy" / "README.md").read_text()
    assert "| 2 | 1.00 | 4 |" in markdown and "](cpu/figures/values.svg)" in markdown
    assert "| [x2](cpu/cells/x2.json) | 0 |" in markdown
    page = (root / "toy" / "index.html").read_text()
    assert "Values &lt;of x&gt;" in page and 'src="cpu/figures/values.svg"' in page
    assert page.index('id="cpu-table-values"') < page.index('id="cpu-figure-values"')
    assert "Y against x: panel." in page and "<code>tilescan run toy --scale=cpu</code>" in page
    assert 'href="toy/index.html#cpu-grows"' in (root / "index.html").read_text()
    ledger = json.loads((root / "criteria.json").read_text())["toy/cpu"]["grows"]
    assert ledger["criterion"] == "y > 1" and "✓†" not in overview  # written as the run began
    stale = folder / "figures" / "old.svg"
    stale.write_text("<svg/>")
    for page in (root / "index.html", root / "toy" / "index.html"):
        text = page.read_text()
        assert "http" not in text and "<script src" not in text
        assert text.count("<script>") == 1 and 'data-status="shown"' in text
        xml.etree.ElementTree.fromstring(text.split("\n", 1)[1])  # every tag is closed

    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p != stale}
    assert report.main(["--results", str(root)]) == 0
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_publishing_a_paper_leaves_the_criteria_of_others(toy, tmp_path, monkeypatch):
    twin = dataclasses.replace(toy, name="twin", title="Twin")
    module = types.SimpleNamespace(PAPER=twin)
    monkeypatch.setitem(sys.modules, "tilescan.experiments.papers.twin", module)
    monkeypatch.setitem(sys.modules, "tilescan.configs.twin", sys.modules["tilescan.configs.toy"])
    monkeypatch.setattr(papers, "NAMES", ("toy", "twin"))
    root = tmp_path / "results"
    for paper in (toy, twin):
        config = ml_collections.ConfigDict({"paper": paper.name, "scale": "cpu"})
        harness.run(paper, config, root / paper.name / "cpu")
    ledger = lambda: json.loads((root / "criteria.json").read_text())
    publish.write_all(root, only="twin")
    assert set(ledger()) == {"twin/cpu"}
    publish.write_all(root)
    assert set(ledger()) == {"toy/cpu", "twin/cpu"}


def test_a_second_run_beside_another_one_says_so(toy, tmp_path, monkeypatch, capsys):
    config = ml_collections.ConfigDict({"paper": "toy", "scale": "cpu"})
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(run.locks, "alone", functools.partial(locks.alone, timeout=0.0))
    with locks.alone("run of experiments", print):
        assert run.measure(config, tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "another run of experiments is going on" in said and "times are marked" in said
    assert run.measure(config, tmp_path / "run") == 0 and not capsys.readouterr().err


def test_show_prints_tables_and_claims(toy, tmp_path, capsys):
    harness.run(toy, ml_collections.ConfigDict({"paper": "toy", "scale": "cpu"}), tmp_path)
    results = collect(toy, tmp_path)
    publish.write(results, tmp_path)
    report.show(results, tmp_path)
    out = capsys.readouterr().out
    assert "Values" in out and "published" in out and "largest y 4" in out


def test_folder_without_results_is_an_error_that_names_it(toy, tmp_path, capsys):
    assert report.main(["--from", str(tmp_path), "--results", str(tmp_path / "r")]) == 1
    assert "config.json" in capsys.readouterr().err


def test_claims_can_go_three_ways():
    def status(holds, needs=""):
        return claims.judge("n", "s", "c", holds, "e", needs).status

    assert status(True) == "shown" and status(False) == "not shown"
    assert status(None) == "not shown" and status(None, "accelerator") == "needs scale: accelerator"
    assert status(True, "accelerator") == "shown"


def test_scale_smoke_decides_no_claim(toy, tmp_path, capsys):
    harness.run(toy, ml_collections.ConfigDict({"paper": "toy", "scale": "smoke"}), tmp_path)
    publish.write(collect(toy, tmp_path), tmp_path)
    (claim,) = json.loads((tmp_path / "tables.json").read_text())["claims"]
    assert claim["status"] == "needs scale: cpu" and claim["evidence"] == "largest y 4"
    decided = claims.judge("n", "s", "c", None, "e", "8 GPUs")
    assert claims.undecided(decided, "cpu") == decided  # what needs more still needs more


def test_figure_is_deterministic_svg_with_every_line():
    panels = {
        "a": {"one": ([128, 2048], [1.0, None]), "two": ([128, 2048], [2.0, 8.0])},
        "b": {"one": ([128], [3.0])},
    }
    options = dict(x_label="length", y_label="ms", log_x=True, log_y=True, dashed=("two",))
    first = figures.line_chart(panels, **options)
    assert first == figures.line_chart(panels, **options)
    assert xml.etree.ElementTree.fromstring(first).tag.endswith("svg")
    assert "stroke-dasharray" in first
    assert all(color in first for color in layout.COLORS[:2])


@pytest.fixture(scope="module")
def found():
    """The committed results."""
    return publish.gather(ROOT / "results")


def test_committed_tables_fit_a_terminal_of_eighty_columns(found, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "width", lambda: 80)
    for results in found:
        report.show(results, pathlib.Path("runs"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1000 and max(map(len, lines)) <= 80
    words = {word for line in lines for word in line.split()}
    cells = {
        w for r in found for t in r.tables for row in t.texts() for c in row for w in c.split()
    }
    assert cells <= words


def test_results_of_forty_four_papers_fit_in_one_page(found):
    many = []
    for i in range(44):
        one = found[i % len(found)]
        paper = dataclasses.replace(one.paper, name=f"paper_{i}", short=f"{one.paper.short} {i}")
        many.append(dataclasses.replace(one, paper=paper))
    text = markdown.overview(many, {}, "results")
    assert all(f"results/paper_{i}/README.md" in text for i in range(44))
    assert len(text.encode()) < 100_000


def undrawn(figure, caption):
    """Returns what pages say of a figure, without its lines."""
    width = 72 * figure.get_figwidth()
    return f'<svg width="{width}pt"><title>{html.escape(caption)}</title></svg>'


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_committed_results_are_exactly_what_the_committed_records_give(drawn, monkeypatch):
    """Figures are laid out, and drawn by the slow test alone: nothing else reads their bytes."""
    if not drawn:
        monkeypatch.setattr(figures, "_to_svg", undrawn)
    code = json.loads((ROOT / "results" / "code.json").read_text("utf-8"))
    made = publish.rebuild(ROOT / "results", code)
    wrong = [
        str(path.relative_to(ROOT))
        for path, text in made.items()
        # A figure's bytes hang on Matplotlib's version as well: it must be there.
        if not path.exists() or (path.suffix != ".svg" and path.read_text("utf-8") != text)
    ]
    assert not wrong, f"run `python -m tilescan.experiments.report`: {wrong}"
    folders = [results for results in publish.gather(ROOT / "results")]
    for results in folders:
        on_disk = {p.stem for p in (ROOT / "results" / results.folder / "figures").glob("*.svg")}
        assert on_disk == set(results.figures)
