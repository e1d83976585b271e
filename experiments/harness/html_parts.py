"""Parts of the pages of results: figures, claims, tables and records, each with an address."""

import html
from collections.abc import Mapping, Sequence

from tilescan.experiments.harness import markdown, matrix
from tilescan.experiments.harness.claims import NOT_SHOWN, SHOWN, Claim
from tilescan.experiments.harness.figures import caption_of, width_of
from tilescan.experiments.harness.records import Record
from tilescan.experiments.harness.results import Results
from tilescan.experiments.harness.tables import LABEL, Table

# Of claims: {style: what the reader chooses}.
STATUSES = {
    "shown": "shown",
    "built": "by construction",
    "refuted": "not shown",
    "soft": "needs scale",
}


def figure(name: str, svg: str, scale: str) -> str:
    """Returns a figure with its caption; it leads to its file."""
    caption, file, anchor = escape(caption_of(svg)), f"{scale}/figures/{name}.svg", f"figure-{name}"
    wide = ' class="wide"' if width_of(svg) > 500 else ""
    return (
        f'<figure id="{scale}-{anchor}"{wide}>'
        f'<a href="{file}"><img src="{file}" alt="{caption}" /></a>'
        f'<figcaption>{caption}\N{NO-BREAK SPACE}<a class="anchor" href="#{scale}-{anchor}" '
        'aria-label="link to this figure">#</a></figcaption></figure>'
    )


def claims(results: Results) -> str:
    """Returns the claims of a paper at one scale, a row each."""
    rows = []
    for claim in results.claims:
        anchor = f"{results.scale}-{anchor_of(claim.name)}"
        link = f'<a class="anchor" href="#{anchor}" aria-label="link to this claim">#</a>'
        said, judged = escape(claim.said), escape(claim.criterion) + _soft(claim.late)
        rows.append(
            f'<tr id="{anchor}" data-status="{style(claim)}" data-text="">'
            f'<td class="label">{escape(claim.name)}\N{NO-BREAK SPACE}{link}</td>'
            f'<td class="label">{said}</td>'
            f'<td class="label" data-of="criterion">{judged}</td>'
            f'<td class="label status {style(claim)}">{escape(claim.outcome)}</td>'
            f'<td class="label" data-of="evidence">{escape(claim.evidence)}{_soft(claim.why)}</td>'
            "</tr>"
        )
    titles = markdown.claims_titles(results.paper.source)
    head = "".join(f'<th class="label">{title}</th>' for title in titles)
    anchor = f"{results.scale}-claims"
    form = filters(f"{anchor}-rows", ("status", STATUSES))
    return wrap("Claims", anchor, "claims", head, rows, "", form)


def _soft(text: str) -> str:
    """Returns a sentence on a line of its own, in a soft color."""
    return f'<br /><span class="soft">{escape(text)}.</span>' if text else ""


def table(table: Table, scale: str, figures: Sequence[str]) -> str:
    """Returns a table below its figures; labels of rows lead to the first record behind them."""
    head = []
    for column in table.columns:
        unit = f" ({column.unit})" if column.unit else ""
        kind = "" if column.kind == LABEL else f"<small>{column.kind}</small>"
        head.append(f'<th class="{column.style}">{escape(column.title + unit)}{kind}</th>')
    rows = []
    sources = table.sources or [()] * len(table.rows)
    for row, cells in zip(table.texts(), sources, strict=True):
        body = [
            f'<td class="{column.style}">{escape(text)}</td>'
            for text, column in zip(row, table.columns, strict=True)
        ]
        if cells:
            about = escape(f"from {', '.join(cells)}")
            link = f'<a href="#{scale}-record-{cells[0]}" title="{about}">{escape(row[0])}</a>'
            body[0] = f'<td class="{table.columns[0].style}">{link}</td>'
        rows.append(f"<tr>{''.join(body)}</tr>")
    anchor, above = f"{scale}-table-{table.name}", "\n".join(figures)
    return wrap(table.title, anchor, table.name, "".join(head), rows, table.note, above)


def records(results: Results) -> str:
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
            f'<tr id="{results.scale}-record-{record.cell}" data-text=""><td class="label">'
            f'<a href="{link}" title="{escape(command)}">{escape(record.cell)}</a></td>'
            + "".join(f'<td class="label">{escape(str(cell))}</td>' for cell in cells)
            + f'<td class="label">{_curve(record)}</td></tr>'
        )
    name, anchor = results.paper.name, f"{results.scale}-records"
    note = f"A record holds settings, numbers and curve; `tilescan rerun {name} RECORD` repeats it."
    return wrap("Records", anchor, "records", head, rows, note, filters(f"{anchor}-rows"))


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


def wrap(
    title: str, anchor: str, style: str, head: str, rows: Sequence[str], note: str, above: str = ""
) -> str:
    """Returns a table under its heading; `above` stands between them."""
    caption = f'\n<p class="soft">{escape(note)}</p>' if note else ""
    body = "\n".join(rows)
    return f"""{heading(3, title, anchor)}
{above}
<div class="scroll" id="{anchor}-rows"><table class="{style}">
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>{caption}"""


def style(claim: Claim) -> str:
    """Returns the style of a claim's status, one of STATUSES."""
    if claim.built:
        return "built"
    return {SHOWN: "shown", NOT_SHOWN: "refuted"}.get(claim.status, "soft")


def heading(level: int, text: str, anchor: str) -> str:
    """Returns a heading with a link to itself."""
    link = f'<a class="anchor" href="#{anchor}" aria-label="link to this place">#</a>'
    return f'<h{level} id="{anchor}">{escape(text)}\N{NO-BREAK SPACE}{link}</h{level}>'


def filters(of: str, *choices: tuple[str, Mapping[str, str]]) -> str:
    """Returns the controls that filter what is within the element `of`; the script shows them."""
    selects = "".join(
        f'<select name="{name}" aria-label="{name}"><option value="">every {name}</option>'
        + "".join(f'<option value="{escape(k)}">{escape(v)}</option>' for k, v in options.items())
        + "</select>"
        for name, options in choices
    )
    field = '<input type="search" name="text" placeholder="filter by words" aria-label="words" />'
    count = '<output name="count"></output>'
    return f'<form class="filter" data-of="{of}" hidden="">{field}{selects}{count}</form>'


def anchor_of(name: str) -> str:
    """Returns a name as part of an address."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def escape(value: object) -> str:
    """Returns text as it is written in HTML."""
    return html.escape(str(value))
