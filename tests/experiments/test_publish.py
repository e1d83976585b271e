"""What a publication refuses, and what it says of code that changed under its records."""

import pathlib
import types

import ml_collections
import pytest

from tilescan.experiments.harness import cells, provenance, publish, records, registry, staleness
from tilescan.experiments.harness.results import Results


def record(cell, **environment):
    known = {"modified": False, "code": None, **environment}
    return records.Record("toy", cell, "", {}, 0, {}, 1.0, known)


def test_records_of_a_modified_tree_are_refused_by_name():
    clean, dirty = record("clean"), [record(f"dirty{i:02}", modified=True) for i in range(12)]
    publish._refuse_modified(records.Records([clean]), pathlib.Path("runs"))
    with pytest.raises(ValueError, match=r"12 of 13 .* dirty00, .*dirty09 and 2 more") as refusal:
        publish._refuse_modified(records.Records([clean, *dirty]), pathlib.Path("runs"))
    assert "--allow-modified" in str(refusal.value) and "clean" not in str(refusal.value)


def test_files_that_changed_under_records_are_named(tmp_path, monkeypatch):
    then = {"tilescan/models/a.py": "1", "tilescan/models/b.py": "1", "tilescan/ops/gone.py": "1"}
    then |= {"tilescan/experiments/harness/html.py": "1"}
    now = {"tilescan/models/a.py": "1", "tilescan/models/b.py": "2"}
    monkeypatch.setattr(provenance, "code_of", lambda measure: now if measure else then)
    monkeypatch.setattr(registry, "load_config", lambda *names: ml_collections.ConfigDict())
    old, new = map(provenance.digest, (then, now))
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "code.json").write_text(records.dumps({old: then, new: now}))
    known = [cells.Cell("x", True, {}), cells.Cell("y", True, {})]
    paper = types.SimpleNamespace(name="toy", cells=lambda config: known)

    def said(*found):
        results = Results(paper, "cpu", "toy", records.Records(list(found)))
        return staleness.code_since([results], tmp_path)["toy"]

    assert said(record("x", code=new), record("y", code=new)) == "unchanged"
    assert said(record("x"), record("y")) == "unknown"
    assert said(record("x", code=old), record("y", code=new)) == (
        "changed under 1 of 2 records (models/b.py, ops/gone.py)"
    )
    assert said(record("x", code=new), record("y")) == "unchanged, unknown of 1"
    assert (
        said(record("gone", code=new)) == "changed under 1 of 1 records (models/a.py, models/b.py)"
    )
