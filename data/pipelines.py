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
    "classification_dataset",
    "evaluation_batches",
    "lm_dataset",
    "split_documents",
]

PACKINGS = ("packed", "whole", "contiguous")


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

    Raises:
        ValueError: a size below 1, a batch that the hosts cannot share, an unknown packing.
    """
    check_sizes(seq_len, batch_size, seed, shard_index, shard_count, num_epochs)
    corpus = TokenizedCorpus(documents, tokenizer)

    # Which pieces of documents stand in a row, counted over all steps.
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
        rows = host_rows(step, batch_size, shard_index, shard_count)
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
