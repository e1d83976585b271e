"""Packing by its properties: nothing lost, nothing invented, segments and positions right."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilescan.data.documents import Document
from tilescan.data.packing import (
    ContiguousLayout,
    PackedLayout,
    TokenizedCorpus,
    WholeLayout,
    strided_pieces,
)
from tilescan.data.pipelines import PACKINGS, evaluation_batches, lm_dataset
from tilescan.data.tokenizers import ByteTokenizer

BYTE = ByteTokenizer()
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
FEW = settings(max_examples=40)


def corpus_of(lengths: list[int]) -> list[Document]:
    """Documents whose every byte tells the document and, with the position, the place."""
    return [
        Document(f"d{i}", "".join(chr(33 + (7 * i + j) % 90) for j in range(length)))
        for i, length in enumerate(lengths)
    ]


def stream_of(document: Document) -> tuple[int, ...]:
    return (*BYTE.encode(document.text).tolist(), BYTE.eos_id)


def segments(batch: dict[str, np.ndarray], row: int):
    """The runs of one segment id in a row, padding left out: (id, columns)."""
    ids = batch["segment_ids"][row]
    edges = np.flatnonzero(np.diff(ids)) + 1
    for run in np.split(np.arange(ids.size), edges):
        if ids[run[0]]:
            yield int(ids[run[0]]), run


def check_batch(batch: dict[str, np.ndarray], shape: tuple[int, int], carried: bool = False):
    """What holds for every batch by itself."""
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": (shape, "int32"),
        "targets": (shape, "int32"),
        "weights": (shape, "float32"),
        "segment_ids": (shape, "int32"),
        "positions": (shape, "int32"),
    }
    padding = batch["segment_ids"] == 0
    assert np.all(batch["tokens"][padding] == BYTE.pad_id)
    assert np.all(batch["weights"][padding] == 0)
    assert set(np.unique(batch["weights"])) <= {0.0, 1.0}
    for row in range(shape[0]):
        live = np.flatnonzero(~padding[row])
        assert live.tolist() == list(range(live.size)), "padding stands at the end of a row"
        runs = list(segments(batch, row))
        ids = [identity for identity, _ in runs]
        first = ids[0] if ids and carried else 1
        assert ids == list(range(first, first + len(ids)))
        for place, (_, run) in enumerate(runs):
            positions = batch["positions"][row, run]
            start = positions[0] if carried and place == 0 else 0
            assert positions.tolist() == list(range(start, start + run.size))
            tokens, targets = batch["tokens"][row, run], batch["targets"][row, run]
            weights = batch["weights"][row, run]
            assert np.all(targets[:-1] == tokens[1:]), "a target is the next token"
            # Only at an end of document is there no loss, and there never is one.
            assert np.all((weights == 0) == (tokens == BYTE.eos_id))


@FEW
@given(LENGTHS, st.integers(1, 17), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_packed_loses_and_invents_nothing(lengths, seq_len, batch_size, shuffle, seed):
    documents = corpus_of(lengths)
    dataset = lm_dataset(
        documents,
        BYTE,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        num_epochs=1,
    )
    batches = list(dataset)
    assert len(batches) == dataset.steps
    pairs, tokens = collections.Counter(), 0
    for batch in batches:
        check_batch(batch, (batch_size, seq_len))
        live = batch["segment_ids"] > 0
        tokens += int(live.sum())
        scored = batch["weights"] > 0
        pairs.update(zip(batch["tokens"][scored], batch["targets"][scored], strict=True))
    streams = [stream_of(document) for document in documents]
    assert tokens == sum(map(len, streams))
    expected = collections.Counter(
        pair for stream in streams for pair in zip(stream[:-1], stream[1:], strict=True)
    )
    assert pairs == expected, "every token predicts its successor exactly once"
    rows = -(-tokens // seq_len)
    padded = sum(int((batch["segment_ids"] == 0).sum()) for batch in batches)
    assert padded == dataset.steps * batch_size * seq_len - tokens
    assert dataset.steps == -(-rows // batch_size)


@FEW
@given(LENGTHS, st.integers(1, 17))
def test_packed_in_order_is_the_concatenation(lengths, seq_len):
    documents = corpus_of(lengths)
    batches = list(evaluation_batches(documents, BYTE, seq_len=seq_len, batch_size=3))
    tokens = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in batches])
    assert tuple(tokens.tolist()) == sum(map(stream_of, documents), ())


@FEW
@given(LENGTHS, st.integers(1, 17), st.integers(0, 3))
def test_whole_keeps_documents_whole(lengths, seq_len, seed):
    documents = corpus_of(lengths)
    dataset = lm_dataset(
        documents, BYTE, seq_len=seq_len, batch_size=2, seed=seed, packing="whole", num_epochs=1
    )
    found = collections.Counter()
    for batch in dataset:
        check_batch(batch, (2, seq_len))
        for row in range(2):
            for _, run in segments(batch, row):
                found[tuple(batch["tokens"][row, run].tolist())] += 1
    expected = collections.Counter()
    for stream in map(stream_of, documents):
        expected.update(stream[i : i + seq_len] for i in range(0, len(stream), seq_len))
    assert found == expected


def test_whole_wastes_little():
    lengths = np.random.default_rng(0).integers(5, 200, 300)
    layout = WholeLayout(lengths, 256, seed=0, shuffle=True)
    assert lengths.sum() / (layout.rows_per_epoch * 256) > 0.97


@FEW
@given(LENGTHS, st.integers(1, 17), st.integers(1, 5), st.booleans(), st.integers(1, 3))
def test_contiguous_lanes_carry_on(lengths, seq_len, lanes, shuffle, epochs):
    documents = corpus_of(lengths)
    dataset = lm_dataset(
        documents,
        BYTE,
        seq_len=seq_len,
        batch_size=lanes,
        seed=1,
        packing="contiguous",
        shuffle=shuffle,
        num_epochs=epochs,
    )
    batches = list(dataset)
    for batch in batches:
        check_batch(batch, (lanes, seq_len), carried=True)
    found = collections.Counter()
    for lane in range(lanes):
        whole = {
            key: np.concatenate([batch[key][lane] for batch in batches])[None] for key in batches[0]
        }
        # Over all steps a lane is whole documents one after another, each with positions from 0.
        check_batch(whole, (1, seq_len * len(batches)))
        for _, run in segments(whole, 0):
            found[tuple(whole["tokens"][0, run].tolist())] += 1
    expected = collections.Counter(map(stream_of, documents))
    assert found == collections.Counter({key: epochs * count for key, count in expected.items()})


def test_contiguous_lanes_are_balanced():
    lengths = np.random.default_rng(0).integers(5, 200, 300)
    layout = ContiguousLayout(lengths, 64, seed=0, shuffle=True, lanes=8, num_epochs=2)
    assert layout.steps() * 64 * 8 < 2 * lengths.sum() + 8 * (64 + 200)


@FEW
@given(LENGTHS, st.integers(1, 17), st.data())
def test_strided_windows_score_every_target_once(lengths, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    documents = corpus_of(lengths)
    corpus = TokenizedCorpus(documents, BYTE)
    scored = collections.Counter()
    for [piece] in strided_pieces(corpus.lengths, seq_len, stride):
        batch = corpus.fill([[piece]], seq_len)
        for column in np.flatnonzero(batch["weights"][0]):
            place = piece.begin + int(column)
            stream = stream_of(documents[piece.document])
            assert batch["tokens"][0, column] == stream[place]
            assert batch["targets"][0, column] == stream[place + 1]
            assert place < seq_len or column >= seq_len - stride, "too little context"
            scored[piece.document, place] += 1
    expected = {(i, j): 1 for i, length in enumerate(corpus.lengths) for j in range(length - 1)}
    assert scored == expected


@pytest.mark.parametrize("packing", PACKINGS)
def test_epochs_differ_and_repeat_the_corpus(packing):
    documents = corpus_of([30, 7, 19, 40, 3, 25, 11])
    total = sum(len(stream_of(document)) for document in documents)

    def epoch_tokens(shuffle, epochs):
        dataset = lm_dataset(
            documents,
            BYTE,
            seq_len=8,
            batch_size=1,
            seed=0,
            packing=packing,
            shuffle=shuffle,
            num_epochs=epochs,
        )
        rows = [batch["tokens"][batch["segment_ids"] > 0] for batch in dataset]
        return np.concatenate(rows)

    twice = epoch_tokens(True, 2)
    first, second = twice[:total], twice[total:]
    assert sorted(first) == sorted(second)
    assert not np.array_equal(first, second)
    unshuffled = epoch_tokens(False, 2)
    assert np.array_equal(unshuffled[:total], unshuffled[total:])
    assert not np.array_equal(first, unshuffled[:total])


def test_rows_of_an_epoch_do_not_stand_in_the_stream_order():
    layout = PackedLayout(np.asarray([1000]), 10, seed=0, shuffle=True)
    begins = [layout.pieces(0, row)[0].begin for row in range(layout.rows_per_epoch)]
    assert sorted(begins) == list(range(0, 1000, 10))
    assert begins != sorted(begins)


def test_a_corpus_needs_distinct_documents():
    with pytest.raises(ValueError, match="documents is empty"):
        TokenizedCorpus([], BYTE)
    with pytest.raises(ValueError, match="the id 'a' more than once"):
        TokenizedCorpus([Document("a", "x"), Document("b", "y"), Document("a", "z")], BYTE)
