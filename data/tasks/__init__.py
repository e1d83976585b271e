"""Exact tasks: examples made from a seed, or a standard set of images or texts, ready for training.

from tilescan.data import tasks
task = tasks.get("copy", max_length=16)
datasets = task.datasets(batch_size=64, seed=0, eval_batches=4)
train(config, workdir, datasets=datasets)      # with config keys task.config_keys
"""

from tilescan.data.tasks.base import SPLITS, FixedTask, Task, row_hashes
from tilescan.data.tasks.registry import get, summaries

__all__ = ["SPLITS", "FixedTask", "Task", "get", "row_hashes", "summaries"]
