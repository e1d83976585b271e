"""Models that cells share: trained once, resumed, waited for, trained again when damaged."""

import functools
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import jax
import ml_collections
import numpy as np
import pytest

from tilescan.data.batches import BatchDataset
from tilescan.experiments.harness import records, runner, shared_models
from tilescan.experiments.harness.cells import Cell, Paper
from tilescan.experiments.harness.locks import locked
from tilescan.experiments.harness.workspace import Workspace
from tilescan.training.train import train

KEYS = {
    "model.pattern": ("mlp",),
    "model.repeats": 1,
    "model.d_model": 4,
    "model.n_heads": 1,
    "model.position": "none",
    "model.vocab_size": 8,
    "data.seq_len": 4,
    "data.batch_size": 8,
    "train.steps": 4,
    "train.checkpoint_every": 2,
}
SETTINGS = {"rows": "random", "train": KEYS}
ROOT = pathlib.Path(__file__).resolve().parents[3]


def rows(step):
    tokens = np.random.default_rng(step).integers(8, size=(8, 5), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((8, 4), np.float32),
    }


def make(config, folder, rows=rows):
    return train(config, folder, datasets={"train": BatchDataset(rows, None, {"data": "random"})})


def never(config, folder):
    raise AssertionError(f"{folder} was trained already")


def leaves(trained):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trained.params)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(run, its folder, folders that were trained): two cells read the model of SETTINGS."""
    calls, folder = [], tmp_path_factory.mktemp("run")

    def counted(config, folder):
        calls.append(folder)
        return make(config, folder)

    def measure(settings, seed, workspace):
        found = workspace.trained(settings["model"], seed, counted)
        return {"sum": float(sum(leaf.sum() for leaf in leaves(found))), "d": found.config.d_model}

    cells = [Cell(f"read{x}", measure, {"x": x, "model": SETTINGS}) for x in (1, 2)]
    paper = Paper("toy", "Toy", "", lambda config: cells, lambda r: [], lambda r: [])
    config = ml_collections.ConfigDict({"paper": "toy", "scale": "smoke"})
    run = functools.partial(runner.run, paper, config, folder)
    assert not run().failed
    return run, folder, calls


@pytest.fixture
def models(toy):
    """A folder with the model of SETTINGS, seed 0."""
    return toy[1] / "models"


def test_cells_of_a_run_share_one_training(toy):
    run, folder, calls = toy
    digest = shared_models.digest(SETTINGS, 0)
    assert calls == [folder / "models" / digest]
    assert (folder / "models" / digest / "metrics.jsonl").exists()

    # The records say which model they read, how it was trained, and agree.
    one, two = records.load(folder)
    assert one.result == two.result and one.result["d"] == 4
    want = {digest: {"settings": records.plain(SETTINGS), "seed": 0}}
    assert one.models == two.models == want and one.curve["steps"][-1] == 4
    assert run().kept == ("read1", "read2")

    # A record that read another model than its settings mean today does not hold.
    path = folder / "cells" / "read1.json"
    path.write_text(path.read_text().replace(digest, "0" * 16))
    assert run().done == ("read1",) and len(calls) == 1


def test_other_settings_and_seeds_are_other_models(models):
    digest = functools.partial(shared_models.digest, SETTINGS)
    others = [shared_models.digest({**SETTINGS, "rows": "other"}, 0), digest(1)]
    others.append(shared_models.digest({**SETTINGS, "train": {**KEYS, "train.steps": 5}}, 0))
    assert len({digest(0), *others}) == 4
    assert (models / digest(0)).exists() and not any((models / d).exists() for d in others)


@pytest.mark.slow
def test_an_interrupted_training_goes_on(models, tmp_path):
    asked = []

    def failing(step):
        asked.append(step)
        if step == 3 and asked.count(3) == 1:
            raise RuntimeError("power cut")
        return rows(step)

    cut = functools.partial(make, rows=failing)
    workspace = Workspace(tmp_path, tmp_path / "models")
    with pytest.raises(RuntimeError, match="power cut"):
        workspace.trained(SETTINGS, 0, cut)
    assert not workspace.used
    asked.append("again")
    found = workspace.trained(SETTINGS, 0, cut)
    assert 1 not in asked[asked.index("again") :]  # it went on after step 2; 0 tells the shapes
    whole = Workspace(tmp_path, models).trained(SETTINGS, 0, never)
    for a, b in zip(leaves(found), leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_damaged_model_is_named_and_trained_again(models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    workspace = Workspace(tmp_path, tmp_path / "models")
    before = leaves(workspace.trained(SETTINGS, 0, never))
    folder = tmp_path / "models" / shared_models.digest(SETTINGS, 0)
    for path in (folder / "checkpoints").rglob("d/*"):  # some of them are copies that nobody reads
        path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.warns(UserWarning, match=rf"{folder}.*damaged.*trained again"):
        after = leaves(workspace.trained(SETTINGS, 0, make))
    assert folder.with_name(f"{folder.name}.damaged").exists()
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


WAITING = """
import pathlib, sys
from tests.experiments.harness.test_workspace import SETTINGS, Workspace, never
folder = pathlib.Path(sys.argv[1])
(folder / "asking").touch()
print(Workspace(folder, folder).trained(SETTINGS, 0, never).folder)
"""


@pytest.mark.slow
def test_of_two_processes_one_trains_and_the_other_waits(tmp_path):
    other = None

    def slow(config, folder):
        nonlocal other
        command = [sys.executable, "-c", WAITING, str(tmp_path)]
        other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while not (tmp_path / "asking").exists():
            assert other.poll() is None
            threading.Event().wait(0.1)
        make(config, folder)

    found = Workspace(tmp_path, tmp_path).trained(SETTINGS, 0, slow)
    assert other.communicate(timeout=100)[0].strip() == str(found.folder)
    assert other.returncode == 0


HOLDING = """
import pathlib, sys, time
from tilescan.experiments.harness.locks import locked
with locked(pathlib.Path(sys.argv[1]), 1.0):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    path = tmp_path / "some.lock"
    command = [sys.executable, "-c", HOLDING, str(path)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline().strip() == "held"
    with pytest.raises(TimeoutError, match=f"some.lock is still held by process {holder.pid}"):
        with locked(path, 0.2, every=0.05):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with locked(path, 5.0, every=0.05):
        assert path.exists()


def test_threads_exclude_each_other(tmp_path):
    inside, most = [], []

    def enter():
        with locked(tmp_path / "lock", 10.0, every=0.01):
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.02)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "need 'train'.*they have nothing"),
        ({"train": KEYS, "rows": "random"}, "nothing reads rows"),
        ({"train": {**KEYS, "train.checkpoint_every": 0}}, "checkpoint_every=0"),
        ({"train": KEYS, "task": "inductoin"}, "did you mean 'induction'"),
        ({"checkpoint": "smollm3"}, "checkpoint='smollm3' is unknown; known: smollm2"),
        ({"checkpoint": "smollm2", "seed": 1}, "nothing reads seed"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Workspace(tmp_path, tmp_path / "models").trained(settings, 0)
    assert not (tmp_path / "models").exists()


def test_a_workspace_without_models_says_so(tmp_path):
    with pytest.raises(ValueError, match="no folder of models"):
        Workspace(tmp_path).trained(SETTINGS, 0)


def test_a_published_checkpoint_comes_through_the_same_door(tmp_path, monkeypatch):
    asked = []

    def load_writer(name, *, dtype):
        asked.append((name, dtype))
        return shared_models.text.Writer("model", "params", "tokenizer")

    monkeypatch.setattr(shared_models.text, "load_writer", load_writer)
    workspace = Workspace(tmp_path, tmp_path / "models")
    settings = {"checkpoint": "smollm2", "dtype": "bfloat16"}
    found = workspace.trained(settings, 0)
    assert asked == [("smollm2", "bfloat16")]
    assert (found.model, found.params, found.tokenizer) == ("model", "params", "tokenizer")
    assert found.folder.name in workspace.used
    assert shared_models.digest(settings, 0) == shared_models.digest(settings, 1)
