"""A user's own text: .txt files, JSON lines and Parquet, one of them or a folder.

    documents = list(read("mytext.txt"))       # or "~/texts", "logs.jsonl.gz", "logs.jsonl:message"

- `.txt` (also .gz, .xz, .bz2): UTF-8. In a folder each file is a document. A file that is named
  itself would leave nothing to hold out, so it is split, at ends of lines, into up to 20 documents
  of 1,000 characters or more.
- `.jsonl` (also .gz, .xz, .bz2): each line is an object, and a document.
- `.parquet` (needs pyarrow): each row is a document.

Objects and rows have their text in the field "text", or in the one named after a colon. A
"label" (a word or an integer) is the document's class, a "split" ("train", "validation" or "test")
the part of an official split it belongs to; other fields are not used. Those without text are left
out. Splits depend on a document's id: its file's name within what was named, and its number there.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tilescan.data.clients import SourceError
from tilescan.data.documents import Document
from tilescan.data.splits import PARTS

KINDS = (".txt", ".jsonl", ".parquet")
READ = "a .txt, .jsonl (both also .gz, .xz, .bz2) or .parquet file, or a folder of them"
FIELD = "text"
# Of a text that is one file: as many as the default fractions need, long enough to be texts.
PIECES, SHORTEST = 20, 1000

_OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
# Files that explain a folder of texts, and are none.
_ABOUT = ("readme", "license", "licence", "copying", "notice")


def is_path(name: str) -> bool:
    """Returns whether a source's name can only mean a file or a folder: with a dot, or existing.

    Names of the registry have no dot and no slash, and go before a file of the same name.
    """
    return (
        any(mark in name for mark in ("/", os.sep, ".")) or name[:1] == "~" or _there(_path(name))
    )


def files_of(name: str) -> tuple[list[pathlib.Path], str | None]:
    """Returns the files that "PATH" or "PATH:FIELD" names, in order of their names; the field.

    Raises:
        SourceError: there is no such file, or one that is not read; names the first ones.
    """
    root, field = _root(name)
    return (_files_in(root, name) if root.is_dir() else [root]), field


def read(name: str) -> Iterator[Document]:
    """Yields the documents of "PATH" or "PATH:FIELD".

    Raises:
        SourceError: there is no such file or no text in it, it is not UTF-8, a line is not a
            JSON object with this field, the file ends early; names the file and the line.
    """
    paths, field = files_of(name)
    root = _root(name)[0]
    for path in paths:
        alone = path == root
        id = path.name if alone else path.relative_to(root).as_posix()
        document = None
        for document in _read_file(path, id, field, alone):
            yield document
        if document is None:
            raise SourceError(f"{path} holds no text: it is empty, or white space alone")


def record_document(id: str, where: str, record: Mapping[str, Any], field: str) -> Document | None:
    """Returns the document of a JSON object or a row; None if it has no text.

    Raises:
        SourceError: the field is missing or holds no text; its split is unknown.
    """
    text = record.get(field)
    if not isinstance(text, str):
        has = f"it is {text!r:.60}" if field in record else f"there are {_listed(record)}"
        hint = "" if field in record else "; name another one after a colon: PATH:FIELD"
        raise SourceError(f"{where}: the field {field!r} must be a text, but {has}{hint}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{where}: {field!r} holds half a surrogate pair, \\u{ord(text[error.start]):04x}, "
            "which is not a character"
        ) from None
    label, split = record.get("label"), record.get("split")
    if not isinstance(label, str | int | None):
        label = None
    if split is not None and split not in PARTS:
        raise SourceError(f"{where}: split is {split!r:.60}; known: {', '.join(PARTS)}")
    if not text.strip():
        return None
    return Document(id, text, None if label is None else str(label), split)


def _path(name: str) -> pathlib.Path:
    try:
        return pathlib.Path(name).expanduser()
    except RuntimeError as error:  # ~NAME of no user
        raise SourceError(f"{name}: {error}") from error


def _there(path: pathlib.Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the disk, a NUL in it
        return False


def _root(name: str) -> tuple[pathlib.Path, str | None]:
    """Returns ("PATH", FIELD or None) of what exists."""
    path, field = _path(name), None
    head, colon, tail = name.rpartition(":")
    if colon and not _there(path):
        path, field = _path(head), tail
    if not _there(path):
        raise SourceError(f"{name}: there is no file or folder {path}")
    if not path.is_dir():
        if _kind(path) is None:
            raise SourceError(f"{path} is not a text that can be read; known: {READ}")
        if field is not None and _kind(path)[0] == ".txt":
            raise SourceError(f"{name}: a .txt file has no field {field!r}; give its path alone")
    return path, field


def _kind(path: pathlib.Path) -> tuple[str, str] | None:
    """Returns (".txt", ".gz") of a.txt.gz; None for a file that is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in _OPENERS else ""
    kind = suffixes[-1] if suffixes else ""
    known = kind in KINDS and not (packing and kind == ".parquet") and path.is_file()
    return (kind, packing) if known else None


def _files_in(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Returns all texts under a folder, hidden files and folders left out."""
    # What can be read, and what cannot.
    found, unknown, seen = [], [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(parent)
        if here in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(f for f in files if not f.startswith(".")):
            path = pathlib.Path(parent, file)
            if _kind(path) is not None:
                found.append(path)
            elif not file.lower().startswith(_ABOUT):
                unknown.append(path.relative_to(folder).as_posix())
    if unknown:
        raise SourceError(
            f"{name}: the folder holds {_listed(unknown)}, which cannot be read as text; move them "
            f"elsewhere. Known: {READ}"
        )
    if not found:
        raise SourceError(f"{name}: the folder holds no text: give {READ}")

    # A text and its compressed copy are one text.
    bare: dict[str, pathlib.Path] = {}
    for path in found:
        kind, packing = _kind(path)
        other = bare.setdefault(str(path)[: len(str(path)) - len(packing)], path)
        if other != path:
            raise SourceError(
                f"{name}: the folder holds both {other.name} and {path.name}: a text that stands "
                "there twice could be trained and tested on; keep one of them"
            )
    return sorted(found)


def _listed(names: Iterable[object], limit: int = 5) -> str:
    """Lists the first names, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"


def _read_file(path: pathlib.Path, id: str, field: str | None, alone: bool) -> Iterator[Document]:
    kind, packing = _kind(path)
    if kind == ".txt":
        text = "".join(_text_lines(path, packing))
        if not alone:
            yield from [Document(id, text)] if text.strip() else []
            return
        for number, piece in enumerate(_pieces(text), 1):
            yield Document(f"{id}:{number}", piece)
        return
    records = _parquet_rows if kind == ".parquet" else _json_lines
    for number, where, record in records(path, packing, field or FIELD):
        document = record_document(f"{id}:{number}", where, record, field or FIELD)
        if document is not None:
            yield document


def _lines(path: pathlib.Path, packing: str) -> Iterator[tuple[str, str]]:
    """Yields (its place, a line with its end) of a UTF-8 file, a byte order mark left out."""
    number = 0
    try:
        with _OPENERS[packing](path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                yield where, _decoded(line, where).removeprefix("\ufeff" if number == 1 else "")
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise SourceError(f"{path}, line {number + 1}: cannot be read on: {error}") from error


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        wide = line.startswith((b"\xff\xfe", b"\xfe\xff"))
        guess = "UTF-16" if wide else "LATIN1"
        raise SourceError(
            f"{where}: the byte 0x{line[error.start]:02x} at {error.start} is not UTF-8"
            f"{'; the file begins as UTF-16 does' if wide else ''}. Convert the file first, e.g. "
            f"iconv -f {guess} -t UTF-8"
        ) from None


def _text_lines(path: pathlib.Path, packing: str) -> Iterator[str]:
    for where, line in _lines(path, packing):
        if "\0" in line:
            raise SourceError(
                f"{where}: a NUL, which text has none of: the file is UTF-16 (convert it first, "
                "e.g. iconv -f UTF-16LE -t UTF-8) or not a text"
            )
        yield line


def _pieces(text: str) -> list[str]:
    """Splits a text into pieces of about one length, after a line's end or else a space."""
    count = min(PIECES, len(text) // SHORTEST) or 1
    edges = [i * len(text) // count for i in range(count + 1)]
    for i in range(1, count):
        for mark in ("\n", " "):
            at = text.find(mark, edges[i], edges[i + 1] - 1)
            if at >= 0:
                edges[i] = at + 1
                break
    pieces = (text[low:high] for low, high in zip(edges, edges[1:], strict=False))
    return [piece for piece in pieces if piece.strip()]


def _json_lines(
    path: pathlib.Path, packing: str, field: str
) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Yields (number, place, object) of the lines that are not blank."""
    del field  # all of an object is read anyway
    for number, (where, line) in enumerate(_lines(path, packing), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{where}: not a JSON object: {error}") from error
        if not isinstance(record, Mapping):
            raise SourceError(f"{where}: expected a JSON object with {FIELD!r}, got {line!r:.60}")
        yield number, where, record


def _parquet_rows(
    path: pathlib.Path, packing: str, field: str
) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Yields (number, place, {column: value}) of the rows, read a thousand at a time."""
    del packing  # it is within the file
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SourceError(f"{path}: run `pip install pyarrow` to read .parquet files") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise SourceError(
                    f"{path} has no column {field!r}, but {_listed(names)}; name one of them "
                    "after a colon: PATH:COLUMN"
                )
            wanted = [name for name in dict.fromkeys((field, "label", "split")) if name in names]
            for batch in file.iter_batches(batch_size=1000, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield number, f"{path}, row {number}", row
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise SourceError(f"{path}, row {number + 1}: cannot be read on: {error}") from error
