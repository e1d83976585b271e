"""Tables and figures of "Stuffed Mamba".

Of the paper's figures only the two fitted laws are numbers in print; they stand beside what was
measured at sizes a thousand times smaller, where they say nothing (below 0.9M state elements the
first one is negative).
"""

import math

import numpy as np

from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, spread
from tilescan.experiments.harness.tables import MEASURED, PUBLISHED, STATIC, Column, Table
from tilescan.experiments.measurements.state_collapse import (
    COLLAPSE,
    judge_collapse,
    published_t_forget,
    published_t_recall,
)

NONE = "none"
FORGET = "forget more, remember less"
WINDOW = "sliding window by state difference"
NORM = "state normalisation"
HALF_STEP = "half step size"
TBPTT = "training: state carried over rows"
LONGER = "training: rows four times as long"
RECALLED = 0.95  # share of right answers that counts as recalled, as in the paper
CUT = 0.5  # of the excess loss
# Parameters, layers and width of the paper's models, all with 128 state dims and heads of 64.
SIZES = (
    ("36M", 6, 512),
    ("47M", 12, 512),
    ("85M", 12, 768),
    ("130M", 24, 768),
    ("370M", 48, 1024),
    ("780M", 48, 1536),
)


def mamba2_state_elements(
    layers: int, d_model: int, state_dim: int = 128, conv_width: int = 4
) -> int:
    """N_S: L (2 E N + (W - 1) (2 E + 2 N)), with E the model's width and one group."""
    inner = 2 * d_model
    return layers * (inner * state_dim + (conv_width - 1) * (inner + 2 * state_dim))


def tables(records: Records) -> list[Table]:
    """Collapse, training lengths that are enough, mitigations, heads, the published laws."""
    made = [
        _collapse_table(records, "stream", "collapse", "a stream of recalls"),
        _collapse_table(records, "text", "collapse-text", "plain text"),
        _laws_table(records),
        _recall_table(records),
        _mitigation_table(records),
        _heads_table(records),
        _published_table(),
    ]
    return [table for table in made if table.rows]


def runs(records: Records, kind: str, elements: int, length: int, carry: int = 1) -> list[Record]:
    found = records.select(kind=kind, state_elements=elements, train_length=length, carry=carry)
    return list(found)


def ratio_of(record: Record) -> float:
    return judge_collapse(
        record.result["loss"], record.result["width"], record.settings["train_length"]
    ).ratio


def within_of(record: Record) -> float:
    """The greatest loss within the training length."""
    return max(record.result["loss"][: record.settings["train_length"] // record.result["width"]])


def sizes_of(records: Records, kind: str) -> tuple[list[int], list[int]]:
    """(state elements, training lengths) of the records of a kind, sorted."""
    found = records.select(kind=kind)
    return found.values("state_elements"), found.values("train_length")


def name_of(records: Records, elements: int) -> str:
    s = next(iter(records.select(state_elements=elements))).settings
    return f"{s['layers']} layers, width {s['d_model']}, N={s['state_dim']}"


def _collapse_table(records: Records, kind: str, name: str, title: str) -> Table:
    sizes, lengths = sizes_of(records, kind)
    rows = []
    for n_s in sizes:
        row = [name_of(records, n_s), n_s]
        for length in lengths:
            found = runs(records, kind, n_s, length)
            row += [spread(map(within_of, found)), spread(map(ratio_of, found))]
        rows.append(row)
    columns = [Column("model"), Column("state elements N_S", STATIC)]
    for length in lengths:
        columns.append(Column(f"trained at {length}: loss within", MEASURED, "nats"))
        columns.append(Column(f"trained at {length}: behind / within", MEASURED))
    return Table(
        name,
        f"State collapse on {title}: the greatest loss behind the training length",
        columns,
        rows,
        note="Loss is a mean over half a training length; the greatest one behind the "
        "training length, as far as rows are read, is divided by the greatest one within. "
        f"From {COLLAPSE:g} on the model collapses, by the paper's criterion. All training lengths "
        "see as many tokens.",
    )


def safe_length(records: Records, elements: int, seed: int) -> float | None:
    """The smallest training length from which on no longer one collapses; inf: there is none.

    None without measurements.
    """
    _, lengths = sizes_of(records, "stream")
    found = {
        n: [r for r in runs(records, "stream", elements, n) if r.seed == seed] for n in lengths
    }
    if not all(found.values()):
        return None
    safe = math.inf
    for length in reversed(lengths):
        if ratio_of(found[length][0]) >= COLLAPSE:
            break
        safe = length
    return safe


def recall_length(record: Record) -> int:
    """The longest prompt that, as all shorter ones, has RECALLED of its answers right; 0: none."""
    longest = 0
    for length, share in sorted((int(n), share) for n, share in record.result["recall"].items()):
        if share < RECALLED:
            break
        longest = length
    return longest


def safe_lengths(records: Records) -> dict[int, dict[int, float]]:
    """{state elements: {seed: safe length}} of the seeds that are complete."""
    sizes, _ = sizes_of(records, "stream")
    seeds = sorted({r.seed for r in records.select(kind="stream")})
    found = {n: {s: safe_length(records, n, s) for s in seeds} for n in sizes}
    return {n: {s: x for s, x in row.items() if x is not None} for n, row in found.items()}


def _laws_table(records: Records) -> Table:
    _, lengths = sizes_of(records, "stream")
    rows = []
    for n_s, by_seed in safe_lengths(records).items():
        longest = runs(records, "stream", n_s, max(lengths))
        safe = ", ".join(f"> {max(lengths)}" if math.isinf(x) else str(x) for x in by_seed.values())
        rows.append(
            [
                name_of(records, n_s),
                n_s,
                safe or None,
                published_t_forget(n_s),
                spread(map(recall_length, longest)),
                published_t_recall(n_s),
            ]
        )
    return Table(
        "laws",
        "Training lengths that are enough to learn forgetting, and lengths of recall",
        [
            Column("model"),
            Column("state elements N_S", STATIC),
            Column("smallest safe training length, each seed", MEASURED),
            Column("T_forget by the published law", PUBLISHED, "tokens"),
            Column(f"T_recall, trained at {max(lengths, default=0)}", MEASURED, "tokens"),
            Column("T_recall by the published law", PUBLISHED, "tokens"),
        ],
        rows,
        note="The published laws are fits to models of 0.8M to 19M state elements, T_forget = "
        "5.172 N_S - 4.469 and T_recall = 4.756 (1.365^N_S - 1) - 0.742 with N_S in millions and "
        "T in thousands of tokens: at these sizes both are negative, and no comparison is meant. "
        f"T_recall: longest prompt with {RECALLED:.0%} of the answers right, 0 if there is none.",
    )


def _recall_table(records: Records) -> Table:
    sizes, lengths = sizes_of(records, "stream")
    prompts = sorted({int(n) for r in records.select(kind="stream") for n in r.result["recall"]})
    rows = []
    for n_s in sizes:
        for length in lengths:
            found = runs(records, "stream", n_s, length)
            if found:
                shares = [spread(100 * r.result["recall"][str(n)] for r in found) for n in prompts]
                rows.append([name_of(records, n_s), str(length), *shares])
    return Table(
        "recall",
        "One pair asked for at the end of the prompt, from all depths: right answers",
        [
            Column("model"),
            Column("trained at"),
            *(Column(f"{n} tokens", MEASURED, "%") for n in prompts),
        ],
        rows,
        note="The rest of the prompt is the stream that the model was trained on, in which no key "
        "is asked for behind more than a few pairs: what lies farther back is not trained for.",
    )


def _mitigated(records: Records) -> list[Record]:
    return [r for r in records.select(kind="stream") if r.result.get("mitigations")]


def _trained(records: Records, way: str) -> list[dict]:
    """Within and behind, as of mitigations, of models that were trained in another way."""
    made = []
    for record in _mitigated(records):
        s, length = record.settings, record.settings["train_length"]
        other = 4 * length if way == LONGER else length
        found = records.select(kind="stream", state_elements=s["state_elements"])
        for r in found.select(train_length=other):
            right = r.settings["carry"] == 1 if way == LONGER else r.settings["carry"] > 1
            if r.seed == record.seed and right:
                # Buckets of half the row's own length: that which ends at each place.
                at = lambda place, r=r: r.result["loss"][-(-place // r.result["width"]) - 1]
                made.append({"within": at(length), "behind": at(4 * length)})
    return made


def _ways(records: Records) -> dict[str, list[dict]]:
    """{mitigation: [{"within", "behind"} of each seed]}."""
    ways: dict[str, list[dict]] = {}
    for record in _mitigated(records):
        for name in (NONE, FORGET, WINDOW, NORM, HALF_STEP):
            if name in record.result["mitigations"]:
                ways.setdefault(name, []).append(record.result["mitigations"][name])
    for name in (TBPTT, LONGER):
        if found := _trained(records, name):
            ways[name] = found
    return ways


def excess_cuts(records: Records) -> dict[str, Spread]:
    """{mitigation: share of the excess loss at four training lengths that it takes away}.

    The excess is the loss in the last half training length before 4 T, above that before T, of the
    model without mitigation.
    """
    ways = _ways(records)
    plain = ways.get(NONE, [])
    cuts = {}
    for name, found in ways.items():
        if name != NONE and len(found) == len(plain):
            shares = [
                1 - (m["behind"] - base["within"]) / (base["behind"] - base["within"])
                for m, base in zip(found, plain, strict=True)
                if base["behind"] != base["within"]
            ]
            cuts[name] = spread(shares)
    return {name: cut for name, cut in cuts.items() if cut}


def _chosen(records: Records, name: str) -> str:
    """What validation chose, over the seeds."""
    found = []
    for record in _mitigated(records):
        options = record.result["mitigations"].get(name, {}).get("chosen", {})
        found.append(", ".join(f"{k}={v:.4g}" for k, v in sorted(options.items())))
    return "; ".join(sorted(set(filter(None, found)))) or "–"


def _mitigation_table(records: Records) -> Table:
    cuts, rows = excess_cuts(records), []
    for name, found in _ways(records).items():
        cut = cuts.get(name)
        if cut:
            cut = Spread(100 * cut.mean, None if cut.std is None else 100 * cut.std, cut.count)
        parts = [spread(m[key] for m in found) for key in ("within", "behind")]
        rows.append([name, _chosen(records, name), *parts, cut])
    first = next(iter(_mitigated(records)), None)
    title = "Mitigations"
    if first:
        title += f": {name_of(records, first.settings['state_elements'])}, trained at "
        title += f"{first.settings['train_length']}"
    return Table(
        "mitigation",
        title,
        [
            Column("mitigation"),
            Column("chosen on validation rows"),
            Column("loss before T", MEASURED, "nats"),
            Column("loss before 4 T", MEASURED, "nats"),
            Column("excess taken away", MEASURED, "%"),
        ],
        rows,
        note="T is the training length; losses are means over T/2 tokens before T and 4 T (of the "
        "model with longer rows, over half of those). The paper multiplies decays by 0.9999 at 8K "
        "tokens, which keeps 0.44 of a state over them; decay_scale here keeps such a share, or "
        "less, over T, and b_scale is the paper's 0.75. State normalisation bounds each head's "
        "norm by its mean at T, behind every chunk instead of every token.",
    )


def kept_of(record: Record) -> float:
    """The greatest share of the first token that a head's state keeps over the training length."""
    return math.exp(max(record.result["first_token"][0]))


def growth_of(record: Record) -> float:
    """How much the variance of a head's state grows behind the training length, at most."""
    values = np.maximum(np.asarray(record.result["state_variance"]), 1e-30)
    return float(np.max(values[-1] / values[0]))


def _heads_table(records: Records) -> Table:
    rows = []
    for kind in ("stream", "text"):
        sizes, lengths = sizes_of(records, kind)
        for n_s in sizes:
            for length in lengths:
                found = runs(records, kind, n_s, length)
                if found:
                    cells = [spread(map(kept_of, found)), spread(map(growth_of, found))]
                    rows.append([kind, name_of(records, n_s), str(length), *cells])
    return Table(
        "heads",
        "Heads that forget least, and states under a prompt of one repeated token",
        [
            Column("data"),
            Column("model"),
            Column("trained at"),
            Column("share of the first token kept over it", MEASURED),
            Column("growth of the state's variance behind it", MEASURED),
        ],
        rows,
        note="Each the greatest of all heads. The share is the exponential of the mean of log "
        "alpha_1:t; the prompt is newlines (text) or blanks (stream), read as far as rows are, "
        "and its variance there is divided by that at the training length.",
    )


def _published_table() -> Table:
    rows = []
    for name, layers, width in SIZES:
        n_s = mamba2_state_elements(layers, width)
        laws = [law(n_s) / 1e3 for law in (published_t_forget, published_t_recall)]
        rows.append([f"{name} ({layers} layers, width {width})", n_s / 1e6, *laws])
    return Table(
        "published-laws",
        "The published laws at the paper's own sizes",
        [
            Column("model"),
            Column("state elements N_S", STATIC, "millions"),
            Column("T_forget", PUBLISHED, "K tokens"),
            Column("T_recall", PUBLISHED, "K tokens"),
        ],
        rows,
        note="Nothing here is measured. Scale accelerator trains these sizes.",
    )


def figures(records: Records) -> dict[str, str]:
    """Loss against position, the first token's share, and states under one repeated token."""
    made, panels = {}, {}
    for kind in ("stream", "text"):
        sizes, lengths = sizes_of(records, kind)
        for n_s in sizes:
            lines = panels.setdefault(f"{kind}, {name_of(records, n_s).split(', ')[-1]}", {})
            for length in lengths:
                found = runs(records, kind, n_s, length)
                if found:
                    losses = np.array([r.result["loss"] for r in found]).mean(axis=0)
                    places = (np.arange(len(losses)) + 1) * found[0].result["width"]
                    lines[f"trained at {length}"] = (list(places / length), list(losses))
    if panels:
        made["loss-against-position"] = line_chart(
            panels,
            x_label="position / training length",
            y_label="loss (nats)",
            markers=False,
        )
    for name, key, label in (
        ("first-token", "first_token", "log share of the first token, slowest head"),
        ("state-variance", "state_variance", "variance of the state, largest head"),
    ):
        lines = {}
        for kind in ("stream", "text"):
            sizes, lengths = sizes_of(records, kind)
            for length in lengths if sizes else ():
                for record in runs(records, kind, max(sizes), length)[:1]:
                    top = np.max(np.asarray(record.result[key]), axis=1)
                    place = (np.arange(len(top)) + 1) * length
                    lines.setdefault(kind, {})[f"trained at {length}"] = (list(place), list(top))
        if lines:
            made[name] = line_chart(
                lines, x_label="tokens", y_label=label, log_x=True, share_y=False,
                log_y=key == "state_variance",
            )  # fmt: skip
    return made
