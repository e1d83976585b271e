"""A model with too few ids for its data is told before the first step, with both numbers."""

import numpy as np
import pytest
from tiny_training import hybrid_model, tiny_config, tiny_datasets

from tilescan.data import sources, tasks
from tilescan.data.documents import Document
from tilescan.data.packing import TokenizedCorpus
from tilescan.training import inputs
from tilescan.training.config import ConfigError, override, settings
from tilescan.training.train import train

MODEL = ("model.d_model=8", "model.repeats=1", "model.n_heads=2", "model.mlp_dim=8")


@pytest.fixture
def documents(monkeypatch):
    made = [Document(f"invented/{i}", "abc " * 9, "ab"[i % 2]) for i in range(40)]
    monkeypatch.setattr(sources, "load", lambda name: made)


def config(*assignments):
    return tiny_config(*MODEL, "data.sources=invented", *assignments)


@pytest.mark.parametrize("task", ["language_model", "classification"])
def test_a_vocabulary_below_the_tokenizers_is_refused(documents, tmp_path, task):
    with pytest.raises(
        ConfigError, match=r"model.vocab_size = 257 is below the 258 tokens of .*tokenizer 'byte'"
    ):
        train(config("model.vocab_size=257", f"task={task}"), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_vocabulary_below_a_tasks_is_refused(tmp_path):
    task = tasks.get("induction", length=10, vocab_size=20)
    given = config(*(f"{key}={value}" for key, value in task.config_keys.items()))
    override(given, "model.vocab_size=19")
    datasets = task.datasets(batch_size=8, seed=0, eval_batches=1)
    with pytest.raises(ConfigError, match="model.vocab_size = 19 is below the 20 tokens .*induct"):
        train(given, tmp_path, datasets=datasets)


def test_a_larger_vocabulary_is_as_good(documents, tmp_path):
    c = settings(config("model.vocab_size=300"))
    datasets = inputs.make_datasets(c)
    model = inputs.make_model(c, datasets)
    inputs.check_vocabulary(model, datasets["train"])
    assert model.config.vocab_size == 300
    inputs.check_vocabulary(model, [{"tokens": np.zeros((1, 1))}])  # anybody's batches


def test_a_vocabulary_of_nothing_is_not_the_tokenizers(documents):
    with pytest.raises(ConfigError, match="vocab_size=0 must be at least 1"):
        settings(config("model.vocab_size=0"))


def test_fewer_classes_than_labels_are_refused(documents):
    c = settings(config("task=classification", "classifier.n_classes=2"))
    datasets = inputs.make_datasets(c)
    datasets["train"].fingerprint["labels"] = ["a", "b", "c"]
    with pytest.raises(ConfigError, match="n_classes = 2 is below the 3 labels"):
        inputs.make_model(c, datasets)


@pytest.mark.parametrize(
    ("name", "value", "split"),
    [
        ("tokens", 32, "train"), ("tokens", -1, "train"), ("targets", -100, "train"),
        ("tokens", 32, "validation"),
        pytest.param("tokens", -1, "validation", marks=pytest.mark.slow),
        pytest.param("targets", -100, "validation", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_batch_with_other_ids_is_named(tmp_path, name, value, split):
    datasets = tiny_datasets()

    class Wrong:
        def __init__(self, rows):
            self.rows = rows

        def __iter__(self):
            return Wrong(iter(self.rows))

        def __getattr__(self, attribute):
            return getattr(self.rows, attribute)

        def get_state(self):
            return self.rows.get_state()

        def set_state(self, state):
            self.rows.set_state(state)

        def __next__(self):
            batch = {k: np.array(v) for k, v in next(self.rows).items()}
            batch["weights"][0, 0] = 1
            batch[name][0, 0] = value
            return batch

    datasets[split] = Wrong(datasets[split])
    low, high = (value, r"\d+") if value < 0 else (0, value)
    with pytest.raises(
        ValueError, match=rf"{name} of a batch run from {low} to {high}, .*0 to 31 \(model.vocab_"
    ):
        train(tiny_config(), tmp_path, model=hybrid_model(), datasets=datasets)


def test_targets_without_weight_may_be_anything():
    batch = {
        "tokens": np.array([[1, 2]]),
        "targets": np.array([[3, -100]]),
        "weights": np.array([[1.0, 0.0]]),
    }
    inputs.check_ids(batch, {"tokens": 4, "targets": 4})
    with pytest.raises(ValueError, match="targets of a batch run from -100 to 3"):
        inputs.check_ids(batch | {"weights": np.ones((1, 2))}, {"targets": 4})


@pytest.mark.parametrize(
    ("ids", "pad", "error", "message"),
    [
        ([1, 9], 0, ValueError, "run from 0 to 9, with padding's, but its vocab_size is 5"),
        ([1, -1], 0, ValueError, "run from -1 to 4"),
        ([1, 2], 5, ValueError, "run from 1 to 5"),
        ([1.5, 2.0], 0, TypeError, "must give integers, got float64"),
    ],
)
def test_a_tokenizer_that_leaves_its_vocabulary_is_named(ids, pad, error, message):
    class Other:
        name, vocab_size, eos_id, pad_id = "other", 5, 4, pad

        def encode(self, text, *, allow_special=False):
            return np.asarray(ids)

    with pytest.raises(error, match=f"tokenizer 'other'.*{message}"):
        TokenizedCorpus([Document("a", "text")], Other())
