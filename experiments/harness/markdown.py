"""Results as Markdown, which forges render: RESULTS.md, and a page for each paper."""

from collections.abc import Iterable, Mapping, Sequence

from tilescan.experiments.harness import matrix
from tilescan.experiments.harness.claims import Claim
from tilescan.experiments.harness.figures import caption_of
from tilescan.experiments.harness.records import Record
from tilescan.experiments.harness.results import Results, provenance
from tilescan.experiments.harness.tables import MEASURED, Column, Table, table

_HEAD = """# Results

Made by `python -m tilescan.experiments.report` from the records under `{root}/`; a test holds
that this file is exactly what they give. Every claim has a criterion, by which it is shown or not;
[how old criteria are](#how-old-criteria-are), and what that proves, is said below the matrix.
Measure a paper again with `tilescan run PAPER --scale=cpu --publish`, one number of it with
`tilescan rerun PAPER CELL`. The same as a page: [{root}/index.html]({root}/index.html).
"""

_PAPER_HEAD = """# {title}

{summary}
{arxiv}

{kinds} Every claim has a criterion; a row says where it follows by construction, and where the
criterion is younger than a record it reads (by [results/criteria.json](../criteria.json)).
`tilescan run {name} --scale=cpu` measures all of it again.
"""

KINDS = (
    "{}Published{} columns are the paper's numbers, read in its text or its authors'; other kinds "
    "of them are *recalled*, *from a secondary source* (another text about the paper) and *read "
    "off a figure*. {}Measured{} columns were measured by this code on the machine that is named. "
    "{}Static{} columns come from a compiler or a formula, without running."
)


def overview(found: Sequence[Results], code: Mapping[str, str], root: str) -> str:
    """Returns RESULTS.md.

    Args:
      found: all results.
      code: {folder: what became of the code under it}, see `matrix.rows`.
      root: the folder of results, relative to the file.
    """
    parts = [_HEAD.format(root=root), "## Papers", matrix_table(matrix.rows(found, code), root)]
    parts.append(matrix.LEGEND)
    parts.append(f"## How old criteria are\n\n{_ledger(root)}")
    parts += _late(found, root)
    if matrix.effects(found):
        parts.append(f"## Effects\n\n{matrix.EFFECTS}\n\n![effects]({root}/effects.svg)")
    parts += ["## Where it did not come out", *_not_shown(found, root)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def matrix_table(rows: Sequence[matrix.Row], root: str) -> str:
    """Returns the matrix: a row a paper, under its family."""
    lines = [
        "| paper | claims | shown | seeds | minutes | machine | measured | code |",
        "| --- | --- | --- | ---: | ---: | --- | --- | --- |",
    ]
    family = ""
    for row in rows:
        if row.paper.family != family:
            family = row.paper.family
            lines.append(f"| **{family}** | | | | | | | |")
        scale = "" if row.scale == "cpu" else f" ({row.scale})"
        lines.append(
            f"| [{row.paper.short_title}]({root}/{row.folder}/README.md){scale} "
            f"| {''.join(map(matrix.symbol, row.claims))} | {row.shown} | {row.seeds} "
            f"| {row.minutes:.0f} | {row.machine} | {row.measured} | {row.code} |"
        )
    return "\n".join(lines)


def _ledger(root: str) -> str:
    return matrix.LEDGER.replace("criteria.json", f"[{root}/criteria.json]({root}/criteria.json)")


def _late(found: Sequence[Results], root: str) -> list[str]:
    lines: dict[str, list[str]] = {}
    for results, said, claims in matrix.late(found):
        page = f"[{results.paper.short_title}]({root}/{results.paper.name}/README.md)"
        names = "; ".join(claim.name for claim in claims)
        lines.setdefault(page, []).append(f"- {said}. Of: {names}.")
    return [f"{page}\n\n" + "\n".join(items) for page, items in lines.items()]


def _not_shown(found: Sequence[Results], root: str) -> list[str]:
    lines: dict[str, list[str]] = {}
    for results, claim in matrix.not_shown(found):
        page = f"[{results.paper.short_title}]({root}/{results.paper.name}/README.md)"
        why = claim.why or "the cause is not known"
        lines.setdefault(page, []).append(f"- {claim.name} ({claim.evidence}): {why}.")
    return [f"{page}\n\n" + "\n".join(items) for page, items in lines.items()]


def paper_page(found: Sequence[Results]) -> str:
    """Returns the page of a paper: each of its scales, and the records that its numbers are of."""
    paper = found[0].paper
    arxiv = f"\nThe paper: <https://arxiv.org/abs/{paper.arxiv}>.\n" if paper.arxiv else ""
    head = _PAPER_HEAD.format(
        title=paper.title,
        summary=paper.summary,
        name=paper.name,
        arxiv=arxiv,
        kinds=KINDS.format(*("*" * 6)),
    )
    return "\n\n".join([head.strip(), *(scale(r, r.scale) for r in found)]) + "\n"


def scale(results: Results, folder: str = ".") -> str:
    """Returns one paper at one scale; `folder` is where its figures and records lie."""
    parts = [f"## Scale {results.scale}", provenance(results.records)]
    parts.append(claims_table(results.claims, results.paper.source).to_markdown())
    figures = {name: _figure(name, svg, folder) for name, svg in results.figures.items()}
    parts += [figures[name] for name in results.figures_beside("")]
    for shown in results.tables:
        heading, body = shown.to_markdown().split("\n", 1)
        parts += [heading, *(figures[f] for f in results.figures_beside(shown.name)), body]
    parts.append(records_table(results.records, folder).to_markdown())
    return "\n\n".join(part.strip() for part in parts)


def _figure(name: str, svg: str, folder: str) -> str:
    """Returns a figure with its caption below."""
    caption = caption_of(svg)
    return f"![{caption}]({folder}/figures/{name}.svg)\n\n*{caption}*"


def claims_table(claims: Iterable[Claim], source: str) -> Table:
    """Returns the claims as a table; `source` is that of the numbers which they quote."""
    rows = [[c.name, c.said, c.judged, c.outcome, c.evidence] for c in claims]
    return Table("claims", "Claims", [Column(title) for title in claims_titles(source)], rows)


def claims_titles(source: str) -> tuple[str, ...]:
    """Returns the headings of a table of claims that quote numbers from a source."""
    return ("claim", f"what the paper says ({source})", "criterion", "status", "evidence")


def records_table(records: Iterable[Record], folder: str) -> Table:
    """Returns what each number hangs on: a row a cell, with a link to its record."""
    columns = [
        Column("record", of=lambda r: f"[{r.cell}]({folder}/cells/{r.cell}.json)"),
        Column("seed", MEASURED, of=lambda r: r.seed),
        Column("seconds", MEASURED, of=lambda r: r.seconds),
        Column("commit", of=commit),
        Column("machine", of=lambda r: matrix.short_device(r.environment["device"])),
        Column("finished", of=lambda r: r.environment["finished"][:16].replace("T", " ")),
        Column("data", of=data),
    ]
    note = (
        "A record holds the settings, the numbers and, of a training, its curve. "
        "`tilescan rerun PAPER RECORD` measures one again and prints both."
    )
    return table("records", "Records", records, columns, note)


def commit(record: Record) -> str:
    """Returns the commit that a record was measured at, with a mark if files differed from it."""
    head = (record.environment["commit"] or "unknown")[:10]
    return head + ("+changes" if record.environment["modified"] else "")


def data(record: Record) -> str:
    """Returns the sources that a record's cell trained on, with the first digits of checksums."""
    checksums = record.environment.get("data") or {}
    return ", ".join(
        f"{name} {(digest or 'not pinned')[:10]}" for name, digest in checksums.items()
    )
