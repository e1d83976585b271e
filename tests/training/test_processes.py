"""Two real processes train as one does, and one goes on from what two have saved."""

import json
import socket
import time

import pytest
from tiny_training import (
    Rows,
    TinyModel,
    hybrid_model,
    start_process,
    tiny_config,
    tiny_datasets,
)

from tilescan.training.metrics import read_rows
from tilescan.training.train import train

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
# A language model whose sequence is cut over all devices of all processes: attention and a scan.
SHARED = """
import os, sys
port, index, count = (int(sys.argv.pop(1)) for _ in range(3))
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // count}"
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", count, index, heartbeat_timeout_seconds=10)
import tiny_training
from tilescan.training.train import train
tiny_training.main = lambda: train(
    tiny_training.tiny_config(*sys.argv[2:]), sys.argv[1],
    model=tiny_training.hybrid_model(), datasets={"train": tiny_training.Rows(8, 16)},
)
"""
CUT = ("data.seq_len=16", "mesh.data=1", "mesh.sequence=4")
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


def start_processes(count, workdir, *assignments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workdir.mkdir()
    return [
        start_process(port, index, count, workdir, *CUT, *assignments, code=SHARED)
        for index in range(count)
    ]


def losses(workdir):
    return [row["loss"] for row in read_rows(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one process with one device."""
    workdir = tmp_path_factory.mktemp("processes") / "alone"
    config = tiny_config(*SHORT, "data.seq_len=16", "mesh.data=-1")
    train(config, workdir, model=hybrid_model(), datasets={"train": Rows(8, 16)})
    return losses(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_share_a_sequence_equal_one(count, tmp_path, alone):
    """All feed the same rows, and each its own part of the tokens."""
    workdir = tmp_path / "together"
    for child in start_processes(count, workdir, *SHORT):
        output = child.communicate(timeout=300)[0]
        assert child.returncode == 0, output
    assert losses(workdir) == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_fewer_go_on(tmp_path, alone):
    workdir = tmp_path / "lost"
    endless = ("train.steps=100000", "train.checkpoint_every=3", "optimizer.schedule=constant")
    first, second = start_processes(2, workdir, *endless)
    wait_for(workdir / "checkpoints" / "3", first)
    second.kill()
    output = first.communicate(timeout=200)[0]
    assert first.returncode != 0
    assert "another task died" in output and "stopped sending heartbeats" in output
    second.communicate()
    saved = sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())
    config = tiny_config(*endless, *CUT, f"train.steps={saved[0] + 2}", "mesh.data=2")
    config.train.resume_step = saved[0]
    resumed = train(config, workdir, model=hybrid_model(), datasets={"train": Rows(8, 16)})
    assert resumed["step"] == saved[0] + 2
    whole = tmp_path / "whole"
    config.train.resume_step, config.mesh.sequence, config.mesh.data = None, 1, -1
    want = train(config, whole, model=hybrid_model(), datasets={"train": Rows(8, 16)})
    assert resumed["train/loss"] == pytest.approx(want["train/loss"], rel=1e-4)


def wait_for(path, child):
    for _ in range(3000):
        if path.exists():
            return
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")
