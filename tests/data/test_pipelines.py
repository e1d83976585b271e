"""Pipelines: determinism, exact resume, hosts, splits, classification, bad input."""

import collections
import hashlib
import json

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilescan.data.documents import Document
from tilescan.data.pipelines import (
    PACKINGS,
    classification_dataset,
    evaluation_batches,
    lm_dataset,
    split_documents,
)
from tilescan.data.tokenizers import ByteTokenizer

BYTE = ByteTokenizer()
RNG = np.random.default_rng(0)
DOCUMENTS = [
    Document(f"doc{i}", bytes(RNG.integers(97, 123, RNG.integers(1, 120))).decode(), "ab"[i % 2])
    for i in range(23)
]


def dataset(**changes):
    settings = {"seq_len": 16, "batch_size": 4, "seed": 3, "packing": "packed"} | changes
    return lm_dataset(DOCUMENTS, BYTE, **settings)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key]) for key in a
    )


def first(batches, count: int) -> list:
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


# -- determinism and resume ---------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_seed_decides_all(packing):
    one, two = first(dataset(packing=packing), 60), first(dataset(packing=packing), 60)
    assert all(map(same, one, two))
    other = first(dataset(packing=packing, seed=4), 60)
    assert not all(map(same, one, other))


def test_the_order_is_the_same_on_every_machine():
    """A golden digest: a change of the random generator or of the layout must be noticed."""
    documents = [Document(str(i), "golden words" * (1 + i % 5)) for i in range(20)]
    digest = hashlib.sha256()
    for batch in first(lm_dataset(documents, BYTE, seq_len=16, batch_size=4, seed=3), 40):
        digest.update(batch["tokens"].astype("<i4").tobytes())
    assert digest.hexdigest()[:16] == "16fac69ac41851f4"


@pytest.mark.parametrize("packing", PACKINGS)
def test_resume_at_every_step_is_exact(packing):
    batches = dataset(packing=packing)
    iterator = iter(batches)
    expected, states = [], []
    for _ in range(40):
        states.append(json.loads(json.dumps(iterator.get_state())))
        expected.append(next(iterator))
    for step in (*range(0, 36, 5), 1, 35):
        resumed = iter(dataset(packing=packing))  # a new process: a new data set
        resumed.set_state(states[step])
        assert all(same(next(resumed), batch) for batch in expected[step : step + 4])
    iterator.set_state(states[2])  # backwards, in the same iterator
    assert same(next(iterator), expected[2])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shape", [(1, 2), (4, 1), (2, 4)])
def test_resume_on_another_number_of_hosts(packing, shape):
    before, after = shape

    def hosts(count):
        return [
            iter(dataset(packing=packing, shard_index=i, shard_count=count)) for i in range(count)
        ]

    def step(iterators):
        parts = [next(iterator) for iterator in iterators]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    expected = first(dataset(packing=packing), 12)
    saved = hosts(before)
    assert all(same(step(saved), batch) for batch in expected[:7])
    states = [iterator.get_state() for iterator in saved]
    assert all(state == states[0] for state in states), "any host's state serves every host"
    resumed = hosts(after)
    for iterator in resumed:
        iterator.set_state(states[0])
    assert all(same(step(resumed), batch) for batch in expected[7:])


def test_states_of_other_data_are_refused():
    state = iter(dataset()).get_state()
    for name, value in {"seq_len": 8, "batch_size": 8, "seed": 9, "packing": "whole"}.items():
        with pytest.raises(ValueError, match=f"another data set: {name} was .* is '?{value}"):
            iter(dataset(**{name: value})).set_state(state)
    other = lm_dataset(DOCUMENTS[1:], BYTE, seq_len=16, batch_size=4, seed=3)
    with pytest.raises(ValueError, match="corpus was"):
        iter(other).set_state(state)
    with pytest.raises(ValueError, match="not a state"):
        iter(dataset()).set_state({"next_index": 3})


def test_orbax_saves_the_iterator(tmp_path):
    iterator = iter(dataset())
    for _ in range(5):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    expected = [next(iterator) for _ in range(3)]
    resumed = iter(dataset())
    with ocp.CheckpointManager(tmp_path) as manager:
        restore = grain.checkpoint.CheckpointRestore(resumed)
        manager.restore(0, args=ocp.args.Composite(data=restore))
    assert all(same(next(resumed), batch) for batch in expected)


def test_grain_transformations_come_after():
    doubled = dataset().map(lambda batch: batch | {"tokens": 2 * batch["tokens"]})
    for plain, double in zip(first(dataset(), 3), first(doubled, 3), strict=True):
        assert np.array_equal(2 * plain["tokens"], double["tokens"])
    iterator = iter(doubled)
    next(iterator)
    state = iterator.get_state()
    expected = next(iterator)
    resumed = iter(doubled)
    resumed.set_state(state)
    assert same(next(resumed), expected)


def test_any_batch_by_its_step():
    batches = dataset(num_epochs=2)
    listed = list(batches)
    assert batches.steps == len(listed)
    assert same(batches.batch(len(listed) - 1), listed[-1])
    with pytest.raises(IndexError, match=f"step={len(listed)} is outside"):
        batches.batch(len(listed))
    assert dataset().steps is None
    assert dataset().batch(10**6)["tokens"].shape == (4, 16)


# -- hosts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("hosts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_hosts_share_each_batch(packing, hosts):
    settings = {"packing": packing, "num_epochs": 2}
    whole = list(dataset(**settings))
    parts = [list(dataset(**settings, shard_index=i, shard_count=hosts)) for i in range(hosts)]
    assert {len(part) for part in parts} == {len(whole)}
    for step, batch in enumerate(whole):
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in batch}
        assert same(joined, batch)


# -- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"packing": p} for p in PACKINGS] + [{"stride": 5}])
def test_evaluation_is_finite_ordered_and_complete(settings):
    batches = list(evaluation_batches(DOCUMENTS, BYTE, seq_len=16, batch_size=4, **settings))
    scored = sum(float(batch["weights"].sum()) for batch in batches)
    assert scored == sum(len(document.text) for document in DOCUMENTS)
    again = list(evaluation_batches(DOCUMENTS, BYTE, seq_len=16, batch_size=4, **settings))
    assert all(map(same, batches, again))
    assert all(batch["tokens"].shape == (4, 16) for batch in batches)


def test_strided_evaluation_is_shared_by_hosts():
    settings = {"seq_len": 16, "batch_size": 4, "stride": 8}
    whole = list(evaluation_batches(DOCUMENTS, BYTE, **settings))
    halves = [
        list(evaluation_batches(DOCUMENTS, BYTE, **settings, shard_index=i, shard_count=2))
        for i in range(2)
    ]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert same(batch, {k: np.concatenate([part[k] for part in parts]) for k in batch})
    for stride in (0, 17):
        with pytest.raises(ValueError, match=rf"stride={stride} must lie in 1\.\.seq_len"):
            evaluation_batches(DOCUMENTS, BYTE, seq_len=16, batch_size=4, stride=stride)


# -- splits -------------------------------------------------------------------------------------

IDS = st.lists(st.text(max_size=8), unique=True, max_size=60)


@given(IDS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_splits_are_disjoint_complete_and_do_not_depend_on_order(ids, seed, random):
    documents = [Document(identity, "x") for identity in ids]
    split = split_documents(documents, seed)
    joined = [document.id for part in split.values() for document in part]
    assert sorted(joined) == sorted(ids)
    shuffled = documents[:]
    random.shuffle(shuffled)
    again = split_documents(shuffled, seed)
    for part in split:
        assert {d.id for d in split[part]} == {d.id for d in again[part]}
        order = [ids.index(document.id) for document in split[part]]
        assert order == sorted(order)
    if len(ids) >= 3:
        assert all(split.values()), "no part is empty while there are three documents"


def test_split_sizes_and_seeds():
    documents = [Document(str(i), "x") for i in range(1000)]
    split = split_documents(documents)
    assert {part: len(chosen) for part, chosen in split.items()} == {
        "train": 900,
        "validation": 50,
        "test": 50,
    }
    other = split_documents(documents, seed=1)
    overlap = {d.id for d in split["test"]} & {d.id for d in other["test"]}
    assert len(overlap) < 15
    # A few documents more move only a few others.
    grown = split_documents([*documents, *(Document(f"new{i}", "x") for i in range(10))])
    moved = {d.id for d in split["test"]} - {d.id for d in grown["test"]}
    assert len(moved) <= 12
    six = split_documents(documents[:6])
    assert [len(part) for part in six.values()] == [4, 1, 1]
    assert split_documents(documents, fractions=(1, 0, 0))["train"] == documents


def test_balanced_splits_keep_the_mix_of_labels():
    documents = [Document(str(i), "x", "ham" if i % 4 else "spam") for i in range(400)]
    for part, size in {"train": 320, "validation": 40, "test": 40}.items():
        chosen = split_documents(documents, fractions=(0.8, 0.1, 0.1), balanced=True)[part]
        assert len(chosen) == size
        assert sum(document.label == "spam" for document in chosen) == size // 4


def official(**counts):
    return [
        Document(f"{split}/{i}", "x", "ab"[i % 2], None if split == "none" else split)
        for split, count in counts.items()
        for i in range(count)
    ]


def sizes_by_split(documents, **options):
    """{part: {the documents' own split: how many}}."""
    parts = split_documents(documents, **options)
    return {
        part: dict(collections.Counter(document.split for document in chosen))
        for part, chosen in parts.items()
    }


def test_documents_of_an_official_split_stay_there():
    assert sizes_by_split(
        official(train=200, test=100), fractions=(0.8, 0.1, 0.1), balanced=True
    ) == {
        "train": {"train": 178},
        "validation": {"train": 22},
        "test": {"test": 100},
    }
    assert sizes_by_split(official(train=60, validation=20, test=30)) == {
        "train": {"train": 60},
        "validation": {"validation": 20},
        "test": {"test": 30},
    }
    assert sizes_by_split(official(train=80), fractions=(0.5, 0.25, 0.25)) == {
        "train": {"train": 40},
        "validation": {"train": 20},
        "test": {"train": 20},
    }
    assert sizes_by_split(official(train=50, test=50), fractions=(1, 0, 0)) == {
        "train": {"train": 50},
        "validation": {},
        "test": {"test": 50},
    }
    assert sizes_by_split(official(train=40, test=40, none=100), fractions=(0.8, 0.1, 0.1)) == {
        "train": {"train": 36, None: 80},
        "validation": {"train": 4, None: 10},
        "test": {"test": 40, None: 10},
    }
    with pytest.raises(ValueError, match="splits \\['dev'\\]; known: train"):
        split_documents(official(dev=3))


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.9, 0.2, -0.1), (0.5, 0.2, 0.2)])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="three numbers >= 0 with sum 1"):
        split_documents(DOCUMENTS, fractions=fractions)


def test_splits_need_distinct_ids():
    with pytest.raises(ValueError, match="an id more than once"):
        split_documents([Document("a", "x"), Document("a", "y")])


# -- classification -----------------------------------------------------------------------------


def test_classification_covers_every_document_once():
    batches = classification_dataset(
        DOCUMENTS, BYTE, seq_len=32, batch_size=4, seed=0, num_epochs=1
    )
    assert batches.steps == 6
    rows = [(b, row) for b in batches for row in range(4)]
    live = [(b, row) for b, row in rows if b["weights"][row]]
    assert len(live) == len(DOCUMENTS)
    found = set()
    for batch, row in live:
        used = batch["segment_ids"][row] == 1
        assert batch["positions"][row][used].tolist() == list(range(used.sum()))
        found.add((tuple(batch["tokens"][row][used].tolist()), int(batch["labels"][row])))
        assert np.all(batch["tokens"][row][~used] == BYTE.pad_id)
    expected = {
        (tuple([*BYTE.encode(document.text).tolist(), 256][:32]), "ab".index(document.label))
        for document in DOCUMENTS
    }
    assert found == expected
    empty = [(b, row) for b, row in rows if not b["weights"][row]]
    assert len(empty) == 1 and not empty[0][0]["segment_ids"][empty[0][1]].any()


def test_classification_resumes_and_shards():
    def make(**changes):
        settings = {"seq_len": 32, "batch_size": 4, "seed": 0} | changes
        return classification_dataset(DOCUMENTS, BYTE, **settings)

    iterator = iter(make())
    for _ in range(9):
        next(iterator)
    state, expected = iterator.get_state(), first(iterator, 5)
    halves = [iter(make(shard_index=i, shard_count=2)) for i in range(2)]
    for half in halves:
        half.set_state(state)
    for batch in expected:
        parts = [next(half) for half in halves]
        assert same(batch, {k: np.concatenate([part[k] for part in parts]) for k in batch})


def test_classification_checks_labels():
    settings = {"seq_len": 8, "batch_size": 2, "seed": 0}
    with pytest.raises(ValueError, match="1 of 2 documents have no label, e.g. 'x'"):
        classification_dataset([Document("x", "t"), Document("y", "t", "a")], BYTE, **settings)
    with pytest.raises(ValueError, match=r"lacks \['b'\]"):
        classification_dataset(DOCUMENTS, BYTE, labels=("a", "c"), **settings)
    batch = next(iter(classification_dataset(DOCUMENTS, BYTE, labels=("b", "a"), **settings)))
    assert set(batch["labels"]) <= {0, 1}


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"batch_size": -2}, "batch_size=-2 must be at least 1"),
        ({"shard_count": 3}, "batch_size=4 .* multiple of shard_count=3, e.g. 6"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index=2 must lie in 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"num_epochs": 0}, "num_epochs=0 must be at least 1, or None"),
        ({"packing": "tight"}, "packing='tight' must be one of packed, whole, contiguous"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataset(**changes)


def test_batches_go_straight_to_a_device():
    batch = jax.device_put(next(iter(dataset())))
    assert batch["tokens"].dtype == np.int32 and batch["weights"].dtype == np.float32
