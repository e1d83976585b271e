"""What a corpus is made of."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Attributes:
        id: unique and stable within its corpus; splits depend on it, not on the order.
        text: the whole text.
        label: the class, for corpora that have one.
        split: the part of an official split that the document belongs to, where one is published.
    """

    id: str
    text: str
    label: str | None = None
    split: str | None = None
