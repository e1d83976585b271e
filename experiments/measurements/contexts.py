"""Context lengths compared on the same batches: only how far a token sees differs.

Rows of the longest context are split into shorter ones: every context trains on the same tokens, in
the same order and in the same batches. Comparing runs on rows of different lengths instead would
also compare how many different places of the corpus a batch holds.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.workspace import Workspace
from tilescan.experiments.measurements import training as measurements
from tilescan.training import config as config_lib
from tilescan.training import inputs
from tilescan.training.train import train


class CutRows:
    """A data set whose rows [B, T] are split into [B * T / context, context].

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


def by_seed(groups: list[Group], metric: str) -> dict[int, tuple[float, float]]:
    """Returns {seed: (value of the first group, of the last)} of the seeds that both have."""
    if len(groups) < 2:
        return {}
    short, long = ({r.seed: r.result[metric] for r in g.records} for g in (groups[0], groups[-1]))
    return {seed: (short[seed], long[seed]) for seed in sorted(short.keys() & long.keys())}


def gains(found: Records) -> tuple[list[float], str]:
    """Returns the gain in perplexity of the longest over the shortest context, also in words.

    Returns:
      ([1 - longest / shortest of each seed], text); ([], "") of fewer than two contexts.
    """
    groups = by(found, "context")
    pairs = by_seed(groups, "test_perplexity")
    made = {seed: 1 - long / short for seed, (short, long) in pairs.items()}
    if not made:
        return [], ""
    listed = ", ".join(f"{-100 * gain:+.1f}% (seed {seed})" for seed, gain in made.items())
    return list(made.values()), f"{listed} from {groups[0].key} to {groups[-1].key} tokens"
