"""Batches of a user's own files: parts, a resumed order, labels."""

import numpy as np
import pytest
from tiny_training import tiny_config

from tilescan.training import inputs
from tilescan.training.config import ConfigError, settings


def test_files_of_the_users_own_are_split_and_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"line {i} is unlike all others" for i in range(999)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "{line}!"}}\n' for line in lines[:60]))
    c = settings(tiny_config("data.sources=a.txt,./b.jsonl"))
    datasets = inputs.make_datasets(c)
    assert set(datasets) == {"train", "validation", "test"}
    iterator = iter(datasets["train"])
    next(iterator)
    state, expected = iterator.get_state(), next(iterator)
    again = iter(inputs.make_datasets(c)["train"])
    again.set_state(state)
    np.testing.assert_equal(next(again), expected)
    (tmp_path / "b.jsonl").write_text('{"text": "another"}\n')
    with pytest.raises(ValueError, match="is of another data set: corpus was"):
        iter(inputs.make_datasets(c)["train"]).set_state(state)


def test_classification_needs_labels(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [f'{{"text": "{i}", "label": "{"even" if i % 2 else "odd"}"}}' for i in range(40)]
    path.write_text("\n".join(records))
    one = ("task=classification", f"data.sources={path}")
    data = inputs.make_datasets(settings(tiny_config(*one)))
    assert data["train"].fingerprint["labels"] == ["even", "odd"]
    path.write_text(path.read_text() + '\n{"text": "none"}\n{"text": "nor this"}\n')
    with pytest.raises(ValueError, match="of .* documents have no label, e.g. 'a.jsonl:4[12]'"):
        inputs.make_datasets(settings(tiny_config(*one)))
    path.write_text('{"text": "none"}\n')
    with pytest.raises(ConfigError, match=r"task = 'classification' needs .* with labels; data"):
        inputs.make_datasets(settings(tiny_config(*one)))
