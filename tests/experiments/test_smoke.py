"""The whole way from a config to tables, at scale smoke: real code, tiny sizes."""

import json

import pytest

from tilescan.experiments import report, run
from tilescan.experiments.harness import records as records_lib
from tilescan.experiments.harness import registry as papers

# Trainings compile for up to a minute; their parts have tests of their own.
QUICK = pytest.param("flash_attention_2", {"training.lengths": ()}, id="without training")
NAMES = [QUICK, *(pytest.param(n, {}, id=n, marks=pytest.mark.slow) for n in papers.NAMES)]


@pytest.mark.parametrize(("name", "changes"), NAMES)
def test_paper_runs_from_config_to_tables(name, changes, tmp_path, capsys):
    config = papers.load_config(name, "smoke")
    config.update_from_flattened_dict(changes)
    assert run.measure(config, tmp_path / "run") == 0, capsys.readouterr().err
    planned = {cell.id for cell in papers.load(name).cells(config)}
    assert {r.cell for r in records_lib.load(tmp_path / "run")} == planned

    out = capsys.readouterr().out
    made = json.loads((tmp_path / "run" / "tables.json").read_text())
    assert all(table["rows"] for table in made["tables"])
    assert all(table["title"][:20] in out for table in made["tables"])
    assert all(claim["evidence"] for claim in made["claims"])
    assert list((tmp_path / "run" / "figures").glob("*.svg"))
    assert not list((tmp_path / "run" / "scratch").glob("*"))  # finished cells leave no rubbish

    assert run.measure(config, tmp_path / "run") == 0  # the second time nothing is measured
    assert f"{len(planned)} of {len(planned)} cells are finished" in capsys.readouterr().out
    source = tmp_path / "run"
    assert report.rebuild_command(tmp_path / "results", source, allow_modified=True) == 0
    assert name in (tmp_path / "results" / "index.html").read_text()
