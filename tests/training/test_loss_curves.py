"""Loss curves of runs and of tables."""

import json

import numpy as np
import pytest

from tilescan.training import config as config_lib
from tilescan.training.loss_curves import read_curve


@pytest.fixture
def workdir(tmp_path):
    """A run's work folder, as far as its curve goes: 40 steps, 4 of them warm-up."""
    config = config_lib.default_config()
    config.train.steps, config.optimizer.learning_rate = 40, 1e-2
    (tmp_path / "checkpoints").mkdir()
    written = json.dumps(config_lib.as_dict(config_lib.settings(config)))
    (tmp_path / "config.json").write_text(written)
    rows = [{"step": s, "split": "train", "loss": 5 - s / 40} for s in range(2, 41, 2)]
    rows += [{"step": s, "split": "validation", "loss": 6 - s / 40} for s in range(0, 41, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_runs_validation_is_its_curve(workdir):
    curve = read_curve(workdir)
    assert len(curve.rates) == 40 and curve.rates.max() == pytest.approx(1e-2)
    np.testing.assert_array_equal(curve.steps, np.arange(4, 41, 4))  # not that of step 0
    np.testing.assert_allclose(curve.losses, 6 - curve.steps / 40)
    assert curve.warmup == 4 and curve.name == workdir.name
    assert len(read_curve(workdir, split="train").steps) == 20
    assert read_curve(workdir, warmup=7).warmup == 7


def test_a_run_without_enough_validations_has_its_training_losses(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-2]) + "\n")
    np.testing.assert_array_equal(read_curve(workdir).steps, np.arange(2, 41, 2))
    path.write_text("")
    with pytest.raises(ValueError, match="no losses of split 'train'; it has .*'validation': 0"):
        read_curve(workdir)


def test_a_run_by_a_schedule_of_a_file_has_its_own_copy(workdir, tmp_path):
    config = json.loads((workdir / "config.json").read_text())
    config["optimizer"] |= {"schedule": "file:gone.txt", "learning_rate": 2.0}
    (workdir / "config.json").write_text(json.dumps(config))
    factors = [min(1.0, i / 10) for i in range(40)]
    (workdir / "schedule.txt").write_text("\n".join(map(str, factors)))
    curve = read_curve(workdir)
    np.testing.assert_allclose(curve.rates, 2 * np.array(factors))
    assert curve.warmup == 10


def test_a_table_is_a_curve(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("step,loss,lr\n2,4.0,0.1\n4,3.5,0.2\n8,3.0,0.2\n10,2.9,0.1\n")
    curve = read_curve(path)
    want = [0.1, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2, 0.15, 0.1]
    np.testing.assert_allclose(curve.rates, want)
    np.testing.assert_array_equal(curve.losses, [4.0, 3.5, 3.0, 2.9])
    assert curve.warmup == 3 and curve.name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows; it needs a header and columns step, lr and loss"),
        ("step,loss\n1,2\n", "has no column 'lr'; it has step, loss"),
        ("step,lr,loss\n1,2,x\n", "a row is not of numbers: .*'x'"),
        ("step,lr,loss\n1,2\n", "a row is not of numbers"),
        ("step,lr,loss\n2,1,1\n1,1,1\n", "column 'step' must rise, from 1 on"),
        ("step,lr,loss\n0,1,1\n1,1,1\n", "column 'step' must rise, from 1 on"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_curve(path)


def test_what_is_neither_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "gone.csv"):
        with pytest.raises(ValueError, match="neither the work folder of a run nor a CSV file"):
            read_curve(path)
