"""Results as pages that need no network: an overview, and a page for each paper.

Everything is on the page without a script as well; with it, rows can be filtered.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from tilescan.experiments.harness import html_parts as parts
from tilescan.experiments.harness import markdown, matrix
from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.harness.claims import Claim
from tilescan.experiments.harness.html_parts import escape
from tilescan.experiments.harness.results import Results, provenance

_CSS, _SCRIPT = (
    pathlib.Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8").strip()
    for kind in ("css", "js")
)

_KINDS = re.sub(
    r"\*([^*]+)\*",
    r"<i>\1</i>",
    markdown.KINDS.format(
        '<span class="published">',
        "</span>",
        '<span class="measured">',
        "</span>",
        '<span class="static">',
        "</span>",
    ),
)


def overview(found: Sequence[Results], code: Mapping[str, str]) -> str:
    """Returns the page of all papers: the matrix, the effects, and what did not come out."""
    figure = ""
    if matrix.effects(found):
        figure = (
            f"{parts.heading(2, 'Effects', 'effects')}\n"
            f'<figure class="wide"><img src="effects.svg" alt="{escape(matrix.EFFECTS)}" />'
            f"<figcaption>{escape(matrix.EFFECTS)}</figcaption></figure>"
        )
    items = "\n".join(
        f'<li data-family="{r.paper.family}" data-status="{parts.style(c)}" '
        f'data-text="{escape(r.paper.title)}"><a href="{_claim_link(r, c)}">'
        f"{escape(r.paper.short_title)}: {escape(c.name)}</a> "
        f"({escape(c.evidence)}): {escape(c.why or 'the cause is not known')}.</li>"
        for r, c in matrix.not_shown(found)
    )
    link = lambda r, c: f'<a href="{_claim_link(r, c)}">{escape(c.name)}</a>'
    late = "\n".join(
        f"<li>{escape(r.paper.short_title)}: {escape(said)}. Of: "
        f"{'; '.join(link(r, c) for c in claims)}.</li>"
        for r, said, claims in matrix.late(found)
    )
    ledger = escape(matrix.LEDGER).replace(
        "criteria.json", '<a href="criteria.json">criteria.json</a>'
    )
    families = list(dict.fromkeys(row.paper.family for row in matrix.rows(found, code)))
    contents = [("part", "#papers", "Papers")]
    contents += [("", f"#{parts.anchor_of(family)}", family) for family in families]
    contents += [("part", "#effects", "Effects")] if figure else []
    contents += [("part", "#not-shown", "Where it did not come out")]
    contents += [("part", "#criteria", "How old criteria are")]
    return _page(
        "Tilescan: results",
        contents,
        f"""<h1>Tilescan: results</h1>
<p>Every claim has a criterion, by which it is shown or not. {escape(matrix.LEGEND)}</p>
{parts.filters("results", ("status", parts.STATUSES), ("family", {f: f for f in families}))}
{_matrix(found, code)}
{figure}
{parts.heading(2, "Where it did not come out", "not-shown")}
<ul>
{items}
</ul>
{parts.heading(2, "How old criteria are", "criteria")}
<p>{ledger}</p>
<ul>
{late}
</ul>""",
    )


def paper_page(found: Sequence[Results]) -> str:
    """Returns the page of a paper: each of its scales, and the records that its numbers are of."""
    paper = found[0].paper
    contents = [("part", "../index.html", "All papers")]
    for results in found:
        contents.append(("part", f"#{results.scale}", f"Scale {results.scale}"))
        contents.append(("", f"#{results.scale}-claims", "Claims"))
        tables = [(table.name, table.title) for table in results.tables]
        contents += [("", f"#{results.scale}-table-{name}", title) for name, title in tables]
        contents.append(("", f"#{results.scale}-records", "Records"))
    sections = "\n".join(_section(results) for results in found)
    command = f"tilescan run {paper.name} --scale={found[0].scale}"
    return _page(
        paper.title,
        contents,
        f"""<h1>{_linked_title(paper)}</h1>
<p>{escape(paper.summary)}</p>
{_standing(found)}
<p class="run">Measure it again: <code>{escape(command)}</code></p>
<p class="soft">{_KINDS} Every claim has a criterion; a row says where it follows by construction,
and where the criterion is younger than a record it reads (by <a href="../criteria.json">the ledger
of criteria</a>).</p>
{sections}""",
    )


def _page(title: str, contents: Iterable[tuple[str, str, str]], body: str) -> str:
    """Returns a whole page; `contents` has a style, an address and a text for each link."""
    links = "\n".join(
        f'<a class="{style}" href="{target}">{_short(text)}</a>'.replace(' class=""', "")
        for style, target, text in contents
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<link rel="icon" href="data:," />
<title>{escape(title)}</title>
<style>
{_CSS}
</style>
</head>
<body>
<nav aria-label="Contents">
{links}
</nav>
<main id="results">
{body}
</main>
<script>
{_SCRIPT}
</script>
</body>
</html>
"""


def _short(text: str) -> str:
    """Returns a link's text, "Table 3" of "Table 3: ..." apart: narrow screens show that alone."""
    found = re.fullmatch(r"((?:Tables?|Figures?|Section|Theorems?) [^:]{1,16}): (.*)", text)
    if found:
        name, rest = map(escape, found.groups())
        return f'<span class="name">{name}</span> <span class="rest">{rest}</span>'
    return escape(text)


def _standing(found: Sequence[Results]) -> str:
    """Returns what came of the claims, in one line for each scale, as links to them."""
    lines = []
    for row in matrix.rows(found, {}):
        scale = "" if row.scale == "cpu" else f" (scale {row.scale})"
        links = _symbols(row, "")
        lines.append(f'<p><b>{row.shown}</b> shown{scale} <span class="symbols">{links}</span></p>')
    return "\n".join(lines)


def _symbols(row: matrix.Row, page: str) -> str:
    """Returns a symbol for each claim, which leads to it."""
    return "".join(
        f'<a class="{parts.style(c)}" href="{page}#{row.scale}-{parts.anchor_of(c.name)}" '
        f'title="{escape(c.name)}: {escape(c.outcome)}">{matrix.symbol(c)}</a>'
        for c in row.claims
    )


def _linked_title(paper: Paper) -> str:
    """Returns the title, its number at arXiv as a link."""
    source = f"arXiv {paper.arxiv}"
    link = f'<a href="https://arxiv.org/abs/{paper.arxiv}">{source}</a>'
    return escape(paper.title).replace(source, link) if paper.arxiv else escape(paper.title)


def _matrix(found: Sequence[Results], code: Mapping[str, str]) -> str:
    titles = ("paper", "claims", "shown", "seeds", "minutes", "machine", "measured", "code")
    head = "".join(f'<th class="label">{title}</th>' for title in titles)
    lines, family = [], ""
    for row in matrix.rows(found, code):
        if row.paper.family != family:
            family = row.paper.family
            lines.append(
                f'<tr class="family" id="{parts.anchor_of(family)}" data-of="{family}">'
                f'<th colspan="{len(titles)}">{family}</th></tr>'
            )
        link = f"{row.folder}/index.html"
        scale = "" if row.scale == "cpu" else f" ({row.scale})"
        cells = (row.seeds, f"{row.minutes:.0f}", row.machine, row.measured, row.code)
        statuses = " ".join(sorted({parts.style(claim) for claim in row.claims}))
        words = " ".join(
            [row.paper.name, row.paper.title, row.paper.summary, *(c.name for c in row.claims)]
        )
        lines.append(
            f'<tr data-family="{family}" data-status="{statuses}" data-text="{escape(words)}">'
            f'<td class="label"><a href="{link}">{escape(row.paper.short_title)}</a>{scale}'
            f"<small>{_arxiv(row.paper)}<code>tilescan run {row.paper.name}</code></small></td>"
            f'<td class="label symbols">{_symbols(row, link)}</td>'
            f'<td class="label count">{row.shown}</td>'
            + "".join(
                f'<td class="label more of-{title}" data-of="{title}">{escape(str(cell))}</td>'
                for title, cell in zip(titles[3:], cells, strict=True)
            )
            + "</tr>"
        )
    return parts.wrap("Papers", "papers", "matrix", head, lines, "")


def _arxiv(paper: Paper) -> str:
    address = f"https://arxiv.org/abs/{paper.arxiv}"
    return f'<a href="{address}">arXiv {paper.arxiv}</a> ' if paper.arxiv else ""


def _section(results: Results) -> str:
    scale = results.scale
    figures = {name: parts.figure(name, svg, scale) for name, svg in results.figures.items()}
    tables = "\n".join(
        parts.table(table, scale, [figures[name] for name in results.figures_beside(table.name)])
        for table in results.tables
    )
    alone = "\n".join(figures[name] for name in results.figures_beside(""))
    links = " · ".join(
        f'<a href="{scale}/{path}">{text}</a>'
        for path, text in (("tables.json", "tables as JSON"), ("config.json", "config"))
    )
    return f"""<section id="{scale}">
{parts.heading(2, f"Scale {scale}", f"{scale}-scale")}
<p class="soft">{escape(provenance(results.records))} · {links}</p>
{parts.claims(results)}
{alone}
{tables}
{parts.records(results)}
</section>"""


def _claim_link(results: Results, claim: Claim) -> str:
    return f"{results.paper.name}/index.html#{results.scale}-{parts.anchor_of(claim.name)}"
