"""Parses the Debian Administrator's Handbook, one document a page, in its translations."""

import html.parser
import pathlib
import re

from tilescan.data.archives import members
from tilescan.data.documents import Document

_PAGES = "*/doc/debian-handbook/html/{}/*.html"


class _Paragraphs(html.parser.HTMLParser):
    """Collects the text of `<div class="para">`, inner tags left out."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self._depth = 0  # of divs, from the paragraph's on
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div" and self._depth:
            self._depth += 1
        elif tag == "div" and ("class", "para") in attrs:
            self._depth, self._text = 1, []

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._depth:
            self._depth -= 1
            if not self._depth and (text := re.sub(r"\s+", " ", "".join(self._text)).strip()):
                self.found.append(text)

    def handle_data(self, data: str) -> None:
        if self._depth:
            self._text.append(data)


def english(path: pathlib.Path) -> list[Document]:
    """Parses the English pages: paragraphs, a line each, without code and headings between them."""
    return _documents(_pages(path, "en-US"))


def german(path: pathlib.Path) -> list[Document]:
    """Parses the German pages as `english` does, without paragraphs that are still in English."""
    untranslated = {text for texts in _pages(path, "en-US").values() for text in texts}
    pages = _pages(path, "de-DE")
    return _documents(
        {
            name: [text for text in texts if text not in untranslated]
            for name, texts in pages.items()
        }
    )


def _pages(path: pathlib.Path, language: str) -> dict[str, list[str]]:
    """Returns {page: its paragraphs}."""
    found = {}
    for name, content in members(path, _PAGES.format(language)):
        parser = _Paragraphs()
        parser.feed(content.decode("utf-8"))
        found[pathlib.PurePosixPath(name).stem] = parser.found
    return found


def _documents(pages: dict[str, list[str]]) -> list[Document]:
    return [Document(name, "\n".join(texts) + "\n") for name, texts in pages.items() if texts]
