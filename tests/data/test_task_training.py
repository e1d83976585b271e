"""Tasks go through the training loop as they are: formats, configuration keys, resume."""

import numpy as np
import pytest

from data import tasks
from training.config import default_config, override
from training.train import train

MODEL = {"model.d_model": 16, "model.repeats": 1, "model.n_heads": 2, "model.mlp_dim": 32}
RUN = {
    "data.batch_size": 8, "train.steps": 4, "train.eval_every": 4, "train.checkpoint_every": 2,
    "train.keep": 9, "train.log_every": 1, "train.progress": False, "train.tensorboard": False,
    "optimizer.warmup_steps": 1,
}  # fmt: skip


def config_for(task, *assignments):
    config = default_config()
    for key, value in {**MODEL, **RUN, **task.config_keys}.items():
        override(config, f"{key}={value}")
    for assignment in assignments:
        override(config, assignment)
    return config


def stripes():
    """Real-valued rows whose sign is the label, 40, 9 and 10 of them."""

    def part(count):
        rng = np.random.default_rng(count)
        labels = rng.integers(0, 2, count)
        values = rng.normal(size=(count, 6)) * 0.1 + (2 * labels - 1)[:, None]
        return {"values": values, "labels": labels}

    def present(arrays):
        tokens = arrays["values"].astype(np.float32)[..., None]
        return {"tokens": tokens, "labels": arrays["labels"].astype(np.int32)}

    load = lambda: {"train": part(40), "validation": part(9), "test": part(10)}
    return tasks.FixedTask("stripes", load, present, 6, 256, 2, n_features=1)


@pytest.mark.parametrize("make", [stripes, lambda: tasks.get("induction", length=6)])
def test_a_task_trains_and_resumes_to_the_same_numbers(make, tmp_path):
    task = make()
    datasets = task.datasets(batch_size=8, seed=0, eval_batches=2)
    final = train(config_for(task), tmp_path, datasets=datasets)
    # Evaluation counts the answers alone: one a row.
    assert final["test/weight"] == (10 if task.n_classes else 16)
    first = (tmp_path / "metrics.jsonl").read_bytes()
    again = task.datasets(batch_size=8, seed=0, eval_batches=2)
    assert train(config_for(task, "train.resume_step=2"), tmp_path, datasets=again) == final
    assert (tmp_path / "metrics.jsonl").read_bytes() == first
