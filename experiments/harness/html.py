"""results/index.html: one static page that needs no network and no script."""

import html
from collections.abc import Sequence

from tilescan.experiments.harness.claims import NOT_SHOWN, SHOWN
from tilescan.experiments.harness.results import Results, provenance
from tilescan.experiments.harness.tables import LABEL, Table

_CSS = """
:root {
  color-scheme: light dark;
  --ink: light-dark(#1c2024, #e4e7ea);
  --soft: light-dark(#5d656d, #9aa3ab);
  --line: light-dark(#dde1e5, #32383e);
  --page: light-dark(#ffffff, #14171a);
  --box: light-dark(#f5f7f9, #1c2024);
  --published: light-dark(#1a66a8, #74b7ef);
  --measured: light-dark(#1c2024, #ffffff);
  --static: light-dark(#8a4a9e, #cf9be0);
  --good: light-dark(#1b7f4d, #5fcf98);
  --bad: light-dark(#b3372b, #f08b7f);
}
* { box-sizing: border-box; }
body { margin: 0 0 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
main, header { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.9rem; margin: 0 0 .5rem; }
h2 { margin: 3rem 0 .25rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
h3 { margin: 2.2rem 0 .5rem; font-size: 1.05rem; }
p { max-width: 46rem; }
a { color: var(--published); }
nav a { display: inline-block; margin-right: 1.25rem; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { vertical-align: bottom; font-weight: 600; white-space: normal; }
th small { display: block; font-weight: 400; }
th.label, td.label { text-align: left; }
tbody tr:hover { background: var(--box); }
.published { color: var(--published); }
.measured { color: var(--measured); font-weight: 550; }
.static { color: var(--static); }
.claims td { white-space: normal; vertical-align: top; min-width: 7rem; }
.claims td.status { font-weight: 650; }
.shown { color: var(--good); }
.refuted { color: var(--bad); }
""".strip()


def render(found: Sequence[Results]) -> str:
    """The page for all results."""
    links = "".join(
        f'<a href="#{_anchor(r)}">{_text(r.paper.title.partition("(")[0].strip())} · {r.scale}</a>'
        for r in found
    )
    sections = "\n".join(_section(results) for results in found)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>Tilescan: results</title>
<style>
{_CSS}
</style>
</head>
<body>
<header>
<h1>Tilescan: results</h1>
<p><span class="published">Published</span> columns stand in the papers,
<span class="measured">measured</span> ones were measured by this code on the machine that is named,
<span class="static">static</span> ones come from a compiler or a formula, without running.
Every claim has a criterion that the numbers can fail; it was fixed before them, unless its row says
which run it was chosen on.</p>
<nav>{links}</nav>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


def _section(results: Results) -> str:
    figures = "\n".join(
        f'<figure><img src="{results.folder}/figures/{name}.svg" alt="{_text(name)}" />'
        f"<figcaption>{_text(name.replace('-', ' '))}</figcaption></figure>"
        for name in results.figures
    )
    tables = "\n".join(_table(table) for table in results.tables)
    links = " · ".join(
        f'<a href="{results.folder}/{path}">{text}</a>'
        for path, text in (("tables.json", "tables as JSON"), ("config.json", "config"))
    )
    about = _text(f"Scale {results.scale} · {provenance(results.records)}")
    return f"""<section id="{_anchor(results)}">
<h2>{_text(results.paper.title)}</h2>
<p>{_text(results.paper.summary)}</p>
<p class="soft">{about} · {links}</p>
{_claims(results)}
{figures}
{tables}
</section>"""


def _claims(results: Results) -> str:
    rows = []
    for claim in results.claims:
        style = {SHOWN: "shown", NOT_SHOWN: "refuted"}.get(claim.status, "soft")
        cells = (claim.name, claim.statement, claim.criterion)
        body = "".join(f'<td class="label">{_text(cell)}</td>' for cell in cells)
        rows.append(
            f'<tr>{body}<td class="label status {style}">{_text(claim.status)}</td>'
            f'<td class="label">{_text(claim.evidence)}</td></tr>'
        )
    titles = ("claim", "what the paper says", "criterion", "status", "evidence")
    head = "".join(f'<th class="label">{title}</th>' for title in titles)
    return _wrap("Claims", "claims", head, rows, "")


def _table(table: Table) -> str:
    head = []
    for column in table.columns:
        unit = f" ({column.unit})" if column.unit else ""
        kind = "" if column.kind == LABEL else f"<small>{column.kind}</small>"
        head.append(f'<th class="{column.kind}">{_text(column.title + unit)}{kind}</th>')
    rows = []
    for row in table.texts():
        cells = zip(row, table.columns, strict=True)
        body = "".join(f'<td class="{column.kind}">{_text(text)}</td>' for text, column in cells)
        rows.append(f"<tr>{body}</tr>")
    return _wrap(table.title, table.name, "".join(head), rows, table.note)


def _wrap(title: str, style: str, head: str, rows: Sequence[str], note: str) -> str:
    caption = f'\n<p class="soft">{_text(note)}</p>' if note else ""
    body = "\n".join(rows)
    return f"""<h3>{_text(title)}</h3>
<div class="scroll"><table class="{style}">
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>{caption}"""


def _anchor(results: Results) -> str:
    return results.folder.replace("/", "-")


def _text(value: str) -> str:
    return html.escape(str(value))
