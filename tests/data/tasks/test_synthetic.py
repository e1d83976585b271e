"""Tasks of recall and memory, solved by small programs that see the tokens alone."""

import collections

import numpy as np
import pytest

from tilescan.data import tasks
from tilescan.data.tasks import synthetic


def drawn(name, count=200, hard=True, **options):
    task = tasks.get(name, **options)
    return task, task.rows("train", count, (3,), hard=hard)


def answers(batch):
    """(row, position, target) of all that counts."""
    rows, positions = np.nonzero(batch["weights"])
    return zip(rows, positions, batch["targets"][rows, positions].tolist(), strict=True)


def test_induction_asks_for_the_letter_after_the_first_trigger():
    task, batch = drawn("induction", length=12, vocab_size=9)
    assert task.seq_len == 13
    places = collections.Counter()
    for row, position, target in answers(batch):
        tokens = batch["tokens"][row].tolist()
        assert position == 12 and tokens.count(7) == 2 and tokens[12] == 7 and 8 not in tokens
        first = tokens.index(7)
        assert tokens[first + 1] == target < 7
        places[first] += 1
    assert set(places) == set(range(10)) and sum(places.values()) == 200
    counted = drawn("induction", hard=False)[1]["weights"]
    assert counted.min() == 1
    assert drawn("induction", hard=False, answer_only=True)[1]["weights"].sum() == 200


def test_associative_recall_is_a_dictionary():
    task, batch = drawn("associative_recall", length=9, vocab_size=13)
    assert task.seq_len == 10
    asked = collections.Counter()
    for row, position, target in answers(batch):
        tokens = batch["tokens"][row].tolist()
        keys, values = tokens[0:8:2], tokens[1:8:2]
        assert set(keys) <= set(range(5)) and set(values) <= set(range(5, 11))
        known = dict(zip(keys, values, strict=True))
        assert [known[key] for key in keys] == values  # a key keeps its value
        assert tokens[8] == 11 and position == 9
        assert known[tokens[9]] == target
        asked[tokens[9]] += 1
    assert set(asked) == set(range(5))
    training = drawn("associative_recall", hard=False)[1]
    assert training["weights"].min() == 1 and training["tokens"].shape == (200, 42)


@pytest.mark.parametrize("passes", [1, 2])
def test_multi_query_recall_is_a_dictionary(passes):
    pairs, length = 4, 32
    options = dict(length=length, pairs=pairs, vocab_size=40, passes=passes)
    _, batch = drawn("multi_query_recall", **options)
    context = 2 * pairs * passes
    for row in range(200):
        tokens, targets = batch["tokens"][row].tolist(), batch["targets"][row].tolist()
        known = dict(zip(tokens[0:context:2], tokens[1:context:2], strict=True))
        assert len(known) == len(set(known.values())) == pairs
        assert all(1 <= key < 20 <= value < 40 for key, value in known.items())
        assert tokens[: 2 * pairs] * passes == tokens[:context]
        at = np.flatnonzero(batch["weights"][row])
        assert len(at) == pairs and at.min() >= context and not (at % 2).any()
        assert {tokens[i]: targets[i] for i in at} == known
    assert len({tuple(np.flatnonzero(row)) for row in batch["weights"]}) > 25
    plain = drawn("multi_query_recall", random_fill=False, **options)[1]
    free = plain["tokens"][:, context:][plain["weights"][:, context:] == 0]
    assert not free.any()


def test_choosing_by_weight_is_drawing_one_after_another():
    """Against the exact probabilities of ordered pairs without replacement."""
    weights = np.asarray([1.0, 2.0, 3.0])
    chosen = synthetic._choose(np.random.default_rng(0), 60_000, weights, 2)
    found = collections.Counter(map(tuple, chosen.tolist()))
    p = weights / weights.sum()
    for i in range(3):
        for j in range(3):
            if i != j:
                expected = p[i] * p[j] / (1 - p[i])
                assert found[i, j] / 60_000 == pytest.approx(expected, abs=0.01)
            else:
                assert found[i, j] == 0
    every = synthetic._choose(np.random.default_rng(0), 50, np.ones(3), 3)
    assert all(sorted(row) == [0, 1, 2] for row in every.tolist())
    assert len(set(map(tuple, every.tolist()))) == 6


@pytest.mark.parametrize("name", ["copying", "selective_copying"])
def test_copying_says_its_letters_in_order_at_the_markers(name):
    task, batch = drawn(name, length=14, memorize=4, vocab_size=7)
    assert task.seq_len == 18
    layouts = set()
    for row in range(200):
        tokens = batch["tokens"][row]
        letters = tokens[:14][tokens[:14] != 0]
        assert letters.min() >= 1 and letters.max() <= 5
        assert tokens[14:].tolist() == [6] * 4
        assert np.flatnonzero(batch["weights"][row]).tolist() == [14, 15, 16, 17]
        assert batch["targets"][row, 14:].tolist() == letters.tolist()
        layouts.add(tuple(np.flatnonzero(tokens[:14])))
    if name == "copying":
        assert layouts == {(0, 1, 2, 3)}
    else:
        assert len(layouts) > 100


def test_delay_says_what_was_lag_places_before():
    _, batch = drawn("delay", length=10, lag=3, vocab_size=5)
    counted = set()
    for row, position, target in answers(batch):
        assert batch["tokens"][row, position - 3] == target
        counted.add(position)
    assert counted == set(range(3, 10))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("induction", {"length": 2}, "length=2 must be at least 3"),
        ("associative_recall", {"vocab_size": 3}, "vocab_size=3 must be at least 4"),
        ("multi_query_recall", {"length": 30}, "length=30 must be even and at least 32"),
        ("multi_query_recall", {"vocab_size": 60}, "vocab_size=60 must be above length=64"),
        ("copying", {"length": 4, "memorize": 5}, "length=4 has no room"),
        ("delay", {"lag": 1024}, "lag=1024 must be below length=1024"),
    ],
)
def test_what_cannot_be_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.get(name, **options)
