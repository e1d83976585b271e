"""Context lengths compared on the same batches: only how far a token sees differs.

Rows of the longest context are cut into shorter ones: every context trains on the same tokens, in
the same order and in the same batches. Comparing runs that draw rows of different lengths instead
would also compare how many different places of the corpus a batch holds.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tilescan.experiments.harness.workspace import Workspace
from tilescan.experiments.measurements import training as measurements
from tilescan.training import config as config_lib
from tilescan.training import inputs
from tilescan.training.train import train


class CutRows:
    """A data set whose rows [B, T] are cut into [B * T / context, context].

    Args:
      dataset: batches of arrays [B, T], as `data.pipelines` makes them.
      context: length of the new rows; it divides T.
    """

    def __init__(self, dataset, context: int):
        self._dataset = dataset
        self._context = context

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return _CutIterator(iter(self._dataset), self._context)


class _CutIterator:
    def __init__(self, inner, context: int):
        self._inner = inner
        self._context = context

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._inner)
        return {name: value.reshape(-1, self._context) for name, value in batch.items()}

    def get_state(self):
        return self._inner.get_state()

    def set_state(self, state) -> None:
        self._inner.set_state(state)


def run(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict:
    """Trains and tests with `settings["context"]`; data.seq_len is the longest context.

    Settings: "train", keys of the training config; "context".

    Returns:
      {"test_loss", "test_perplexity", "test_tokens", "train_loss" (the last logged)}.

    Raises:
      ValueError: the context does not divide data.seq_len.
    """
    context = settings["context"]
    config = measurements.training_config(settings["train"], seed)
    length = config.data.seq_len
    if length % context:
        raise ValueError(f"context={context} must divide data.seq_len={length}")
    datasets = inputs.make_datasets(config_lib.settings(config))
    datasets = {name: CutRows(dataset, context) for name, dataset in datasets.items()}
    with config.unlocked():
        config.data.seq_len = context
        config.data.batch_size *= length // context
    final = train(config, workspace.folder, datasets=datasets)
    return {
        "test_loss": final["test/loss"],
        "test_perplexity": final["test/perplexity"],
        "test_tokens": final["test/weight"],
        "train_loss": final["train/loss"],
    }
