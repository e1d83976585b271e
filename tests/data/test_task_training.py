"""A fixed task goes through the training loop as it is: format, configuration keys, last rows."""

import numpy as np

from tilescan.data import tasks
from tilescan.training.config import default_config, override
from tilescan.training.train import train

MODEL = {
    "model.pattern": "('mlp',)", "model.d_model": 16, "model.repeats": 1, "model.mlp_dim": 32,
    "model.position": "none",
}  # fmt: skip
RUN = {
    "data.batch_size": 8, "train.steps": 12, "train.eval_every": 12, "train.checkpoint_every": 0,
    "train.log_every": 1, "train.progress": False, "train.tensorboard": False,
    "optimizer.warmup_steps": 1, "optimizer.learning_rate": 0.01,
}  # fmt: skip


def config_for(task):
    config = default_config()
    for key, value in {**MODEL, **RUN, **task.config_keys}.items():
        override(config, f"{key}={value}")
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


def test_a_real_valued_task_trains_with_its_own_keys(tmp_path):
    task = stripes()
    final = train(config_for(task), tmp_path, datasets=task.datasets(batch_size=8, seed=0))
    assert final["validation/weight"] == 9 and final["test/weight"] == 10  # rows that fill up: 0
    assert final["test/accuracy"] == 1.0
