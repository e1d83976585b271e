"""Runs that start from other runs and from checkpoints."""

import json
import shutil

import jax
import numpy as np
import pytest

from tilescan.cli import main
from tilescan.training import starts, trained
from tilescan.training.checkpoints import CheckpointError
from tilescan.training.config import ConfigError, as_dict, default_config, override, settings
from tilescan.training.metrics import read_rows
from tilescan.training.train import train

STEPS = 8


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(30):
        (folder / f"{i}.txt").write_text("".join(chr(97 + (i * j) % 26) for j in range(60)))
    return folder


def config_of(texts, *assignments):
    config = default_config()
    config.data.update(sources=(str(texts),), seq_len=16, batch_size=8)
    config.train.update(steps=STEPS, eval_every=4, eval_batches=2, checkpoint_every=4, log_every=1)
    config.train.update(progress=False, tensorboard=False, keep=9)
    config.optimizer.update(schedule="constant", warmup_steps=0, learning_rate=1e-2)
    for assignment in assignments:
        override(config, assignment)
    return config


@pytest.fixture
def untrained(texts, tmp_path):
    """A run's folder, as far as it says what it is, with checkpoints of steps 4 and 8."""
    for step in (4, 8):
        (tmp_path / "before" / "checkpoints" / str(step)).mkdir(parents=True)
    written = json.dumps(as_dict(settings(config_of(texts, *SMALL))))
    (tmp_path / "before" / "config.json").write_text(written)
    return tmp_path / "before"


SMALL = ("model.d_model=16", "model.n_heads=2", "model.repeats=1", "model.vocab_size=300")


@pytest.fixture(scope="module")
def before(texts, tmp_path_factory):
    """A run of 8 steps, with checkpoints of steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("before") / "run"
    train(config_of(texts, *SMALL), workdir)
    return workdir


def rows(workdir, split="train"):
    found = read_rows(workdir / "metrics.jsonl")
    return {row["step"]: row for row in found if row["split"] == split}


@pytest.mark.slow
def test_moments_go_on_as_if_nothing_had_ended(texts, before, tmp_path):
    """From step 4 with its moments and the batches after it: the same numbers, bit by bit."""
    options = (f"train.start_from={before}", "train.start_step=4", "train.start_optimizer=True")
    train(config_of(texts, *options, "train.steps=4", "data.first_batch=4"), tmp_path / "run")
    whole, later = rows(before), rows(tmp_path / "run")
    for step in range(1, 5):
        ours, theirs = later[step], whole[step + 4]
        assert {k: ours[k] for k in ours if k != "step"} == {
            k: theirs[k] for k in theirs if k != "step"
        }
    # The model is that of the start, without being named again.
    assert trained.load_run(tmp_path / "run").model.config.vocab_size == 300


@pytest.mark.slow
def test_a_run_starts_where_another_ended(texts, before, tmp_path):
    """Its first validation is the last of the other; at rate 0 it stays."""
    options = (f"train.start_from={before}", "optimizer.learning_rate=0.0", "seed=3")
    train(config_of(texts, *options, "optimizer.weight_decay=0.0"), tmp_path / "run")
    last, found = rows(before, "validation")[STEPS], rows(tmp_path / "run", "validation")
    assert {row["loss"] for row in found.values()} == {last["loss"]}


@pytest.mark.slow
def test_without_moments_the_first_step_is_of_the_gradients_signs(texts, before, tmp_path):
    """Adam's first update is its rate times the sign of each entry: bias is corrected."""
    options = ("optimizer.weight_decay=0.0", "optimizer.eps=1e-30", "optimizer.groups=()")
    config = config_of(texts, f"train.start_from={before}", *options, "train.steps=1")
    train(config, tmp_path / "run")
    run = trained.load_run(tmp_path / "run")
    old = trained.load_run(before)

    for new, start in zip(jax.tree.leaves(run.params), jax.tree.leaves(old.params), strict=True):
        steps = np.abs(np.asarray(new) - np.asarray(start))
        assert ((steps < 1e-9) | (np.abs(steps - 1e-2) < 1e-6)).all()


@pytest.mark.slow
def test_it_goes_on_without_what_it_started_from(texts, before, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(before, old)
    config = config_of(texts, f"train.start_from={old}", "train.steps=8")
    want = train(config, tmp_path / "whole")
    interrupted = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", interrupted)
    shutil.rmtree(interrupted / "checkpoints" / "8")
    shutil.rmtree(old)
    assert train(config, interrupted) == want


@pytest.mark.slow
def test_a_run_starts_from_an_exported_folder(texts, before, tmp_path):
    assert main.main(["export", str(before), str(tmp_path / "folder")]) == 0
    config = config_of(texts, f"train.start_from={tmp_path / 'folder'}", "train.steps=1")
    train(config, tmp_path / "run")
    first = rows(tmp_path / "run", "validation")[0]["loss"]
    assert first == pytest.approx(rows(before, "validation")[STEPS]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("train.start_from={before}", "train.start_step=5"), r"steps \[4, 8\], not of .* = 5; tr"),
        (("train.start_from={before}", "model.d_model=32"), "model.d_model = 32, but .*has 16: le"),
        (("train.start_from=nowhere",), "'nowhere' is neither the work folder of a run, nor"),
        (("train.start_from={texts}", "train.start_step=4"), "are of runs; .* is none"),
    ],
)
def test_a_start_that_cannot_be_is_refused(texts, untrained, tmp_path, assignments, message):
    made = [a.format(texts=texts, before=untrained) for a in assignments]
    with pytest.raises(ConfigError, match=message):
        train(config_of(texts, *made), tmp_path / "run")


def test_a_folder_of_another_vocabulary_needs_its_tokenizer(texts, tmp_path, monkeypatch):
    start = starts.Start({"vocab_size": 50257}, None, dict)
    monkeypatch.setattr(starts, "opened", lambda c: start)
    with pytest.raises(ConfigError, match="'byte' has 258 tokens, and the model of .* 50257: name"):
        starts.with_start(settings(config_of(texts, "train.start_from=folder")), tmp_path)


def test_parameters_and_a_start_are_one_too_many(texts, tmp_path):
    with pytest.raises(ConfigError, match="params and train.start_from both say what to start"):
        train(config_of(texts, "train.start_from=x"), tmp_path, params={})


def test_the_model_is_that_of_the_start(texts, untrained, tmp_path):
    """Unless a run has its own already; keys that change no parameters may differ."""
    c = settings(config_of(texts, f"train.start_from={untrained}", "model.remat=full"))
    found = starts.with_start(c, tmp_path)
    assert found.model["d_model"] == 16 and found.model["vocab_size"] == 300
    assert found.model["remat"] == "full" and found.data == c.data
    gone = settings(config_of(texts, "train.start_from=gone"))
    assert starts.with_start(gone, untrained).model["d_model"] == 16
    assert starts.with_start(settings(config_of(texts)), tmp_path).model["d_model"] == 512


@pytest.mark.slow
def test_moments_of_another_optimizer_are_refused(texts, before, tmp_path):
    options = (f"train.start_from={before}", "train.start_optimizer=True", "optimizer.name=sgd")
    with pytest.raises(CheckpointError, match="start_optimizer needs the same model, optimizer.na"):
        train(config_of(texts, *options), tmp_path / "run")
