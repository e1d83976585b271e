"""Two real processes train as one does, and one goes on from what two have saved."""

import json
import socket

import pytest
from tiny_training import TinyModel, start_process, tiny_config, tiny_datasets

from training.metrics import read_rows
from training.train import train

# Four virtual devices each; every process feeds its half of the rows.
HALF = """
import os, sys
port, index = int(sys.argv.pop(1)), int(sys.argv.pop(1))
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index)
import tiny_training
whole = tiny_training.Rows.__next__
tiny_training.Rows.__next__ = lambda self: {
    name: value[4 * index : 4 * index + 4] for name, value in whole(self).items()
}
"""
SHORT = ("train.steps=6", "train.checkpoint_every=3")


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workdir = tmp_path / "two"
    workdir.mkdir()
    code = HALF + "tiny_training.tiny_datasets = lambda: {'train': tiny_training.Rows()}\n"
    children = [
        start_process(port, index, str(workdir), *SHORT, "mesh.fsdp=4", code=code)
        for index in (0, 1)
    ]
    for child in children:
        output = child.communicate(timeout=300)[0]
        assert child.returncode == 0, output
    data = {"train": tiny_datasets()["train"]}
    one = tmp_path / "one"
    train(tiny_config(*SHORT), one, model=TinyModel(0.1), datasets=data)
    rows = [read_rows(folder / "metrics.jsonl") for folder in (workdir, one)]
    for two, want in zip(*rows, strict=True):
        assert two.pop("split") == want.pop("split") == "train"
        assert two == pytest.approx(want, rel=1e-4, abs=1e-6)
    numbers = [(workdir / sub / "metrics.jsonl").read_bytes() for sub in (".", "process_1")]
    assert numbers[0] == numbers[1], "both know the numbers"
    assert json.loads((workdir / "environment.json").read_text())["processes"] == 2

    resumed = train(
        tiny_config(*SHORT, "train.resume_step=3"), workdir, model=TinyModel(0.1), datasets=data
    )
    assert resumed["train/loss"] == pytest.approx(rows[1][-1]["loss"], rel=1e-4)
