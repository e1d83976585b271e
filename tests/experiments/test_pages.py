"""The committed pages as a browser sees them: links that lead somewhere, nothing that complains."""

import html.parser
import pathlib
import re
import shutil
import subprocess
import urllib.parse

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "results" / "index.html", *sorted(ROOT.glob("results/*/index.html"))]
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
            if re.match(r"data:|https://arxiv\.org/abs/\d{4}\.\d{5}$", link):
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


# Says how wide the page is, and what is wrong with it: parts that stick out, or on a narrow screen
# anything above what came of a claim or a paper.
COMPLAINS = """<script>
addEventListener("load", () => {
  console.log("shown at " + innerWidth);
  if (document.documentElement.scrollWidth > innerWidth) console.error("sticks out");
  const top = (element) => element.getBoundingClientRect().top;
  for (const row of document.querySelectorAll(".claims tbody tr, .matrix tr[data-text]")) {
    const first = Math.min(...[...row.cells].map(top));
    const status = top(row.querySelector(".status, .count"));
    if (innerWidth === 420) if (status > first + 2) console.error("status is not first", row.id);
  }
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(
    ("path", "width"),
    [
        (PAGES[0], 1300),
        (PAGES[1], 420),
        *(pytest.param(path, 420, marks=pytest.mark.slow) for path in (PAGES[0], *PAGES[2:4])),
        *(pytest.param(path, 1300, marks=pytest.mark.slow) for path in PAGES[1:4]),
    ],
    ids=lambda value: value.parent.name if isinstance(value, pathlib.Path) else str(value),
)
def test_a_browser_shows_the_pages_without_complaint(path, width, tmp_path):
    page, frame, picture = tmp_path / "page.html", tmp_path / "frame.html", tmp_path / "page.png"
    text = path.read_text("utf-8").replace("<head>", f'<head><base href="{path.as_uri()}" />')
    page.write_text(text.replace("</body>", COMPLAINS), "utf-8")
    # A window has at least 500 pixels, a frame any number.
    frame.write_text(f'<iframe width="{width}" height="1600" src="{page.as_uri()}"></iframe>')
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--window-size={width + 100},1700",
            f"--screenshot={picture}",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and picture.stat().st_size > 20_000, done.stderr[-500:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1 and f"shown at {width}" in said[0], "\n".join(said)


FILTERED = """<script>
const form = document.querySelector("form.filter");
form.elements.family.value = "sequence parallelism";
form.elements.status.value = "refuted";
form.elements.text.value = "ZERO zeco";
form.dispatchEvent(new Event("input"));
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_filter_leaves_what_matches(tmp_path):
    page = tmp_path / "index.html"
    page.write_text(PAGES[0].read_text("utf-8").replace("</body>", FILTERED), "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    rows = re.findall(r"<tr( class=\"family\"[^>]*| data-family[^>]*)>", done.stdout)
    left = [row for row in rows if 'hidden=""' not in row]
    assert len(rows) > 12 and len(left) == 2, left  # the paper, under its family
    assert all("sequence parallelism" in row for row in left) and "data-status" in left[1]
    items = re.findall(r"<li data-family[^>]*>", done.stdout)
    assert sum('hidden=""' not in item for item in items) == 1
