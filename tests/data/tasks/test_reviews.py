"""Reviews as bytes: the official split stays, texts are cut or padded."""

import json

import numpy as np
import pytest

from tilescan.data import sources, tasks
from tilescan.data.tasks import reviews


@pytest.fixture
def imdb(tmp_path, monkeypatch):
    """Forty training and ten test reviews in a file of JSON lines."""
    lines = [
        {"split": split, "label": i % 2, "id": i, "text": f"{split} {i} caf\u00e9 " * (i % 4 + 1)}
        for split, count in (("train", 40), ("test", 10))
        for i in range(count)
    ]
    path = tmp_path / "imdb.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setenv("TILESCAN_DATA_FILES", f"imdb={path}")
    reviews._splits.cache_clear()
    yield lines
    reviews._splits.cache_clear()


def shown(dataset):
    """(text, label) of all rows that count."""
    for batch in dataset:
        for row in np.flatnonzero(batch["weights"]):
            tokens = batch["tokens"][row][batch["segment_ids"][row] == 1]
            yield bytes(tokens.astype(np.uint8)).decode(errors="ignore"), batch["labels"][row]


def test_reviews_stay_in_their_official_split(imdb):
    datasets = tasks.get("lra_text", max_length=80).datasets(batch_size=4, seed=0)
    texts = {(line["split"], line["text"]): line["label"] for line in imdb}
    test = dict(shown(datasets["test"]))
    assert test == {text: label for (split, text), label in texts.items() if split == "test"}
    validation = dict(shown(datasets["validation"]))
    assert len(validation) == 4 and sum(validation.values()) == 2
    train = dict(shown(datasets["train"].batch(i) | {"weights": np.ones(4)} for i in range(9)))
    assert not train.keys() & validation.keys()
    assert {("train", text) for text in train.keys() | validation.keys()} == {
        key for key in texts if key[0] == "train"
    }
    habit = tasks.get("lra_text", max_length=80, validate_on_test=True)
    datasets = habit.datasets(batch_size=4, seed=0)
    assert dict(shown(datasets["validation"])) == test
    assert datasets["train"].fingerprint["train_examples"] == 40


def test_long_reviews_are_cut(imdb):
    task = tasks.get("lra_text", max_length=12)
    batch = task.datasets(batch_size=4, seed=0)["test"].batch(0)
    assert batch["tokens"].shape == (4, 12) and batch["segment_ids"].min() == 1
    assert {text[:5] for text, _ in shown([batch])} == {"test "}
    assert (task.vocab_size, task.n_classes) == (258, 2)
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        tasks.get("lra_text", max_length=0)


def test_missing_reviews_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TILESCAN_CACHE", str(tmp_path))
    monkeypatch.delenv("TILESCAN_DATA_FILES", raising=False)
    reviews._splits.cache_clear()
    with pytest.raises(sources.SourceError, match="tilescan data add imdb PATH"):
        tasks.get("lra_text").datasets(batch_size=4, seed=0)
