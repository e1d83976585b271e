"""Config files, also by way of absl: python -m experiments.run --config=configs/PAPER.py:SCALE."""

import pathlib
import subprocess
import sys

import pytest

from configs import flash_attention, flash_attention_2

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = (flash_attention, flash_attention_2)


@pytest.mark.parametrize("module", CONFIGS, ids=lambda module: module.__name__)
def test_unknown_scale_names_the_known_ones(module):
    with pytest.raises(ValueError, match="scale='cpuu' is unknown.*smoke, cpu, accelerator"):
        module.get_config("cpuu")


@pytest.mark.parametrize("module", CONFIGS, ids=lambda module: module.__name__)
def test_docstring_tells_how_to_run_it(module):
    name = module.__name__.partition(".")[2]
    assert f"tilescan run {name} --scale=cpu" in module.__doc__
    assert f"--config=configs/{name}.py:cpu" in module.__doc__


def run(*arguments):
    command = [sys.executable, "-m", "experiments.run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_module_measures_with_overrides(tmp_path):
    done = run(
        "--config=configs/flash_attention.py:smoke",
        f"--workdir={tmp_path}/run",
        "--only=io-M",
        "--config.io.on_chip=(1024,)",
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "run" / "cells").iterdir()] == ["io-M1024.json"]
    assert "Figure 2, left" in done.stdout


def test_module_names_the_nearest_key(tmp_path):
    config = "--config=configs/flash_attention.py:smoke"
    done = run(config, "--config.runtime.repeat=3", f"--workdir={tmp_path}")
    assert done.returncode != 0
    assert 'Did you mean "repeats" instead of "repeat"?' in done.stderr.replace("\\n", " ")


def test_module_without_a_config_says_what_is_missing():
    done = run()
    assert done.returncode != 0
    assert "--config=configs/flash_attention.py:cpu" in done.stdout + done.stderr
