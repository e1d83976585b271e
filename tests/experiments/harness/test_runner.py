"""Cells are kept, resumed, measured again when they change, and reported when they fail."""

import collections
import json
import os

import ml_collections
import pytest

from tilescan import files
from tilescan.experiments.harness import cells as cells_lib
from tilescan.experiments.harness import load, parallel, records
from tilescan.experiments.harness import runner as harness


def make_paper(measure, count=3, name="toy"):
    """A paper with `count` cells that differ in their setting x."""

    def cells(config):
        return [
            cells_lib.Cell(f"x{x}", measure, {"x": x, "power": config.power}, seed=x)
            for x in range(count)
        ]

    return cells_lib.Paper(name, "Toy", "A toy.", cells, lambda r: [], lambda r: [])


def config(power=2):
    return ml_collections.ConfigDict({"paper": "toy", "scale": "smoke", "power": power})


def power_of(settings, seed, workspace):
    return {"value": settings["x"] ** settings["power"], "seed": seed}


def test_records_hold_numbers_and_where_they_come_from(tmp_path):
    outcome = harness.run(make_paper(power_of), config(), tmp_path)
    assert outcome.done == ("x0", "x1", "x2") and not outcome.kept and not outcome.failed
    record = records.load(tmp_path).one(x=2)
    assert record.result == {"value": 4, "seed": 2}
    assert record.settings == {"x": 2, "power": 2}
    assert record.seed == 2 and record.seconds >= 0
    assert record.environment["backend"] == "cpu"
    assert {"python", "packages", "device", "commit", "finished"} <= set(record.environment)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["power"] == 2


def test_finished_cells_are_kept_and_not_measured_again(tmp_path):
    calls = []

    def measure(settings, seed, workspace):
        calls.append(settings["x"])
        return power_of(settings, seed, workspace)

    harness.run(make_paper(measure), config(), tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / "cells").iterdir()}
    outcome = harness.run(make_paper(measure), config(), tmp_path)
    assert calls == [0, 1, 2]
    assert outcome.kept == ("x0", "x1", "x2") and not outcome.done
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "cells").iterdir()}


def test_interrupted_run_goes_on_where_it_was(tmp_path):
    calls = []

    def measure(settings, seed, workspace):
        calls.append(settings["x"])
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return power_of(settings, seed, workspace)

    with pytest.raises(KeyboardInterrupt):
        harness.run(make_paper(measure), config(), tmp_path)
    assert [r.cell for r in records.load(tmp_path)] == ["x0"]
    outcome = harness.run(make_paper(measure), config(), tmp_path)
    assert calls == [0, 1, 1, 2]
    assert outcome.kept == ("x0",) and outcome.done == ("x1", "x2")


def test_changed_settings_are_measured_again_and_the_old_record_is_set_aside(tmp_path):
    harness.run(make_paper(power_of), config(power=2), tmp_path)
    outcome = harness.run(make_paper(power_of), config(power=3), tmp_path)
    assert outcome.done == ("x0", "x1", "x2")
    assert records.load(tmp_path).one(x=2).result["value"] == 8
    assert len(list((tmp_path / "stale").iterdir())) == 3


def test_cells_that_are_no_longer_asked_for_leave_the_records(tmp_path):
    harness.run(make_paper(power_of, count=3), config(), tmp_path)
    harness.run(make_paper(power_of, count=2), config(), tmp_path)
    assert [r.cell for r in records.load(tmp_path)] == ["x0", "x1"]


def test_failing_cell_is_named_and_the_others_go_on(tmp_path):
    def measure(settings, seed, workspace):
        if settings["x"] == 1:
            raise RuntimeError("no such kernel")
        return power_of(settings, seed, workspace)

    outcome = harness.run(make_paper(measure), config(), tmp_path)
    assert outcome.done == ("x0", "x2")
    assert outcome.failed == {"x1": "RuntimeError: no such kernel"}
    assert "no such kernel" in (tmp_path / "errors" / "x1.txt").read_text()
    assert records.load(tmp_path).one(x=1) is None
    outcome = harness.run(make_paper(power_of), config(), tmp_path)
    assert outcome.done == ("x1",) and not (tmp_path / "errors" / "x1.txt").exists()


def test_number_that_is_not_finite_fails_its_cell(tmp_path):
    outcome = harness.run(
        make_paper(lambda *_: {"loss": [1.0, float("nan")]}, count=1), config(), tmp_path
    )
    assert "not finite" in outcome.failed["x0"]


def test_broken_record_is_measured_again_by_a_run_and_named_by_a_report(tmp_path):
    harness.run(make_paper(power_of), config(), tmp_path)
    (tmp_path / "cells" / "x1.json").write_text('{"half of')
    with pytest.raises(ValueError, match=r"x1\.json.*delete it"):
        records.load(tmp_path)
    assert harness.run(make_paper(power_of), config(), tmp_path).done == ("x1",)


def test_only_measures_the_cells_whose_id_contains_it(tmp_path):
    assert harness.run(make_paper(power_of), config(), tmp_path, only="x2").done == ("x2",)
    with pytest.raises(ValueError, match="only='y'"):
        harness.run(make_paper(power_of), config(), tmp_path, only="y")


def test_workdir_of_another_paper_is_refused(tmp_path):
    harness.run(make_paper(power_of), config(), tmp_path)
    with pytest.raises(ValueError, match="holds records of 'toy', not of 'other'"):
        harness.run(make_paper(power_of, name="other"), config(), tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {}}'])
def test_a_damaged_config_of_the_workdir_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is not the config of a run .*remove it"):
        harness.run(make_paper(power_of), config(), tmp_path)


def test_a_config_that_makes_no_cells_is_named(tmp_path):
    def cells(config):
        return [cells_lib.Cell(f"x{1 // config.power}", power_of, {})]

    paper = cells_lib.Paper("toy", "", "", cells, lambda r: [], lambda r: [])
    with pytest.raises(ValueError, match="config of 'toy' makes no cells .*configs/toy.py"):
        harness.run(paper, config(power=0), tmp_path)


def test_a_long_reason_keeps_its_end(tmp_path):
    def measure(settings, seed, workspace):
        raise RuntimeError("no network: " + "retrying " * 500 + "\nFetch it with:\n  the command")

    outcome = harness.run(make_paper(measure, count=1), config(), tmp_path)
    assert outcome.failed["x0"].startswith("RuntimeError: no network: retrying")
    assert outcome.failed["x0"].endswith("retrying Fetch it with: the command")
    assert len(outcome.failed["x0"]) < 1100


def test_unwritable_workdir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"workdir='.*file/run' cannot be written.*--workdir="):
        harness.run(make_paper(power_of), config(), tmp_path / "file" / "run")


def test_full_disk_stops_the_run_and_leaves_no_partial_record(tmp_path, monkeypatch):
    real = files.os.replace

    def full(source, target):
        if str(target).endswith("x1.json"):
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    message = r"record of x1 cannot be written to workdir='.*' \(No space left.*same command"
    with pytest.raises(OSError, match=message):
        harness.run(make_paper(power_of), config(), tmp_path)
    assert [p.name for p in (tmp_path / "cells").iterdir()] == ["x0.json"]


def test_two_cells_of_one_id_are_refused(tmp_path):
    cell = cells_lib.Cell("a", power_of, {"x": 1})
    paper = cells_lib.Paper("toy", "", "", lambda c: [cell, cell], lambda r: [], lambda r: [])
    with pytest.raises(ValueError, match="several cells with the id a"):
        harness.run(paper, config(), tmp_path)


@pytest.mark.parametrize("name", ["", "a/b", "a b"])
def test_id_must_be_a_file_name(name):
    with pytest.raises(ValueError, match="id="):
        cells_lib.Cell(name, power_of, {})


def test_digest_depends_on_everything_that_matters_and_on_nothing_else():
    base = records.digest("p", "c", {"a": (1, 2), "b": 3}, 0)
    assert base == records.digest("p", "c", {"b": 3, "a": [1, 2]}, 0)
    others = [
        records.digest("q", "c", {"a": (1, 2), "b": 3}, 0),
        records.digest("p", "d", {"a": (1, 2), "b": 3}, 0),
        records.digest("p", "c", {"a": (1, 2), "b": 4}, 0),
        records.digest("p", "c", {"a": (1, 2), "b": 3}, 1),
    ]
    assert len({base, *others}) == 5


def test_record_text_round_trip_and_selection():
    made = [
        records.Record("p", f"c{i}", "d", {"kind": "k", "i": i}, 0, {"v": i}, 0.1, {})
        for i in range(3)
    ]
    read = records.Records([records.Record.from_json(r.to_json()) for r in made])
    assert list(read) == made
    assert read.values("i") == [0, 1, 2]
    assert read.one(i=1).result == {"v": 1} and read.one(i=9) is None
    with pytest.raises(ValueError, match="3 records match"):
        read.one(kind="k")
    with pytest.raises(ValueError, match="schema"):
        records.Record.from_json(made[0].to_json().replace('"schema": 1', '"schema": 99'))


def test_values_that_json_cannot_hold_are_refused():
    with pytest.raises(TypeError, match="object"):
        records.plain({"a": object()})
    with pytest.raises(ValueError):
        records.dumps({"a": float("inf")})


def of_process(settings, seed):
    if settings["x"] == 1:
        raise ArithmeticError("no such number")
    if settings["x"] == 2:
        load.check_alone()
    if settings["x"] == 3:
        os._exit(1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    value = settings["x"] ** settings["power"]
    return {"value": value, "process": os.getpid(), "cores": cores}


def test_cells_of_two_jobs_are_measured_in_other_processes_and_timed_ones_alone(tmp_path):
    outcome = harness.run(make_paper(of_process, 4), config(), tmp_path, jobs=2)
    assert sorted(outcome.done) == ["x0", "x2"]
    assert outcome.failed["x1"] == "ArithmeticError: no such number"
    assert "fewer --jobs" in outcome.failed["x3"]  # its process died, the others did not
    assert "of_process" in (tmp_path / "errors" / "x1.txt").read_text()
    found = {r.settings["x"]: r.result for r in records.load(tmp_path)}
    assert found[0]["value"] == 0 and found[0]["process"] != os.getpid()
    assert found[2]["value"] == 4 and found[2]["process"] == os.getpid()
    cores = found[2]["cores"]
    assert found[0]["cores"] == (-(-cores // 2) if cores > 1 else cores)  # a share of its own
    # The same command goes on, and none is measured twice.
    assert harness.run(make_paper(power_of), config(), tmp_path).kept == ("x0", "x2")


def test_cells_of_one_model_are_a_workers_and_the_last_are_shared():
    made = [cells_lib.Cell(f"{x}-{s}", power_of, {"x": x}, s) for x in "ab" for s in (0, 1, 2)]
    groups = parallel._groups(made)
    assert [[cell.id for cell in group] for group in groups] == [
        ["a-0", "a-1", "a-2"],
        ["b-0", "b-1", "b-2"],
    ]
    running = {0: (None, groups[0][0], groups[0][1:])}
    assert [c.id for c in parallel._next(collections.deque(), running)] == ["a-2"]
    assert [c.id for c in running[0][2]] == ["a-1"]
    assert parallel._next(collections.deque(), {}) == []


def test_jobs_must_be_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="jobs=0 must be at least 1"):
        harness.run(make_paper(power_of), config(), tmp_path, jobs=0)


def test_a_full_disk_ends_the_other_cells_at_once(tmp_path, monkeypatch):
    ended = []

    def outcomes(measure, cells, jobs, begin):
        try:
            yield from ((cell, measure(cell), "") for cell in cells)
        finally:
            ended.append(len(list((tmp_path / "cells").iterdir())))

    def full(*record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parallel, "measured", outcomes)
    monkeypatch.setattr(harness, "_keep", full)
    with pytest.raises(OSError) as error:
        harness.run(make_paper(power_of), config(), tmp_path, jobs=2)
    assert ended == [0] and error.value.errno == 28  # though the error still holds its frames
