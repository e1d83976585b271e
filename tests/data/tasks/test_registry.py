"""Exact tasks: splits that cannot overlap, rows that a seed determines."""

import json

import numpy as np
import pytest

from tilescan.data import tasks

OPTIONS = {
    "copy": {"max_length": 5},
    "lis": {"length": 5, "largest": 30},
    "arithmetic": {"operators": 2},
    "lagged_fibonacci": {"length": 5},
    "induction": {"length": 8, "vocab_size": 8},
    "associative_recall": {"length": 8, "vocab_size": 10},
    "multi_query_recall": {"length": 16, "pairs": 3, "vocab_size": 32},
    "copying": {"length": 9, "memorize": 4},
    "selective_copying": {"length": 9, "memorize": 4},
    "delay": {"length": 9, "lag": 4},
    "running_sum": {"length": 9},
    "edit_distance": {"length": 4, "alphabet": 5},
    "passkey": {"length": 300},
}
# The targets of the others are not the tokens that follow.
NEXT_TOKEN = OPTIONS.keys() - {
    "multi_query_recall", "copying", "selective_copying", "delay", "running_sum"
}  # fmt: skip


def rows_of(batches):
    return {
        tuple(np.concatenate([row, target]).tolist())
        for batch in batches
        for row, target in zip(batch["tokens"], batch["targets"], strict=True)
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_batches_have_the_shapes_that_the_task_says(name):
    task = tasks.get(name, **OPTIONS[name])
    for split in tasks.SPLITS:
        batch = task.rows(split, 6, (1, 2), hard=False)
        assert {key: value.shape for key, value in batch.items()} == {
            key: (6, task.seq_len) for key in ("tokens", "targets", "weights")
        }
        assert batch["tokens"].min() >= 0 and batch["targets"].max() < task.vocab_size
        assert batch["tokens"].max() < task.vocab_size and batch["targets"].min() >= 0
        if name in NEXT_TOKEN:
            np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
        assert (batch["weights"].sum(axis=1) > 0).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_no_row_is_in_two_splits_whatever_the_seed(name):
    task = tasks.get(name, **OPTIONS[name])
    found = {}
    for split in tasks.SPLITS:
        batches = [task.rows(split, 100, (seed,), hard=False) for seed in range(3)]
        found[split] = rows_of(batches)
    assert not found["train"] & found["validation"]
    assert not (found["train"] | found["validation"]) & found["test"]


@pytest.mark.parametrize("train_examples", [None, 20])
def test_training_goes_on_where_it_was_and_evaluations_repeat(train_examples):
    task = tasks.get("copy", max_length=4)

    def make(seed):
        return task.datasets(batch_size=8, seed=seed, eval_batches=2, train_examples=train_examples)

    iterator = iter(make(3)["train"])
    next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(6)]
    again = iter(make(3)["train"])
    again.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(again)["tokens"], batch["tokens"])
    other = make(4)
    assert not np.array_equal(next(iter(other["train"]))["tokens"], expected[0]["tokens"])
    with pytest.raises(ValueError, match="seed was 3 and is 4"):
        iter(other["train"]).set_state(state)
    fewer = tasks.get("copy", max_length=4, alphabet=25).datasets(
        batch_size=8, seed=3, eval_batches=2, train_examples=train_examples
    )
    with pytest.raises(ValueError, match="options was"):
        iter(fewer["train"]).set_state(state)
    for split in ("validation", "test"):
        first, second = (list(d[split]) for d in (make(3), other))
        assert len(first) == 2
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a["tokens"], b["tokens"])


def test_a_finite_training_set_has_different_rows_and_shows_each_once_an_epoch():
    task = tasks.get("copy", max_length=3, alphabet=5)
    datasets = task.datasets(batch_size=10, seed=0, eval_batches=1, train_examples=40)
    epochs = [[datasets["train"].batch(4 * epoch + i) for i in range(4)] for epoch in range(2)]
    for epoch in epochs:
        assert len(rows_of(epoch)) == 40
    assert rows_of(epochs[0]) == rows_of(epochs[1])
    assert not np.array_equal(epochs[0][0]["tokens"], epochs[1][0]["tokens"])
    assert len(rows_of(datasets["test"])) == 10
    assert not rows_of(epochs[0]) & (rows_of(datasets["test"]) | rows_of(datasets["validation"]))


@pytest.mark.parametrize("train_examples", [None, 30])
def test_hosts_together_see_what_one_sees(train_examples):
    task = tasks.get("induction", length=8)

    def make(**shard):
        return task.datasets(
            batch_size=8, seed=1, eval_batches=2, train_examples=train_examples, **shard
        )

    whole = make()
    parts = [make(shard_index=i, shard_count=2) for i in range(2)]
    for split in tasks.SPLITS:
        for step in range(2):
            both = [part[split].batch(step)["tokens"] for part in parts]
            np.testing.assert_array_equal(np.concatenate(both), whole[split].batch(step)["tokens"])


def fixed_task(features=None):
    """Seven, four and five examples; an example's pixels are its number."""
    first = {"train": 0, "validation": 100, "test": 200}
    counts = {"train": 7, "validation": 4, "test": 5}

    def load():
        numbers = {split: np.arange(first[split], first[split] + n) for split, n in counts.items()}
        return {
            split: {
                "pixels": np.repeat(number[:, None], 3, axis=1).astype(np.uint8),
                "labels": (number % 2).astype(np.uint8),
            }
            for split, number in numbers.items()
        }

    def present(arrays):
        tokens = arrays["pixels"].astype(np.int32)
        return {"tokens": tokens, "labels": arrays["labels"].astype(np.int32)}

    return tasks.FixedTask("toy", load, present, 3, 256, 2, features)


def test_a_fixed_task_shuffles_each_epoch_and_evaluates_all_once():
    task = fixed_task()
    datasets = task.datasets(batch_size=3, seed=0)
    first = lambda batch: batch["tokens"][:, 0].tolist()
    seen = sum((first(datasets["train"].batch(step)) for step in range(7)), [])
    epochs = [seen[7 * i : 7 * i + 7] for i in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    test = list(datasets["test"])
    assert sum((first(batch) for batch in test), [])[:5] == [200, 201, 202, 203, 204]
    assert [batch["weights"].tolist() for batch in test] == [[1, 1, 1], [1, 1, 0]]
    assert test[0]["labels"].tolist() == [0, 1, 0] and test[0]["labels"].dtype == np.int32
    assert len(list(task.datasets(batch_size=3, seed=0, eval_batches=1)["test"])) == 1
    fewer = task.datasets(batch_size=3, seed=0, train_examples=3)["train"]
    assert sorted(first(fewer.batch(5))) == [0, 1, 2]


def test_the_keys_that_a_task_asks_of_a_configuration():
    assert fixed_task(features=1).config_keys == {
        "data.seq_len": 3,
        "model.vocab_size": 256,
        "model.max_len": 3,
        "model.input_features": 1,
        "task": "classification",
        "classifier.n_classes": 2,
    }
    assert "task" not in tasks.get("induction").config_keys


def test_names_and_options_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="did you mean 'arithmetic'"):
        tasks.get("arithmetics")
    with pytest.raises(ValueError, match="task 'copy'.*max_len"):
        tasks.get("copy", max_len=3)
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        tasks.get("copy", max_length=0)
    with pytest.raises(ValueError, match="split='dev'"):
        tasks.get("copy").rows("dev", 1, (0,), hard=False)


def test_a_task_with_too_few_rows_says_so():
    with pytest.raises(ValueError, match="too few different rows"):
        tasks.get("copy", max_length=1, alphabet=1).datasets(batch_size=4, seed=0)


def test_a_state_with_tuples_among_the_options_goes_on_in_the_same_process():
    task = tasks.get("listops", examples=(30, 8, 8), max_depth=2, max_length=32, min_length=4)
    iterator = iter(task.datasets(batch_size=4, seed=0, eval_batches=1)["train"])
    state = iterator.get_state()
    first = next(iterator)
    iterator.set_state(state)
    np.testing.assert_array_equal(next(iterator)["tokens"], first["tokens"])
