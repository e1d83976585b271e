"""Mixtures: whose row each is, rows as without the others, hosts and resuming."""

import fractions
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilescan.data.documents import Document
from tilescan.data.mixtures import Shares, mixture_dataset
from tilescan.data.pipelines import LmRows, lm_dataset
from tilescan.data.tokenizers import get_tokenizer

TOKENIZER, T, B = get_tokenizer("byte"), 16, 8


def documents(letter, count=12):
    return [Document(f"{letter}{i}", letter * (5 + 3 * i)) for i in range(count)]


OLD, NEW, OTHER = map(documents, "onx")


def rows(found, seed=0, **options):
    return LmRows(found, TOKENIZER, seq_len=T, seed=seed, **options)


def mixed(weights, seeds=(0, 0, 0), **options):
    corpora = dict(zip(("old", "new", "other"), (OLD, NEW, OTHER), strict=True))
    parts = {
        name: rows(corpora[name], seed)
        for name, seed in zip(corpora, seeds, strict=True)
        if name in weights
    }
    return mixture_dataset(parts, weights, batch_size=B, **options)


def test_a_part_is_the_data_set_without_the_others():
    """Row for row, whatever packing."""
    for packing in ("packed", "whole"):
        alone = lm_dataset(NEW, TOKENIZER, seq_len=T, batch_size=B, seed=3, packing=packing)
        part = rows(NEW, 3, packing=packing)
        for step in range(12):  # more than an epoch
            for key, values in part.batch(range(step * B, (step + 1) * B)).items():
                np.testing.assert_array_equal(values, alone.batch(step)[key])


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(0, 500),
    st.integers(1, 200),
)
def test_every_row_has_one_place(weights, first, count):
    """Indices of a source follow each other, and its share of rows is exact to within one each."""
    shares = Shares({str(i): w for i, w in enumerate(weights)})
    places = [shares.place(row) for row in range(first + count)]
    for name, share in shares.shares.items():
        own = [index for of, index in places if of == name]
        assert own == list(range(len(own)))
        assert abs(len(own) - share * len(places)) < len(weights)


def test_a_batch_has_its_share_of_each():
    for step in range(20):
        tokens = mixed({"old": 0.25, "new": 0.75}).batch(step)["tokens"]
        assert sum(TOKENIZER.encode("o")[0] in row for row in tokens) == 2
    # Tokens in all are weights as well, and shares may be odd.
    as_tokens, as_shares = mixed({"old": 1e6, "new": 3e6}), mixed({"old": 0.25, "new": 0.75})
    np.testing.assert_array_equal(as_tokens.batch(5)["tokens"], as_shares.batch(5)["tokens"])
    halves = Shares({"replay": fractions.Fraction(1, 2), **dict.fromkeys("abc", 1 / 6)})
    for batch in range(9):
        rows_ = range(20 * batch, 20 * batch + 20)
        assert sum(halves.place(row)[0] == "replay" for row in rows_) == 10
    third = Shares({"a": 0.05, "b": 0.95})
    assert [row for row in range(100) if third.place(row)[0] == "a"] == [19, 39, 59, 79, 99]


def test_replay_replaces_new_rows_and_keeps_both_orders():
    """New rows are those of a run without replay, fewer of them; old ones are as they were."""
    batches = [mixed({"new": 0.75, "old": 0.25}, seeds=(7, 3, 0)).batch(s) for s in range(8)]
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    old = np.array([TOKENIZER.encode("o")[0] in row for row in tokens])
    assert old.sum() == 16 and len(tokens) == 64
    np.testing.assert_array_equal(tokens[~old], rows(NEW, 3).batch(range(48))["tokens"])
    np.testing.assert_array_equal(tokens[old], rows(OLD, 7).batch(range(16))["tokens"])


def test_one_source_is_its_own_data_set():
    alone = lm_dataset(NEW, TOKENIZER, seq_len=T, batch_size=B, seed=0)
    for key, values in mixed({"new": 1.0}).batch(3).items():
        np.testing.assert_array_equal(values, alone.batch(3)[key])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_what_one_has(hosts):
    weights = {"old": 0.3, "new": 0.5, "other": 0.2}
    whole = mixed(weights)
    parts = [mixed(weights, shard_index=i, shard_count=hosts) for i in range(hosts)]
    for step in range(6):
        for key, values in whole.batch(step).items():
            found = np.concatenate([part.batch(step)[key] for part in parts])
            np.testing.assert_array_equal(found, values)


def test_it_goes_on_in_the_middle():
    weights = {"old": 0.3, "new": 0.7}
    iterator = iter(mixed(weights))
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    want = [next(iterator)["tokens"] for _ in range(4)]
    other = iter(mixed(weights))
    other.set_state(state)
    np.testing.assert_array_equal([next(other)["tokens"] for _ in range(4)], want)
    later = iter(mixed(weights, first_batch=5))
    np.testing.assert_array_equal([next(later)["tokens"] for _ in range(4)], want)
    for changed in (mixed({"old": 0.4, "new": 0.6}), mixed(weights, seeds=(1, 0, 0))):
        with pytest.raises(ValueError, match="is of another data set: (weights|source old) was"):
            iter(changed).set_state(state)


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match="packing='contiguous' must be packed or whole"):
        rows(NEW, packing="contiguous")
    with pytest.raises(ValueError, match=r"weights\['new'\]=0 must be above 0"):
        mixed({"new": 0, "old": 1})
    with pytest.raises(ValueError, match="weights is empty"):
        Shares({})
    with pytest.raises(ValueError, match=r"parts are of \['new'\], weights of \['old'\]"):
        mixture_dataset({"new": rows(NEW)}, {"old": 1.0}, batch_size=B)
    short = LmRows(OLD, TOKENIZER, seq_len=8, seed=0)
    with pytest.raises(ValueError, match=r"parts\['old'\] has seq_len 8, and 'new' has 16"):
        mixture_dataset({"new": rows(NEW), "old": short}, {"new": 1, "old": 1}, batch_size=B)
    with pytest.raises(ValueError, match="first_batch=-1 must be at least 0"):
        mixed({"new": 1.0}, first_batch=-1)
    with pytest.raises(ValueError, match="multiple of shard_count=3"):
        mixed({"new": 1.0}, shard_count=3)
