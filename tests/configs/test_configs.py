"""Config files, also by way of absl: --config=configs/PAPER.py:SCALE."""

import pathlib
import re
import subprocess
import sys

import pytest
from absl import app
from absl.testing import flagsaver

from tilescan.configs import flash_attention, flash_attention_2
from tilescan.experiments import run as measuring

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = (flash_attention, flash_attention_2)


@pytest.mark.parametrize("module", CONFIGS, ids=lambda module: module.__name__)
def test_unknown_scale_names_the_known_ones(module):
    with pytest.raises(ValueError, match="scale='cpuu' is unknown.*smoke, cpu, accelerator"):
        module.get_config("cpuu")


@pytest.mark.parametrize("module", CONFIGS, ids=lambda module: module.__name__)
def test_docstring_tells_how_to_run_it(module):
    name = module.__name__.rpartition(".")[2]
    assert f"tilescan run {name} --scale=cpu" in module.__doc__
    assert f"--config=configs/{name}.py:cpu" in module.__doc__


@flagsaver.flagsaver
def test_module_measures_with_overrides(tmp_path, capsys, monkeypatch):
    words = ["run", f"--config={ROOT}/configs/flash_attention.py:smoke", "--only=io-M"]
    words += [f"--workdir={tmp_path}/run", "--config.io.on_chip=(1024,)"]
    monkeypatch.setattr(sys, "argv", words)  # where config_flags looks for overrides
    assert measuring.main(measuring.parse_flags(words)) == 0
    assert [p.name for p in (tmp_path / "run" / "cells").iterdir()] == ["io-M1024.json"]
    assert "Figure 2, middle" in capsys.readouterr().out


@pytest.mark.slow
def test_module_is_a_program(tmp_path):
    words = ["--config=configs/flash_attention.py:smoke", "--only=io-M", f"--workdir={tmp_path}"]
    command = [sys.executable, "-m", "tilescan.experiments.run", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Figure 2, middle" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtime.repeat=3", "unknown key 'runtime.repeat'; did you mean 'runtime.repeats'?"),
        ("runtme.repeats=3", "unknown key 'runtme.repeats'; did you mean 'runtime.repeats'?"),
        ("runtime.repeats=many", "runtime.repeats must be of type int like 1, not 'many'"),
    ],
)
def test_module_names_the_key_and_what_is_right(tmp_path, override, message):
    words = ["run", f"--config={ROOT}/configs/flash_attention.py:smoke", f"--config.{override}"]
    with pytest.raises(SystemExit, match=f"^error: {re.escape(message)}$"):
        measuring.parse_flags([*words, f"--workdir={tmp_path}"])


def test_module_without_a_config_says_what_is_missing():
    words = measuring.parse_flags(["run"])
    with pytest.raises(app.UsageError, match="--config=configs/flash_attention.py:cpu"):
        measuring.main(words)
