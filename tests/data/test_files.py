"""A user's own files: what becomes a document, and what is wrong is named with file and line."""

import bz2
import gzip
import json
import lzma
import os

import pytest

from tilescan.data import sources
from tilescan.data.clients import SourceError
from tilescan.data.documents import Document
from tilescan.data.splits import split_documents

LINES = "".join(f"This is line {i} of a text that somebody wrote.\n" for i in range(1000))


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".bz2"])
def test_text_and_json_lines_packed_or_not(here, packing):
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[packing]
    (here / f"a.txt{packing}").write_bytes(pack("\ufeffÄ short\r\ntext".encode()))
    assert sources.load(f"a.txt{packing}") == [Document(f"a.txt{packing}:1", "Ä short\r\ntext")]
    records = [
        {"text": "one"},
        {"text": "zwei\u2028", "label": 3, "split": "test"},
        {"text": " "},
    ]
    (here / f"b.JSONL{packing}").write_bytes(pack(f"{jsonl(*records)}\n".encode()))
    assert sources.load(f"b.JSONL{packing}") == [
        Document(f"b.JSONL{packing}:1", "one"),
        Document(f"b.JSONL{packing}:2", "zwei\u2028", "3", "test"),
    ]


@pytest.mark.parametrize(
    ("text", "count"),
    [(LINES, 20), (LINES.replace("\n", " "), 20), ("x" * 50_000, 20), (LINES[:3000], 3), ("ab", 1)],
)
def test_a_text_of_its_own_is_cut_for_held_out_parts(here, text, count):
    (here / "a.txt").write_text(text)
    documents = sources.load("a.txt")
    assert len(documents) == count and "".join(d.text for d in documents) == text
    if text is LINES:
        assert all(d.text.endswith(".\n") for d in documents)
        assert max(len(d.text) for d in documents) < 1.2 * len(text) / count
        sizes = {part: len(found) for part, found in split_documents(documents).items()}
        assert sizes == {"train": 18, "validation": 1, "test": 1}


def test_a_path_is_one_however_it_is_spelled(here, monkeypatch):
    (here / "data").mkdir()
    (here / "data" / "2024").write_text("no suffix\n")
    (here / "data" / "a.txt").write_text("some text\n")
    monkeypatch.setenv("HOME", str(here))
    expected = [Document("a.txt:1", "some text\n")]
    spelled = ["data/a.txt", "./data/a.txt", "~/data/a.txt", f"{here}/data/a.txt"]
    assert all(sources.load(name) == expected for name in spelled)
    with pytest.raises(SourceError, match=r"data/2024 is not a text that can be read; known: a "):
        sources.load("data/2024")


def test_a_folder_holds_texts_and_names_what_it_cannot_read(here):
    (here / "texts" / "sub").mkdir(parents=True)
    (here / "texts" / "b.txt").write_text(LINES)
    (here / "texts" / "sub" / "a.jsonl").write_text(jsonl({"text": "one"}, {"text": "two"}))
    (here / "texts" / "README.md").write_text("about them")
    (here / "texts" / ".hidden").write_text("")
    os.symlink(here / "texts", here / "texts" / "sub" / "again")
    documents = sources.load("texts")
    assert [d.id for d in documents] == ["b.txt", "sub/a.jsonl:1", "sub/a.jsonl:2"]
    assert documents[0].text == LINES

    (here / "texts" / "b.txt.gz").write_bytes(gzip.compress(LINES.encode()))
    with pytest.raises(SourceError, match="texts: the folder holds both b.txt and b.txt.gz"):
        sources.load("texts")
    (here / "texts" / "b.txt.gz").unlink()
    (here / "texts" / "sub" / "c.csv").write_text("a,b")
    with pytest.raises(SourceError, match=r"texts: the folder holds sub/c\.csv, which cannot be"):
        sources.load("texts")
    (here / "texts" / "sub" / "c.csv").rename(here / "texts" / "empty.txt")
    (here / "texts" / "empty.txt").write_text("")
    with pytest.raises(SourceError, match=r"texts/empty\.txt holds no text"):
        sources.load("texts")
    (here / "none").mkdir()
    with pytest.raises(SourceError, match="none/: the folder holds no text"):
        sources.load("none/")


PLAIN, JSON = LINES.encode(), b'{"text": "one"}\n' * 99
BAD = {
    "latin.txt": ("fine\nna\xefve\n".encode("latin-1"), r"latin\.txt, line 2: the byte 0xef at 2"),
    "utf16.txt": ("text".encode("utf-16"), r"utf16\.txt, line 1: .*as UTF-16 does"),
    "wide.txt": ("text\n".encode("utf-16-le"), r"wide\.txt, line 1: a NUL"),
    "empty.txt": (b"", r"empty\.txt holds no text"),
    "blank.txt": (b" \n\n", r"blank\.txt holds no text"),
    "empty.jsonl": (b"\n", r"empty\.jsonl holds no text"),
    "empty.txt.gz": (gzip.compress(b""), r"empty\.txt\.gz holds no text"),
    "zero.txt.gz": (b"", r"zero\.txt\.gz holds no text"),
    "cut.txt.gz": (gzip.compress(PLAIN)[:-20], r"cut\.txt\.gz, line \d+: cannot be read"),
    "cut.jsonl.xz": (lzma.compress(JSON)[:-20], r"cut\.jsonl\.xz, line \d+: cannot"),
    "cut.txt.bz2": (bz2.compress(PLAIN)[:-20], r"cut\.txt\.bz2, line \d+: cannot be read"),
    "no.txt.gz": (b"plain text\n", r"no\.txt\.gz, line 1: cannot be read on: Not a gzipped file"),
    "no.txt.xz": (b"plain text\n", r"no\.txt\.xz, line 1: cannot be read on"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken\.jsonl, line 2: not a JSON object"),
    "deep.jsonl": (b'{"text": ' + b"[" * 10**6, r"deep\.jsonl, line 1: not a JSON object"),
    "long.jsonl": (b'{"text": ' + b"1" * 10**4 + b"}", r"long\.jsonl, line 1: not a JSON object"),
    "list.jsonl": (b'{"text": "a"}\n\n["text"]\n', r"list\.jsonl, line 3: expected a JSON object"),
    "field.jsonl": (b'{"body": "a"}', r"field\.jsonl, line 1: the field 'text' .*are body.*:FI"),
    "null.jsonl": (b'{"text": null}', r"null\.jsonl, line 1: the field 'text' must .*it is None"),
    "half.jsonl": (b'{"text": "\\ud800"}', r"half\.jsonl, line 1: .*half a surrogate pair, .ud800"),
    "split.jsonl": (b'{"text": "a", "split": "dev"}', r"split\.jsonl, line 1: split is 'dev'"),
    "bytes.jsonl": (b'{"text": "\xe9"}', r"bytes\.jsonl, line 1: the byte 0xe9"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_with_file_and_line(here, name):
    content, message = BAD[name]
    (here / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        sources.load(name)


def test_a_field_stands_after_a_colon(here):
    (here / "a.jsonl").write_text(jsonl({"body": "one", "label": {"x": 1}}))
    assert sources.load("a.jsonl:body") == [Document("a.jsonl:1", "one")]
    (here / "b:c.txt").write_text("a colon in its name")
    assert sources.load("b:c.txt")[0].text == "a colon in its name"
    with pytest.raises(SourceError, match=r"b:c\.txt:body: a \.txt file has no field 'body'"):
        sources.load("b:c.txt:body")


def test_names_that_are_no_path(here):
    for name in ("gone.txt", "folder/", "./gone", "~/gone.jsonl:body", "s3://bucket/a.txt"):
        with pytest.raises(SourceError, match="there is no file or folder"):
            sources.load(name)
    with pytest.raises(ValueError, match=r"known sources: shakespeare.*\.txt, \.jsonl .*hf:NAME"):
        sources.load("mytext")
    (here / "mytext").mkdir()  # what exists can be named without a slash
    (here / "mytext" / "a.txt").write_text("some text")
    assert len(sources.load("mytext")) == 1
    (here / "imdb").mkdir()  # names of the registry go first
    assert not sources.files.is_path("imdb") or sources.get_source("imdb")
    with pytest.raises(ValueError, match="mytext is not fetched to the cache"):
        sources.fetch("mytext")


def test_sources_are_mixed_with_distinct_ids(here):
    for folder in ("a", "b"):
        (here / folder).mkdir()
        (here / folder / "x.jsonl").write_text(jsonl({"text": folder}, {"text": f"{folder}2"}))
    documents = sources.load_all(["a/x.jsonl", "python_stdlib", "b/x.jsonl"])
    ids = [d.id for d in documents]
    assert len(set(ids)) == len(ids) > 100 and ids[:2] == ["x.jsonl:1", "x.jsonl:2"]
    assert ids[-2:] == ["b/x.jsonl/x.jsonl:1", "b/x.jsonl/x.jsonl:2"]
    for twice in (["a", "./a/x.jsonl"], ["python_stdlib"] * 2, ["a/x.jsonl", "a/x.jsonl:text"]):
        with pytest.raises(ValueError, match="named twice, by"):
            sources.load_all(twice)


def test_parquet(here):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name, **columns):
        parquet.write_table(pa.table(columns), here / name)

    write("a.parquet", text=["one", "", "drei"], label=[1, 2, 3], other=[None] * 3)
    assert sources.load("a.parquet") == [
        Document("a.parquet:1", "one", "1"),
        Document("a.parquet:3", "drei", "3"),
    ]
    write("b.parquet", body=["one", None])
    write("c.parquet", text=[1, 2])
    (here / "cut.parquet").write_bytes((here / "a.parquet").read_bytes()[:-9])
    (here / "empty.parquet").write_bytes(b"")
    for name, message in {
        "b.parquet": r"b\.parquet has no column 'text', but body; name one",
        "b.parquet:body": r"b\.parquet, row 2: the field 'body' must be a text, but it is None",
        "c.parquet": r"c\.parquet, row 1: the field 'text' must be a text, but it is 1",
        "cut.parquet": r"cut\.parquet, row 1: cannot be read on",
        "empty.parquet": r"empty\.parquet, row 1: cannot be read on",
    }.items():
        with pytest.raises(SourceError, match=message):
            sources.load(name)


def test_parquet_without_its_library_says_what_to_install(here, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (here / "a.parquet").write_bytes(b"")
    with pytest.raises(SourceError, match=r"a\.parquet: run `pip install pyarrow`"):
        sources.load("a.parquet")
