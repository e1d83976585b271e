"""Results as pages that need no network and no script: an overview, and a page for each paper."""

import html
from collections.abc import Mapping, Sequence

from tilescan.experiments.harness import markdown, matrix
from tilescan.experiments.harness.claims import NOT_SHOWN, SHOWN, Claim
from tilescan.experiments.harness.records import Record
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
.matrix td:first-child, .matrix td.symbols, .matrix td:nth-child(6) { white-space: normal; }
.matrix td.symbols { min-width: 11rem; }
@media (max-width: 40rem) {
  .claims thead { display: none; }
  .claims tr { display: block; padding: .8rem 0; border-bottom: 1px solid var(--line); }
  .claims td { display: block; border: 0; padding: .1rem 0; }
  .claims td:first-child { font-weight: 650; }
}
.family th { text-align: left; padding-top: 1.1rem; border-bottom: 1px solid var(--soft); }
.symbols a { text-decoration: none; font-weight: 650; padding: 0 .1rem; }
svg.curve { width: 6rem; height: 1.4rem; vertical-align: middle; }
svg.curve polyline { fill: none; stroke: var(--published); stroke-width: 1.5; }
tr:target { background: var(--box); outline: 2px solid var(--published); }
""".strip()

_KINDS = """<span class="published">Published</span> columns are the paper's numbers (a note says
where they are recalled or come by way of another text),
<span class="measured">measured</span> ones were measured by this code on the machine that is named,
<span class="static">static</span> ones come from a compiler or a formula, without running."""


def overview(found: Sequence[Results], code: Mapping[str, str]) -> str:
    """Returns the page of all papers: the matrix, the effects, and what did not come out."""
    figure = ""
    if matrix.effects(found):
        figure = (
            f"<h2>Effects</h2>\n<p>{matrix.EFFECTS}</p>\n"
            '<figure><img src="effects.svg" alt="effects" /></figure>'
        )
    items = "\n".join(
        f'<li><a href="{_claim_link(r, c)}">{_text(r.paper.short_title)}: {_text(c.name)}</a> '
        f"({_text(c.evidence)}): {_text(c.why or 'the cause is not known')}.</li>"
        for r, c in matrix.not_shown(found)
    )
    return _page(
        "Tilescan: results",
        f"""<header>
<h1>Tilescan: results</h1>
<p>Every claim has a criterion that the numbers can fail. {_text(matrix.LEGEND)}</p>
</header>
<main>
{_matrix(found, code)}
{figure}
<h2>Where it did not come out</h2>
<ul>
{items}
</ul>
</main>""",
    )


def paper_page(found: Sequence[Results]) -> str:
    """Returns the page of a paper: each of its scales, and the records that its numbers are of."""
    paper = found[0].paper
    sections = "\n".join(_section(results) for results in found)
    return _page(
        paper.title,
        f"""<header>
<p><a href="../index.html">All papers</a></p>
<h1>{_text(paper.title)}</h1>
<p>{_text(paper.summary)}</p>
<p class="soft">{_KINDS} Every claim has a criterion that the numbers can fail. A row says where
it is known to have been chosen after a run.</p>
</header>
<main>
{sections}
</main>""",
    )


def _page(title: str, body: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<link rel="icon" href="data:," />
<title>{_text(title)}</title>
<style>
{_CSS}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def _matrix(found: Sequence[Results], code: Mapping[str, str]) -> str:
    titles = ("paper", "claims", "shown", "seeds", "minutes", "machine", "measured", "code")
    head = "".join(f'<th class="label">{title}</th>' for title in titles)
    lines, family = [], ""
    for row in matrix.rows(found, code):
        if row.paper.family != family:
            family = row.paper.family
            lines.append(f'<tr class="family"><th colspan="{len(titles)}">{family}</th></tr>')
        link = f"{row.folder}/index.html"
        symbols = "".join(
            f'<a class="{_style(c)}" href="{link}#{row.scale}-{_anchor(c.name)}" '
            f'title="{_text(c.name)}: {_text(c.status)}">{matrix.symbol(c)}</a>'
            for c in row.claims
        )
        scale = "" if row.scale == "cpu" else f" ({row.scale})"
        cells = (row.shown, row.seeds, f"{row.minutes:.0f}", row.machine, row.measured, row.code)
        lines.append(
            f'<tr><td class="label"><a href="{link}">{_text(row.paper.short_title)}</a>{scale}</td>'
            f'<td class="label symbols">{symbols}</td>'
            + "".join(f'<td class="label">{_text(str(cell))}</td>' for cell in cells)
            + "</tr>"
        )
    return _wrap("Papers", "matrix", head, lines, "")


def _section(results: Results) -> str:
    scale = results.scale
    figures = "\n".join(
        f'<figure><img src="{scale}/figures/{name}.svg" alt="{_text(name)}" />'
        f"<figcaption>{_text(name.replace('-', ' '))}</figcaption></figure>"
        for name in results.figures
    )
    tables = "\n".join(_table(table, scale) for table in results.tables)
    links = " · ".join(
        f'<a href="{scale}/{path}">{text}</a>'
        for path, text in (("tables.json", "tables as JSON"), ("config.json", "config"))
    )
    return f"""<section id="{scale}">
<h2>Scale {scale}</h2>
<p class="soft">{_text(provenance(results.records))} · {links}</p>
{_claims(results)}
{figures}
{tables}
{_records(results)}
</section>"""


def _claims(results: Results) -> str:
    rows = []
    for claim in results.claims:
        cells = (claim.name, claim.statement, claim.criterion)
        body = "".join(f'<td class="label">{_text(cell)}</td>' for cell in cells)
        why = f'<br /><span class="soft">{_text(claim.why)}.</span>' if claim.why else ""
        rows.append(
            f'<tr id="{results.scale}-{_anchor(claim.name)}">{body}'
            f'<td class="label status {_style(claim)}">{_text(claim.status)}</td>'
            f'<td class="label">{_text(claim.evidence)}{why}</td></tr>'
        )
    titles = ("claim", "what the paper says", "criterion", "status", "evidence")
    head = "".join(f'<th class="label">{title}</th>' for title in titles)
    return _wrap("Claims", "claims", head, rows, "")


def _table(table: Table, scale: str) -> str:
    """Returns a table; the label of a row leads to the first record that it was computed of."""
    head = []
    for column in table.columns:
        unit = f" ({column.unit})" if column.unit else ""
        kind = "" if column.kind == LABEL else f"<small>{column.kind}</small>"
        head.append(f'<th class="{column.kind}">{_text(column.title + unit)}{kind}</th>')
    rows = []
    sources = table.sources or [()] * len(table.rows)
    for row, cells in zip(table.texts(), sources, strict=True):
        body = [
            f'<td class="{column.kind}">{_text(text)}</td>'
            for text, column in zip(row, table.columns, strict=True)
        ]
        if cells:
            about = _text(f"from {', '.join(cells)}")
            link = f'<a href="#{scale}-record-{cells[0]}" title="{about}">{_text(row[0])}</a>'
            body[0] = f'<td class="{table.columns[0].kind}">{link}</td>'
        rows.append(f"<tr>{''.join(body)}</tr>")
    return _wrap(table.title, table.name, "".join(head), rows, table.note)


def _records(results: Results) -> str:
    """Returns what numbers hang on: a row a cell, with its command and its training's curve."""
    titles = ("record", "seed", "seconds", "commit", "machine", "finished", "data", "loss")
    head = "".join(f'<th class="label">{title}</th>' for title in titles)
    rows = []
    for record in results.records:
        machine = matrix.short_device(record.environment["device"])
        finished = record.environment["finished"][:16].replace("T", " ")
        commit, data = markdown.commit(record), markdown.data(record)
        cells = (record.seed, f"{record.seconds:.1f}", commit, machine, finished, data)
        command = f"tilescan rerun {record.paper} {record.cell}"
        link = f"{results.scale}/cells/{record.cell}.json"
        rows.append(
            f'<tr id="{results.scale}-record-{record.cell}"><td class="label">'
            f'<a href="{link}" title="{_text(command)}">{_text(record.cell)}</a></td>'
            + "".join(f'<td class="label">{_text(str(cell))}</td>' for cell in cells)
            + f'<td class="label">{_curve(record)}</td></tr>'
        )
    note = "A record holds settings, numbers and curve; `tilescan rerun PAPER RECORD` repeats it."
    return _wrap("Records", "records", head, rows, note)


def _curve(record: Record) -> str:
    """Returns the loss over the steps of a training, as a small drawing."""
    if not record.curve or len(record.curve["loss"]) < 2:
        return ""
    steps, loss = record.curve["steps"], record.curve["loss"]
    low, high = min(loss), max(loss)
    x = [100 * (s - steps[0]) / max(1, steps[-1] - steps[0]) for s in steps]
    y = [20 - 18 * (v - low) / ((high - low) or 1) for v in loss]
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f'<svg class="curve" viewBox="0 0 100 22" preserveAspectRatio="none" role="img">'
        f"<title>loss {loss[0]:.3g} to {loss[-1]:.3g}</title>"
        f'<polyline points="{points}" /></svg>'
    )


def _wrap(title: str, style: str, head: str, rows: Sequence[str], note: str) -> str:
    caption = f'\n<p class="soft">{_text(note)}</p>' if note else ""
    body = "\n".join(rows)
    return f"""<h3>{_text(title)}</h3>
<div class="scroll"><table class="{style}">
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>{caption}"""


def _style(claim: Claim) -> str:
    return {SHOWN: "shown", NOT_SHOWN: "refuted"}.get(claim.status, "soft")


def _claim_link(results: Results, claim: Claim) -> str:
    return f"{results.paper.name}/index.html#{results.scale}-{_anchor(claim.name)}"


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _text(value: str) -> str:
    return html.escape(str(value))
