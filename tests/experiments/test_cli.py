"""The console command: it teaches, and what is mistyped is answered with the nearest known name."""

import json

import pytest

from experiments import cli, papers


def fails(capsys, *argv):
    """Runs a command that must fail; returns (exit status, stderr)."""
    try:
        status = cli.main(list(argv))
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[], ["run"], ["report"], ["plan"], ["data"], ["generate"], ["train"]]
)
def test_help_shows_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"  tilescan {' '.join(command)}".rstrip() in out


def test_unknown_paper_names_the_nearest(capsys):
    status, err = fails(capsys, "run", "flash_atention")
    assert status == 1
    assert "paper='flash_atention' is unknown; did you mean 'flash_attention'?" in err


def test_unknown_scale_names_the_nearest(capsys):
    status, err = fails(capsys, "run", "flash_attention", "--scale=acelerator")
    assert status == 1 and "did you mean 'accelerator'?" in err


def test_unknown_key_of_the_config_names_the_nearest(capsys):
    status, err = fails(capsys, "run", "flash_attention", "--config.runtime.repeat=3")
    assert status == 1
    assert 'Did you mean "repeats" instead of "repeat"?' in err and "Traceback" not in err


def test_value_of_the_wrong_type_is_named(capsys):
    status, err = fails(capsys, "run", "flash_attention", "--config.runtime.repeats=many")
    assert status == 1 and "config.runtime.repeats=many" in err


def test_wrong_flag_names_the_nearest(capsys):
    status, err = fails(capsys, "run", "flash_attention", "--scal=cpu")
    assert status == 2
    assert "unrecognized argument: --scal=cpu" in err and "did you mean '--scale'?" in err


def test_wrong_command_names_the_nearest(capsys):
    status, err = fails(capsys, "rnu")
    assert status == 2 and "did you mean 'run'?" in err


def test_overrides_only_where_there_is_a_config(capsys):
    status, err = fails(capsys, "report", "--config.runtime.repeats=3")
    assert status == 2 and "unrecognized argument" in err


def test_unwritable_workdir_is_an_error_that_says_what_to_do(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    workdir = f"--workdir={tmp_path}/file/run"
    status, err = fails(capsys, "run", "flash_attention", "--scale=smoke", workdir)
    assert status == 1
    assert "cannot be written" in err and "--workdir=runs/flash_attention" in err


def test_data_needs_a_known_source(capsys):
    status, err = fails(capsys, "data", "fetch")
    assert status == 2 and "needs the name of a source" in err
    status, err = fails(capsys, "data", "show", "shakespear")
    assert status == 1 and "shakespeare" in err


def test_list_shows_every_paper(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in papers.NAMES)


def test_run_measures_and_prints_the_table(capsys, tmp_path):
    workdir = f"--workdir={tmp_path}"
    argv = ["run", "flash_attention", "--scale=smoke", "--only=io-M", workdir]
    assert cli.main([*argv, "--config.io.on_chip=(1024,)"]) == 0
    out = capsys.readouterr().out
    assert "Figure 2, left" in out and "published" in out
    record = json.loads((tmp_path / "cells" / "io-M1024.json").read_text())
    assert record["result"]["block_q"] == 16 and record["settings"]["on_chip"] == 1024


@pytest.mark.parametrize("name", papers.NAMES)
@pytest.mark.parametrize("scale", papers.SCALES)
def test_every_config_gives_cells_with_distinct_ids(name, scale):
    config = papers.load_config(name, scale)
    cells = papers.load(name).cells(config)
    assert config.paper == name and config.scale == scale
    assert len({cell.id for cell in cells}) == len(cells) > 0


@pytest.mark.parametrize("name", papers.NAMES)
def test_configs_are_locked(name):
    config = papers.load_config(name, "smoke")
    with pytest.raises(AttributeError, match="papr"):
        config.papr = "x"
