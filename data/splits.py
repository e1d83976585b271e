"""Train, validation and test parts of a corpus."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from data.documents import Document


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
