"""Exact tasks: splits that cannot overlap, rows that a seed determines."""

import numpy as np
import pytest

from data import tasks

OPTIONS = {
    "copy": {"max_length": 5},
    "lis": {"length": 5, "largest": 30},
    "arithmetic": {"operators": 2},
    "lagged_fibonacci": {"length": 5},
}


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


def test_training_goes_on_where_it_was_and_evaluations_repeat():
    task = tasks.get("copy", max_length=4)
    datasets = task.datasets(batch_size=8, seed=3, eval_batches=2)
    iterator = datasets["train"]
    next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(3)]
    again = task.datasets(batch_size=8, seed=3, eval_batches=2)["train"]
    again.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(again)["tokens"], batch["tokens"])
    other = task.datasets(batch_size=8, seed=4, eval_batches=2)
    assert not np.array_equal(next(other["train"])["tokens"], expected[0]["tokens"])
    for split in ("validation", "test"):
        first, second = (list(d[split]) for d in (datasets, other))
        assert len(first) == 2
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a["tokens"], b["tokens"])


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
