"""The Text task of the Long Range Arena: film reviews as bytes, negative or positive.

Tay et al. 2021 (arXiv 2011.04006), on IMDB (Maas et al. 2011) with its official split of 25,000 and
25,000 reviews.
"""

import functools

import numpy as np

from tilescan.data import sources
from tilescan.data.batches import Batch
from tilescan.data.splits import split_documents
from tilescan.data.tasks.base import FixedTask, padded_rows
from tilescan.data.tokenizers import ByteTokenizer

LABELS = ("neg", "pos")


@functools.lru_cache(maxsize=2)
def _splits(source: str, validate_on_test: bool) -> dict[str, Batch]:
    """Reads the reviews of the three splits as bytes."""
    fractions = (1.0, 0.0, 0.0) if validate_on_test else (0.9, 0.1, 0.0)
    parts = split_documents(sources.load(source), 0, fractions, balanced=True)
    if validate_on_test:
        parts["validation"] = parts["test"]
    splits = {}
    for split, documents in parts.items():
        other = next((d for d in documents if d.label not in LABELS), None)
        if other is not None:
            raise ValueError(
                f"source={source!r}: {other.id} has the label {other.label!r}; reviews have "
                f"{' or '.join(LABELS)}"
            )
        tokens = np.empty(len(documents), object)
        for i, document in enumerate(documents):
            tokens[i] = np.frombuffer(document.text.encode(), np.uint8)
        labels = np.asarray([LABELS.index(document.label) for document in documents], np.uint8)
        splits[split] = {"tokens": tokens, "labels": labels}
    return splits


def lra_text(
    max_length: int = 4096, source: str = "imdb", validate_on_test: bool = False
) -> FixedTask:
    """Classifies film reviews (IMDB) as bytes, negative or positive.

    Ids are those of the "byte" tokenizer; rows are padded with its padding.

    Args:
      max_length: T, where reviews are truncated; published: 1,000 to 4,000.
      source: "imdb" (your own file), or "imdb_huggingface".
      validate_on_test: as the Long Range Arena does; else validation is a tenth of the training
        reviews, of each label as many.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1")

    def present(arrays: Batch) -> Batch:
        rows = padded_rows(arrays["tokens"], max_length, ByteTokenizer.pad_id)
        return {**rows, "labels": arrays["labels"].astype(np.int32)}

    load = functools.partial(_splits, source, validate_on_test)
    return FixedTask("lra_text", load, present, max_length, ByteTokenizer.vocab_size, len(LABELS))


TASKS = {"lra_text": lra_text}
