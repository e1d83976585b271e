"""Train, validation and test parts of a corpus."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from tilescan.data.documents import Document

PARTS = ("train", "validation", "test")


def _rank(document: Document, seed: int) -> bytes:
    key = f"{seed}\0{document.id}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(key, digest_size=16).digest()


def _part_sizes(count: int, fractions: Sequence[float]) -> list[int]:
    """Computes sizes by cumulative rounding; every wanted part gets one while there are enough."""
    edges = [round(count * sum(fractions[: i + 1])) for i in range(len(fractions))]
    sizes = [high - low for low, high in zip([0, *edges], edges, strict=False)]
    for part, fraction in enumerate(fractions):
        if fraction > 0 and sizes[part] == 0 and max(sizes) > 1:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[part] = 1
    return sizes


def _shares(split: str | None, official: set[str], fractions: Sequence[float]) -> list[float]:
    """Returns the fractions by part of the documents of one official split (None: of none)."""
    if split is None:
        return list(fractions)
    shares = [float(part == split) for part in PARTS]
    if split == "train":
        missing = [
            fraction if part == "train" or part not in official else 0.0
            for part, fraction in zip(PARTS, fractions, strict=True)
        ]
        if sum(missing) > 0:
            shares = [fraction / sum(missing) for fraction in missing]
    return shares


def split_documents(
    documents: Sequence[Document],
    seed: int = 0,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
    balanced: bool = False,
) -> dict[str, list[Document]]:
    """Splits into train, validation and test by whole documents.

    A document's place depends on the hashes of (seed, id), never on the order of the list; each
    part keeps the list's order. Every part with a fraction above 0 gets a document while there are
    enough.

    Documents of an official split stay in their part. Only a part that the official split lacks is
    made out of its training documents: validation for a corpus that has train and test.

    Args:
        documents: with distinct ids.
        seed: of the split; keep it when the training seed changes.
        fractions: of train, validation and test; they sum to 1. Parts that an official split has
            leave their fraction to the others.
        balanced: split each label alone, so that all parts have the same mix of labels.

    Raises:
        ValueError: fractions are not three numbers >= 0 that sum to 1, ids repeat, or a document's
            split is none of train, validation and test.
    """
    # What was given.
    fractions = tuple(float(fraction) for fraction in fractions)
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1):
        raise ValueError(
            f"fractions={fractions}: train, validation and test need three numbers >= 0 with sum 1"
        )
    if len({document.id for document in documents}) != len(documents):
        raise ValueError("documents holds an id more than once: a split needs distinct ids")
    official = {document.split for document in documents} - {None}
    if official - set(PARTS):
        raise ValueError(f"documents have the splits {sorted(official)}; known: {', '.join(PARTS)}")

    # Each official split is divided alone, and each label too if that is asked for.
    groups: dict[tuple[str | None, str | None], list[Document]] = {}
    for document in documents:
        key = (document.split, document.label if balanced else None)
        groups.setdefault(key, []).append(document)
    place = {}
    for (split, _), group in groups.items():
        ranked = sorted(group, key=lambda document: _rank(document, seed))
        sizes = _part_sizes(len(group), _shares(split, official, fractions))
        parts = np.repeat(PARTS, sizes).tolist()
        place |= {document.id: part for document, part in zip(ranked, parts, strict=True)}
    return {
        part: [document for document in documents if place[document.id] == part] for part in PARTS
    }
