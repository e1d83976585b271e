"""The committed pages as a browser sees them: links that lead somewhere, nothing that complains."""

import html.parser
import pathlib
import re
import shutil
import subprocess
import urllib.parse

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "results" / "index.html", *ROOT.glob("results/*/index.html")])
MARKDOWN = sorted([ROOT / "RESULTS.md", *ROOT.glob("results/*/README.md")])
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(html.parser.HTMLParser):
    """The targets and the anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[name] for name in ("href", "src") if name in values]
        self.anchors |= {values["id"]} if "id" in values else set()


def test_every_link_of_the_pages_leads_somewhere():
    pages = {path: Page(path) for path in PAGES}
    assert len(pages) > 5
    dead = []
    for path, page in pages.items():
        for link in page.links:
            if link.startswith("data:"):
                continue
            target, _, anchor = urllib.parse.unquote(link).partition("#")
            file = (path.parent / target).resolve() if target else path
            known = pages.get(file)
            if not file.is_file() or (anchor and known and anchor not in known.anchors):
                dead.append(f"{path.relative_to(ROOT)}: {link}")
    assert not dead, "\n".join(dead[:20])


def test_every_link_of_the_markdown_leads_somewhere():
    found = [
        (path, link)
        for path in MARKDOWN
        for link in re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8"))
    ]
    dead = [
        f"{path.relative_to(ROOT)}: {link}"
        for path, link in found
        if "://" not in link and not (path.parent / link).exists()
    ]
    assert found and not dead, "\n".join(dead[:20])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(
    ("path", "width"),
    [
        *((path, 1300) for path in PAGES[:2]),
        (PAGES[0], 420),
        *(pytest.param(path, 420, marks=pytest.mark.slow) for path in PAGES[1:3]),
        pytest.param(PAGES[2], 1300, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.parent.name if isinstance(value, pathlib.Path) else str(value),
)
def test_a_browser_shows_the_pages_without_complaint(path, width, tmp_path):
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--window-size={width},1600",
            f"--screenshot={picture}",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and picture.stat().st_size > 20_000, done.stderr[-500:]
    assert "CONSOLE" not in done.stderr
