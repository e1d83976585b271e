"""Grain pipelines: documents in, batches [B, T] out, resumable to the very step.

    splits = split_documents(sources.load("shakespeare"))
    batches = lm_dataset(splits["train"], get_tokenizer("byte"), seq_len=512, batch_size=8, seed=0)
    iterator = iter(batches)
    batch = next(iterator)          # tokens, targets, weights, segment_ids and positions, [B, T]
    state = iterator.get_state()    # goes into JSON; set_state() goes on at the next batch

`batch_size` is always the *global* batch. With several hosts each gets its rows of it
(`shard_index`, `shard_count`): together the hosts see what one host alone would see, step by step.
A state saved on N hosts is therefore right on M hosts. A state that belongs to another corpus, seed
or batch shape is refused, for it would silently read other text.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from data.documents import Document
from data.packing import (
    ContiguousLayout,
    PackedLayout,
    Piece,
    TokenizedCorpus,
    WholeLayout,
    epoch_rng,
    strided_pieces,
)
from data.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]
PACKINGS = ("packed", "whole", "contiguous")


# ---------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------


def _rank(document: Document, seed: int) -> bytes:
    key = f"{seed}\0{document.id}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(key, digest_size=16).digest()


def _part_sizes(count: int, fractions: Sequence[float]) -> list[int]:
    """Sizes by cumulative rounding; every wanted part gets one while there are enough."""
    edges = [round(count * sum(fractions[: i + 1])) for i in range(len(fractions))]
    sizes = [high - low for low, high in zip([0, *edges], edges, strict=False)]
    for part, fraction in enumerate(fractions):
        if fraction > 0 and sizes[part] == 0 and max(sizes) > 1:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[part] = 1
    return sizes


def split_documents(
    documents: Sequence[Document],
    seed: int = 0,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
    balanced: bool = False,
) -> dict[str, list[Document]]:
    """Split into train, validation and test by whole documents.

    A document's place depends on the hashes of (seed, id), never on the order of the list; each
    part keeps the list's order. Every part with a fraction above 0 gets a document while there are
    enough.

    Args:
        documents: with distinct ids.
        seed: of the split; keep it when the training seed changes.
        fractions: of train, validation and test; they sum to 1.
        balanced: split each label alone, so that all parts have the same mix of labels.

    Raises:
        ValueError: fractions are not three numbers >= 0 that sum to 1, or ids repeat.
    """
    fractions = tuple(float(fraction) for fraction in fractions)
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1):
        raise ValueError(
            f"fractions={fractions}: train, validation and test need three numbers >= 0 with sum 1"
        )
    if len({document.id for document in documents}) != len(documents):
        raise ValueError("documents holds an id more than once: a split needs distinct ids")
    groups: dict[str | None, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.label if balanced else None, []).append(document)
    place = {}
    for group in groups.values():
        ranked = sorted(group, key=lambda document: _rank(document, seed))
        sizes = _part_sizes(len(group), fractions)
        parts = np.repeat(("train", "validation", "test"), sizes).tolist()
        place |= {document.id: part for document, part in zip(ranked, parts, strict=True)}
    return {
        part: [document for document in documents if place[document.id] == part]
        for part in ("train", "validation", "test")
    }


# ---------------------------------------------------------------------------------------------
# The resumable data set
# ---------------------------------------------------------------------------------------------


class _Steps:
    """Random access source for Grain: item i is the batch of step i."""

    def __init__(self, make: Callable[[int], Batch], steps: int | None):
        self._make = make
        self._steps = sys.maxsize if steps is None else steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        return self._make(int(step))


class BatchDataset(grain.IterDataset):
    """Batches by step, with a fingerprint in the iterator's state.

    Attributes:
        steps: number of batches; None without end.
        fingerprint: name -> value of all that the batches depend on, the number of hosts excepted.
    """

    def __init__(
        self, make: Callable[[int], Batch], steps: int | None, fingerprint: Mapping[str, Any]
    ):
        # Batches are cut out of arrays in memory, far below a step's time: no reading threads.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._by_step = grain.MapDataset.source(_Steps(make, steps)).to_iter_dataset(options)
        super().__init__(self._by_step)
        self.steps = steps
        self.fingerprint = dict(fingerprint)
        self._make = make

    def batch(self, step: int) -> Batch:
        """The batch of one step, without an iterator."""
        if step < 0 or (self.steps is not None and step >= self.steps):
            raise IndexError(f"step={step} is outside the data set's {self.steps} steps")
        return self._make(step)

    def __iter__(self) -> grain.DatasetIterator:
        return _BatchIterator(iter(self._by_step), self.fingerprint)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, inner: grain.DatasetIterator, fingerprint: dict[str, Any]):
        super().__init__(inner)
        self._inner = inner
        self._fingerprint = fingerprint

    def __next__(self) -> Batch:
        return next(self._inner)

    def get_state(self) -> dict[str, Any]:
        return {"data": dict(self._fingerprint), "position": self._inner.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken.

        Raises:
            ValueError: the state was taken from another data set; names what differs.
        """
        if not isinstance(state, Mapping) or not {"data", "position"} <= set(state):
            raise ValueError(f"not a state of this iterator (needs data and position): {state!r}")
        saved, mine = state["data"], json.loads(json.dumps(self._fingerprint))
        for key in mine.keys() | saved.keys():
            if saved.get(key) != mine.get(key):
                raise ValueError(
                    f"the saved data state is of another data set: {key} was {saved.get(key)!r} "
                    f"and is {mine.get(key)!r}; resume with the data settings of the checkpoint"
                )
        self._inner.set_state(state["position"])


def _check_sizes(
    seq_len: int, batch_size: int, shard_index: int, shard_count: int, num_epochs: int | None
) -> None:
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not 0 <= shard_index < shard_count:
        raise ValueError(
            f"shard_index={shard_index} must lie in 0..shard_count-1 with shard_count={shard_count}"
        )
    if batch_size % shard_count:
        raise ValueError(
            f"batch_size={batch_size} (of all hosts together) must be a multiple of "
            f"shard_count={shard_count}, e.g. {-(-batch_size // shard_count) * shard_count}"
        )
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs={num_epochs} must be at least 1, or None for no end")


def _my_rows(step: int, batch_size: int, shard_index: int, shard_count: int) -> range:
    """Global row numbers (over all steps) that this host has in this step."""
    local = batch_size // shard_count
    first = step * batch_size + shard_index * local
    return range(first, first + local)


# ---------------------------------------------------------------------------------------------
# Language modelling
# ---------------------------------------------------------------------------------------------


def lm_dataset(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    packing: str = "packed",
    shuffle: bool = True,
    shard_index: int = 0,
    shard_count: int = 1,
    num_epochs: int | None = None,
) -> BatchDataset:
    """Next-token batches of a corpus.

    Every batch is a dict of [B / shard_count, T] arrays: tokens, targets (the next token of the
    same document) int32; weights float32, 0 at a document's last token and on padding; segment_ids
    int32, from 1, 0 on padding; positions int32. An end-of-document token follows each document.

    Args:
        packing: see `data.packing`. "packed": nothing lost, rows independent, positions restart
            with each segment. "whole": documents stay whole where they fit. "contiguous": row b of
            the next step goes on where row b stopped; positions and segment ids go on too, so a
            carried state is to be reset exactly where positions are 0.
        batch_size: B of all hosts together. An epoch's end is no batch's end: rows of the next
            epoch fill the batch, and only the last batch of all has padded rows.
        seed: of the order of documents and rows; another order each epoch.
        shuffle: False keeps the order of the documents.
        num_epochs: None repeats without end.

    Raises:
        ValueError: a size below 1, a batch that the hosts cannot share, an unknown packing.
    """
    _check_sizes(seq_len, batch_size, shard_index, shard_count, num_epochs)
    corpus = TokenizedCorpus(documents, tokenizer)
    if packing == "contiguous":
        layout = ContiguousLayout(corpus.lengths, seq_len, seed, shuffle, batch_size, num_epochs)
        steps = None if num_epochs is None else layout.steps()

        def pieces(row: int) -> list[Piece]:
            return layout.pieces(row % batch_size, row // batch_size)

    elif packing in ("packed", "whole"):
        kind = PackedLayout if packing == "packed" else WholeLayout
        layout = kind(corpus.lengths, seq_len, seed, shuffle)
        total = None if num_epochs is None else num_epochs * layout.rows_per_epoch
        steps = None if total is None else -(-total // batch_size)

        def pieces(row: int) -> list[Piece]:
            if total is not None and row >= total:
                return []
            return layout.pieces(*divmod(row, layout.rows_per_epoch))

    else:
        raise ValueError(f"packing={packing!r} must be one of {', '.join(PACKINGS)}")

    def make(step: int) -> Batch:
        rows = _my_rows(step, batch_size, shard_index, shard_count)
        return corpus.fill([pieces(row) for row in rows], seq_len)

    fingerprint = {
        "corpus": corpus.digest,
        "tokenizer": tokenizer.name,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "seed": seed,
        "packing": packing,
        "shuffle": shuffle,
        "num_epochs": num_epochs,
    }
    return BatchDataset(make, steps, fingerprint)


def evaluation_batches(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    packing: str = "packed",
    stride: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> BatchDataset:
    """One pass over a corpus in order; nothing is dropped, empty rows fill the last batch.

    Args:
        packing: as in `lm_dataset`, without shuffling.
        stride: instead of packing, slide a window over each document and score every target once,
            with at least seq_len - stride tokens of context (from a document's second window on).

    Raises:
        ValueError: as `lm_dataset`; stride outside 1..seq_len.
    """
    if stride is None:
        return lm_dataset(
            documents,
            tokenizer,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=0,
            packing=packing,
            shuffle=False,
            shard_index=shard_index,
            shard_count=shard_count,
            num_epochs=1,
        )
    _check_sizes(seq_len, batch_size, shard_index, shard_count, 1)
    if not 1 <= stride <= seq_len:
        raise ValueError(f"stride={stride} must lie in 1..seq_len with seq_len={seq_len}")
    corpus = TokenizedCorpus(documents, tokenizer)
    windows = strided_pieces(corpus.lengths, seq_len, stride)

    def make(step: int) -> Batch:
        rows = _my_rows(step, batch_size, shard_index, shard_count)
        return corpus.fill([windows[row] if row < len(windows) else [] for row in rows], seq_len)

    fingerprint = {
        "corpus": corpus.digest,
        "tokenizer": tokenizer.name,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "stride": stride,
    }
    return BatchDataset(make, -(-len(windows) // batch_size), fingerprint)


# ---------------------------------------------------------------------------------------------
# Classification of long documents
# ---------------------------------------------------------------------------------------------


def classification_dataset(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    labels: Sequence[str] | None = None,
    shuffle: bool = True,
    shard_index: int = 0,
    shard_count: int = 1,
    num_epochs: int | None = None,
) -> BatchDataset:
    """Batches of one document a row, cut or padded to T, with its class.

    Every batch holds tokens, segment_ids (1, padding 0), positions int32 [B, T]; labels int32 [B];
    weights float32 [B], 0 for the empty rows that fill the last batch.

    Args:
        labels: class names in the order of their numbers; None takes the sorted names found. Give
            it where train and test sets must agree.
        batch_size, seed, shuffle, shard_index, shard_count, num_epochs: as in `lm_dataset`.

    Raises:
        ValueError: a document without a label or with one that is not in `labels`.
    """
    _check_sizes(seq_len, batch_size, shard_index, shard_count, num_epochs)
    unlabelled = [document.id for document in documents if document.label is None]
    if unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {len(documents)} documents have no label, e.g. {unlabelled[0]!r}"
        )
    names = tuple(labels) if labels is not None else tuple(sorted({d.label for d in documents}))
    unknown = {document.label for document in documents} - set(names)
    if unknown:
        raise ValueError(f"labels={names} lacks {sorted(unknown)}, which documents have")
    classes = np.asarray([names.index(document.label) for document in documents], np.int32)
    corpus = TokenizedCorpus(documents, tokenizer)
    count = len(documents)
    total = None if num_epochs is None else num_epochs * count
    orders: dict[int, np.ndarray] = {}

    def order(epoch: int) -> np.ndarray:
        if epoch not in orders:
            if len(orders) > 1:
                orders.clear()
            rng = epoch_rng(seed, 2, epoch)
            orders[epoch] = rng.permutation(count) if shuffle else np.arange(count)
        return orders[epoch]

    def make(step: int) -> Batch:
        rows = _my_rows(step, batch_size, shard_index, shard_count)
        chosen = [
            -1 if total is not None and row >= total else int(order(row // count)[row % count])
            for row in rows
        ]
        whole = [
            [] if i < 0 else [Piece(i, 0, min(seq_len, int(corpus.lengths[i])), 0, 1)]
            for i in chosen
        ]
        batch = corpus.fill(whole, seq_len)
        present = np.asarray([i >= 0 for i in chosen])
        return {
            **{key: batch[key] for key in ("tokens", "segment_ids", "positions")},
            "labels": np.where(present, classes[chosen], 0).astype(np.int32),
            "weights": present.astype(np.float32),
        }

    fingerprint = {
        "corpus": corpus.digest,
        "tokenizer": tokenizer.name,
        "labels": list(names),
        "seq_len": seq_len,
        "batch_size": batch_size,
        "seed": seed,
        "shuffle": shuffle,
        "num_epochs": num_epochs,
    }
    return BatchDataset(make, None if total is None else -(-total // batch_size), fingerprint)
