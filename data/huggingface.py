"""Hugging Face's data sets as sources, through the library `datasets` where it is installed.

    documents = list(read("hf:stanfordnlp/imdb"))
    documents = list(read("hf:Salesforce/wikitext/wikitext-2-raw-v1:text"))

"hf:NAME" is a data set, "hf:OWNER/NAME/SUBSET" one of several configurations of it, and the column
of the texts stands after a colon ("text" if none does). Its splits are kept: those whose names
begin with train, valid or dev, and test; documents of other splits are split as a file's are.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

from tilescan.data.clients import SourceError
from tilescan.data.documents import Document
from tilescan.data.files import FIELD, record_document

PREFIX = "hf:"
_FORM = re.compile(r"hf:([\w.-]+(?:/[\w.-]+)?)(?:/([^:/]+))?(?::(.+))?")
_PARTS = {"train": "train", "valid": "validation", "dev": "validation", "test": "test"}


def parsed(name: str) -> tuple[str, str | None, str]:
    """Returns (repository, subset or None, column) of "hf:NAME[/SUBSET][:COLUMN]".

    Raises:
        ValueError: it does not have this form.
    """
    match = _FORM.fullmatch(name)
    if match is None:
        raise ValueError(
            f"source {name!r} is not of the form hf:OWNER/NAME, hf:OWNER/NAME/SUBSET or either "
            "with :COLUMN after it"
        )
    return match[1], match[2], match[3] or FIELD


def read(name: str, offline: bool = False) -> Iterator[Document]:
    """Yields the documents of a data set, downloading it at first use.

    Raises:
        ValueError: see `parsed`.
        SourceError: `datasets` is not installed, the data set cannot be had, or its column is
            missing or holds no texts.
    """
    repository, subset, column = parsed(name)
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise SourceError(
            f"{name} needs the library of Hugging Face's data sets: run `pip install datasets`"
        ) from error
    if offline and not library.config.HF_HUB_OFFLINE:
        raise SourceError(
            f"{name}: downloads are off (--offline or TILESCAN_OFFLINE=1); set HF_HUB_OFFLINE=1 "
            "too, then what the library has in its own cache is read"
        )
    try:
        splits = library.load_dataset(repository, subset)
    except Exception as error:  # of its own kinds, the network's and its file formats'
        raise SourceError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error
    document = None
    for split, rows in splits.items():
        for document in _documents(name, split, rows, column):
            yield document
    if document is None:
        raise SourceError(f"{name} holds no text in column {column!r}")


def _documents(name: str, split: str, rows: Any, column: str) -> Iterator[Document]:
    if column not in rows.column_names:
        raise SourceError(
            f"{name} has no column {column!r} in split {split!r}, but "
            f"{', '.join(rows.column_names)}; name one of them after a colon: hf:NAME:COLUMN"
        )
    part = next((part for begin, part in _PARTS.items() if split.startswith(begin)), None)
    classes = getattr(rows.features.get("label"), "names", None)
    rows = rows.select_columns([c for c in (column, "label") if c in rows.column_names])
    for number, row in enumerate(rows, 1):
        where = f"{name}, {split} row {number}"
        label = row.get("label")
        if classes is not None and isinstance(label, int):
            label = classes[label] if label >= 0 else None
        record = {column: row[column], "label": label, "split": part}
        document = record_document(f"{split}:{number}", where, record, column)
        if document is not None:
            yield document
