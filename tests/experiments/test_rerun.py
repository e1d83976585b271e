"""A committed number is measured again and shown beside the old one."""

import pathlib
import shutil

import pytest

from tilescan.cli import main as cli
from tilescan.experiments import rerun

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "results"


def test_rerun_prints_old_and_new_numbers(capsys):
    assert cli.main(["rerun", "zeco", "blocks-P8-K128"]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 numbers are equal in every digit" in out
    assert "recorded:" in out and "again:" in out


def test_rerun_shows_a_number_that_changed(capsys, tmp_path):
    shutil.copytree(RESULTS / "zeco" / "cpu", tmp_path / "run")
    path = tmp_path / "run" / "cells" / "blocks-P8-K128.json"
    path.write_text(path.read_text().replace('"messages": 134', '"messages": 67'))
    arguments = ["rerun", "zeco", "blocks-P8-K128", f"--workdir={tmp_path / 'run'}"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "+1.0e+00" in out and "3 of 4 numbers" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zec", "blocks-P8-K128"), "did you mean 'zeco'?"),
        (("zeco", "blocks-P8-K12"), "did you mean 'blocks-P8-K128'?"),
        (("zeco", "blocks-P8-K128", "--scale=smoke"), "holds no records"),
    ],
)
def test_errors_name_what_there_is(arguments, message, capsys):
    assert cli.main(["rerun", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and len(err) < 300


def test_without_a_record_all_are_listed(capsys):
    assert cli.main(["rerun", "zeco"]) == 0
    assert "blocks-P8-K128" in capsys.readouterr().out.splitlines()


def test_numbers_of_a_nested_result_have_dotted_names():
    found = dict(rerun.numbers({"a": {"b": [1, 2.5]}, "c": "text"}))
    assert found == {"a.b[0]": 1, "a.b[1]": 2.5, "c": "text"}
