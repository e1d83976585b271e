"""The loop: what it writes, what it returns, how it stops, and what it says when it must."""

import errno
import json
import os
import shutil
import signal
import sys
import threading

import jax
import numpy as np
import pytest
from tiny_training import Rows, TinyModel, start_process, tiny_config, tiny_datasets

from tilescan.training import train as train_lib
from tilescan.training.checkpoints import CheckpointError
from tilescan.training.metrics import JsonLines, Recorder, read_rows
from tilescan.training.train import train


def run(workdir, *assignments, model=None, datasets=None, tracker=None):
    return train(
        tiny_config(*assignments),
        workdir,
        model=model or TinyModel(0.1),
        datasets=datasets or tiny_datasets(),
        tracker=tracker,
    )


TOLD = []  # what the tracker of `finished` was called with


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run: (workdir, what train returned)."""
    workdir = tmp_path_factory.mktemp("finished")
    tracker = lambda step, values: TOLD.append((step, values))
    return workdir, run(workdir, "train.tensorboard=true", tracker=tracker)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The work folder of the same run once more, with all of its checkpoints."""
    workdir = tmp_path_factory.mktemp("kept")
    run(workdir, "train.keep=9")
    return workdir


@pytest.fixture
def copied(kept, tmp_path):
    """A copy of it, to go on with."""
    return shutil.copytree(kept, tmp_path / "copied")


def test_metrics_hold_every_step_and_evaluations_at_both_ends(finished):
    rows = read_rows(finished[0] / "metrics.jsonl")
    train_steps = [row["step"] for row in rows if row["split"] == "train"]
    evaluations = [row["step"] for row in rows if row["split"] == "validation"]
    assert train_steps == list(range(1, 13)) and evaluations == [0, 6, 12]
    assert rows[0]["loss"] == pytest.approx(np.log(32), abs=0.05), "untrained: knows nothing"
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.03
    assert rows[-1]["perplexity"] == pytest.approx(np.exp(rows[-1]["loss"]))
    assert rows[1]["learning_rate"] == pytest.approx(1e-2 / 4)


def test_a_tracker_is_told_every_row_and_the_speed(finished):
    rows = read_rows(finished[0] / "metrics.jsonl")
    told = {(step, name): value for step, values in TOLD for name, value in values.items()}
    assert all(
        told[row["step"], f"{row['split']}/{name}"] == value
        for row in rows
        for name, value in row.items()
        if name not in ("step", "split")
    )
    assert told[12, "timing/tokens_per_second"] > 0


def test_no_text_is_written_unasked(finished):
    assert not (finished[0] / "samples.jsonl").exists()


def test_evaluation_counts_every_token_once(finished):
    """The last batch has 5 of 8 rows; those that fill it up must not count."""
    weight = sum(batch["weights"].sum() for batch in tiny_datasets()["validation"])
    assert read_rows(finished[0] / "metrics.jsonl")[0]["weight"] == weight


def test_the_result_is_the_last_row_of_every_split(finished):
    workdir, final = finished
    last = {row["split"]: row for row in read_rows(workdir / "metrics.jsonl")}
    assert final["step"] == 12
    assert final["validation/loss"] == last["validation"]["loss"]
    assert final["train/grad_norm"] == last["train"]["grad_norm"]


def test_the_run_says_what_it_was(finished):
    workdir = finished[0]
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["steps"] == 12 and config["optimizer"]["name"] == "adamw"
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__ and environment["platform"] == "cpu"
    assert list((workdir / "tensorboard").glob("events*"))
    speeds = read_rows(workdir / "timing.jsonl")
    assert all(row["tokens_per_second"] > 0 for row in speeds) and speeds


def test_a_finished_run_returns_at_once(finished):
    workdir, final = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    assert run(workdir, "train.tensorboard=true") == final
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_second_run_gives_the_same_numbers(finished, kept):
    same = [(f / "metrics.jsonl").read_bytes() for f in (kept, finished[0])]
    assert same[0] == same[1]


def test_another_seed_gives_others(finished, tmp_path):
    final = run(tmp_path, "seed=1", "train.checkpoint_every=0")
    assert final["validation/loss"] != finished[1]["validation/loss"]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_run_goes_on_from_an_earlier_checkpoint_to_the_same_numbers(finished, copied):
    whole = (copied / "metrics.jsonl").read_bytes()
    assert run(copied, "train.keep=9", "train.resume_step=4") == finished[1]
    assert (copied / "metrics.jsonl").read_bytes() == whole


def test_a_run_goes_on_beside_a_checkpoint_that_was_not_finished(finished, copied):
    """As a kill leaves it: a folder without its name, of which some files are missing."""
    whole, folder = (copied / "metrics.jsonl").read_bytes(), copied / "checkpoints"
    unfinished = (folder / "12").rename(folder / "12.orbax-checkpoint-tmp")
    (unfinished / "_CHECKPOINT_METADATA").unlink()
    assert run(copied, "train.keep=9") == finished[1]
    assert (copied / "metrics.jsonl").read_bytes() == whole
    assert sorted(p.name for p in folder.iterdir()) == ["12", "4", "8"]


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(finished, copied):
    there = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    final = run(copied, "train.keep=9", "train.resume_step=8", *there)
    assert final["train/loss"] == pytest.approx(finished[1]["train/loss"], rel=1e-5)


def test_another_configuration_is_refused_by_its_keys(finished):
    with pytest.raises(CheckpointError) as error:
        run(finished[0], "optimizer.learning_rate=0.5", "seed=3", "train.log_every=2")
    text = str(error.value)
    assert "optimizer.learning_rate = 0.5, was 0.01" in text and "seed = 3, was 0" in text
    assert "log_every" not in text and str(finished[0] / "checkpoints" / "12") in text


@pytest.mark.slow
def test_a_longer_run_continues_where_the_schedule_allows(finished, tmp_path):
    constant = ("optimizer.schedule=constant", "train.eval_every=100")
    whole = run(tmp_path / "whole", "train.steps=12", *constant)
    run(tmp_path / "parts", "train.steps=8", *constant)
    assert run(tmp_path / "parts", "train.steps=12", *constant) == whole
    with pytest.raises(CheckpointError, match="train.steps = 16, was 12"):
        run(finished[0], "train.steps=16")  # a cosine looks at the end


def test_a_missing_resume_step_is_named(finished):
    with pytest.raises(CheckpointError, match=r"resume_step = 5 has no checkpoint .*\[8, 12\]"):
        run(finished[0], "train.resume_step=5")


@pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.slow), 6])
def test_nan_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, at):
    with pytest.raises(FloatingPointError) as error:
        run(tmp_path, datasets=tiny_datasets(nan_at=at))
    text = str(error.value)
    assert f"loss is nan at step {at + 1} " in text and "optimizer.learning_rate" in text
    kept = "the checkpoint of step 4 is from before" if at == 6 else "no checkpoint was saved yet"
    assert kept in text
    steps = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert max(steps) == at
    if at == 6:  # the data mended, it goes on to what would have been
        assert run(tmp_path)["step"] == 12


def test_an_unwritable_workdir_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="workdir .*file/run cannot be written .*choose another"):
        run(tmp_path / "file" / "run", datasets={"train": None})
    with pytest.raises(ValueError, match="workdir is empty"):
        run("", datasets={"train": None})


def test_a_full_disk_is_named_before_any_work_and_left_clean(tmp_path, monkeypatch):
    def full(descriptor):
        if os.fstat(descriptor).st_size:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="workdir .* cannot be written .its disk is full.: make room"):
        run(tmp_path, datasets={"train": None})
    assert list(tmp_path.iterdir()) == []


def test_training_data_that_end_are_named(tmp_path):
    class Short(Rows):
        def __iter__(self):
            return Short()

        def __next__(self):
            if self.index == 3:
                raise StopIteration
            return super().__next__()

    with pytest.raises(ValueError, match=r"ended before step 4 of train.steps = 12"):
        run(tmp_path, datasets={"train": Short()})


def test_a_full_disk_while_metrics_are_written_is_named(copied, monkeypatch):
    def full(self, row):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonLines, "write", full)
    with pytest.raises(CheckpointError, match=r"the disk of .* is full. The last good .*4"):
        run(copied, "train.keep=9", "train.resume_step=4")


LIMITED = """
import resource
from tilescan.training import checkpoints
save = checkpoints.Checkpoints.save
def save_in_little_space(self, step, state, iterator):
    self.wait()
    if step == 8:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    save(self, step, state, iterator)
checkpoints.Checkpoints.save = save_in_little_space
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_of_a_save(finished, tmp_path):
    """The kernel refuses to let files grow beyond 1 kB from the second checkpoint on."""
    child = start_process(tmp_path, "train.log_every=100", code=LIMITED)
    output = child.communicate(timeout=300)[0]
    assert child.returncode == 1
    assert "CheckpointError" in output and "the disk is full" in output
    assert f"The last good checkpoint is {tmp_path / 'checkpoints' / '4'}" in output
    assert run(tmp_path, "train.log_every=100") == finished[1]  # space again: it continues


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_says_how_to_resume(finished, tmp_path, number):
    stop = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}[number]

    class Interrupting(Rows):
        def __iter__(self):
            return Interrupting()

        def __next__(self):
            if self.index == 5:  # during step 6, which is no checkpoint step
                os.kill(os.getpid(), number)
            return super().__next__()

    before = signal.getsignal(number)
    datasets = tiny_datasets() | {"train": Interrupting()}
    with pytest.raises(stop, match=rf"stopped by {number.name} after step 6; .*continue from"):
        run(tmp_path, datasets=datasets)
    assert signal.getsignal(number) is before
    assert (tmp_path / "checkpoints" / "6").is_dir()
    assert run(tmp_path) == finished[1]
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished[0] / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_train_works_outside_the_main_thread(tmp_path):
    result = []
    thread = threading.Thread(target=lambda: result.append(run(tmp_path, "train.steps=4")))
    thread.start()
    thread.join()
    assert result[0]["step"] == 4


def test_free_keys_exist():
    from tilescan.training.config import known_keys

    assert set(train_lib.FREE_ON_RESUME) <= set(known_keys())


def test_a_run_goes_on_when_nobody_reads_its_lines(tmp_path, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    recorder = Recorder(tmp_path, None, 3, tensorboard=False, progress=True)
    recorder.row(1, "validation", {"loss": 2.0})
    recorder.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "split": "validation", "loss": 2.0}
    ]
