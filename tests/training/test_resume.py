"""SIGKILL at any moment, then the same command again: metrics.jsonl is the same, byte for byte."""

import random
import time

import pytest
from tiny_training import TinyModel, start_process, tiny_config, tiny_datasets

from tilescan.training.metrics import read_rows
from tilescan.training.train import train

STEPS, EVERY = 24, 3
RUN = (f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.eval_every=8")

# Batches come slowly enough that a kill can be aimed at a step.
SLOW = """
import time, tiny_training
following = tiny_training.Rows.__next__
def slowly(self):
    time.sleep(0.02)
    return following(self)
tiny_training.Rows.__next__ = slowly
"""

# Orbax commits a checkpoint by a rename; here the one of step 9 never gets there.
STUCK = """
import os, time
def stuck(rename):
    def wrapper(source, *args, **kwargs):
        if str(source).split("/")[-1].startswith("9.orbax"):
            open(os.environ["STUCK"], "w").close()
            time.sleep(600)
        return rename(source, *args, **kwargs)
    return wrapper
os.rename, os.replace = stuck(os.rename), stuck(os.replace)
"""


def resume(workdir):
    return train(tiny_config(*RUN), workdir, model=TinyModel(0.1), datasets=tiny_datasets())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    resume(workdir)
    return (workdir / "metrics.jsonl").read_bytes()


def kill_when(condition, workdir, code=SLOW):
    """Starts the run and kills it as soon as the condition holds; False if it ended before."""
    child = start_process(workdir, *RUN, code=code)
    try:
        while child.poll() is None:
            if condition():
                return True
            time.sleep(0.0005)
        assert child.returncode == 0, child.stdout.read()
        return False
    finally:
        child.kill()
        child.communicate()


def unfinished(workdir):
    return list((workdir / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(tmp_path, uninterrupted):
    metrics = tmp_path / "metrics.jsonl"
    assert kill_when(lambda: metrics.exists() and len(read_rows(metrics)) >= 2, tmp_path)
    resume(tmp_path)
    assert metrics.read_bytes() == uninterrupted


# Quick is test_train.py's test_a_run_goes_on_beside_a_checkpoint_that_was_not_finished.
@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(tmp_path, uninterrupted):
    def saving():
        return any(int(p.name.split(".")[0]) >= 6 for p in unfinished(tmp_path))

    assert kill_when(saving, tmp_path)
    resume(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == uninterrupted
    assert not unfinished(tmp_path), "what the killed run left is cleaned up"


@pytest.mark.slow
def test_killed_between_the_last_byte_of_a_checkpoint_and_its_commit(
    tmp_path, uninterrupted, monkeypatch
):
    stuck = tmp_path / "stuck"
    monkeypatch.setenv("STUCK", str(stuck))
    workdir = tmp_path / "run"
    assert kill_when(stuck.exists, workdir, SLOW + STUCK)
    assert unfinished(workdir)
    newest = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert newest == 6, "step 9 was written whole, but never got its name"
    resume(workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == uninterrupted


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, uninterrupted):
    kill_at_random(tmp_path, kills=2, seed=0)
    resume(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_killed_at_many_moments(tmp_path, uninterrupted, seed):
    kill_at_random(tmp_path, kills=8, seed=seed)
    resume(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == uninterrupted


class After:
    """True from `seconds` after the process that starts next has timed its first step."""

    def __init__(self, workdir, seconds):
        self.file, self.seconds, self.begin = workdir / "timing.jsonl", seconds, None
        self.old = self.changed()

    def changed(self):
        return self.file.stat().st_mtime_ns if self.file.exists() else None

    def __call__(self):
        if self.begin is None and self.changed() != self.old:
            self.begin = time.monotonic()
        return self.begin is not None and time.monotonic() >= self.begin + self.seconds


def kill_at_random(workdir, kills, seed):
    """Kills at random instants until the run ends by itself, `kills` times at most."""
    rng = random.Random(seed)
    for _ in range(kills):
        if not kill_when(After(workdir, rng.uniform(0.0, 0.4)), workdir):
            return
