"""What StreamBP's paper says of lengths, time, exactness, and of what chunks are for."""

from tilescan.experiments.harness.claims import (
    Claim,
    Effect,
    Verdict,
    at_most,
    claim,
    every,
    not_run,
)
from tilescan.experiments.harness.groups import by
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import Spread
from tilescan.experiments.harness.tables import format_value
from tilescan.experiments.papers.stream_bp import published
from tilescan.experiments.papers.stream_bp.losses import (
    CHECKPOINT,
    DPO,
    GRPO,
    LOSSES,
    MST,
    NONE,
    SFT,
    STREAM,
)
from tilescan.experiments.papers.stream_bp.tables import (
    LOSS_NAMES,
    NAMES,
    PARTS,
    error,
    gain,
    length,
    time_ratio,
)
from tilescan.experiments.papers.stream_bp.training import BASE16, STREAM16, STREAM32

# Bounds on ratios of lengths, about the least, and for SFT the greatest, that is published over
# models and ways of training; and what the paper says.
GAINS = {
    (SFT, CHECKPOINT): (
        2.5,
        6.0,
        "Sequences are 2.8 to 5.5 times as long as with checkpointing (abstract).",
    ),
    (SFT, NONE): (
        23.0,
        None,
        "Sequences are 23 to 36 times as long as without checkpointing (section 4.1).",
    ),
    (GRPO, CHECKPOINT): (1.4, None, "In GRPO sequences are 1.46 to 2.3 times as long (Table 3)."),
    (DPO, CHECKPOINT): (1.7, None, "In DPO sequences are 1.77 to 3.1 times as long (Table 3)."),
}
MOST_TIME = 1.05
FLOAT32_ERROR = 1e-5
BFLOAT16_FACTOR = 1.1


def claims(records: Records) -> list[Claim]:
    """Returns the claims, each with its verdict."""
    return [
        *(
            claim(
                f"longer sequences than with {NAMES[over]}, {LOSS_NAMES[loss]}",
                statement,
                longer(records, loss, over, low, high),
            )
            for (loss, over), (low, high, statement) in GAINS.items()
        ),
        claim(
            "layers save beyond logits",
            "Chunks of logits alone (MsT) do not reach StreamBP's lengths (section 4.1).",
            beyond_logits(records),
        ),
        claim(
            "as fast as checkpointing",
            "A backward pass takes as long as with checkpointing or up to 12.9% less (Table 1).",
            as_fast(records),
        ),
        claim(
            "more chunks, less memory",
            "Memory falls with the number of chunks (Figure 5).",
            chunks_save(records),
        ),
        claim(
            "exact gradients",
            "StreamBP's gradients are those of backpropagation (section 3).",
            exact(records),
        ),
        claim(
            "no worse in bfloat16",
            "In bfloat16 StreamBP's errors are the baseline's: 1.47% and 1.43% for the head, 6.59% "
            "and 6.63% for layers (Table 6).",
            no_worse(records),
        ),
        *(
            claim(
                f"same training losses, {LOSS_NAMES[loss]}",
                "Losses over 500 steps are the baseline's to 0.004 (Table 7).",
                same_losses(records, loss),
            )
            for loss in LOSSES
        ),
        not_run(
            "sharded",
            "With ZeRO-2 on 3 to 8 GPUs sequences are 5 to 5.6 times as long (Table 4).",
            "longest sequences of both on several devices",
            needs="several GPUs",
        ),
    ]


def longer(records: Records, loss: str, over: str, low: float, high: float | None) -> Verdict:
    """Returns whether sequences are longer than another method's by a factor within bounds."""
    value, evidence, effect = gain(records, loss, over), "", None
    if value is not None:
        lengths = (length(records, loss, m) for m in (STREAM, over))
        evidence = "{:.2f}: {:,} and {:,} tokens".format(value, *lengths)
        of_paper = published.LENGTHS[loss]
        effect = Effect(of_paper[STREAM] / of_paper[over], [value])
    bound = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
    return Verdict(
        f"longest sequence within one budget of temporary bytes, StreamBP / {NAMES[over]}: {bound}",
        None if value is None else low <= value <= (high or value),
        evidence,
        effect,
    )


def beyond_logits(records: Records) -> Verdict:
    """Returns whether chunks of layers give longer sequences than chunks of logits alone."""
    values = {loss: gain(records, loss, MST) for loss in LOSSES}
    values = {loss: value for loss, value in values.items() if value is not None}
    return Verdict(
        "longest sequence, StreamBP / checkpointing with chunks of logits: above 1.2 for each loss",
        every(value > 1.2 for value in values.values()),
        ", ".join(f"{LOSS_NAMES[loss]} {value:.2f}" for loss, value in values.items()),
    )


def as_fast(records: Records) -> Verdict:
    """Returns whether a gradient takes no longer than with checkpointing."""
    groups = by(records.select(kind="times"), "length")
    found: dict[int, Spread | None] = {g.key: time_ratio(g.first, STREAM) for g in groups}
    points = [(n, value) for n, value in found.items() if value is not None]
    effect = None
    if points:
        # At the longest sequences; here a number for each round.
        times = groups[[g.key for g in groups].index(points[-1][0])].first.result
        rounds = zip(times[STREAM]["samples_ms"], times[CHECKPOINT]["samples_ms"], strict=True)
        effect = Effect(published.TIME_RATIO, [a / b for a, b in rounds])
    return Verdict(
        f"time of a gradient, StreamBP / checkpointing, at the longest sequence: at most "
        f"{MOST_TIME}",
        points[-1][1].mean <= MOST_TIME if points else None,
        ", ".join(f"{format_value(value)} at {n:,}" for n, value in points),
        effect,
    )


def chunks_save(records: Records) -> Verdict:
    """Returns whether memory falls with every number of chunks."""
    record, found = records.one(kind="counts"), []
    if record is not None:
        found = [(n, record.result[str(n)].get("temp_bytes")) for n in record.settings["counts"]]
    points = [(n, value / 1e6) for n, value in found if value is not None]
    needs = [value for _, value in points]
    falls = lambda: needs[-1] < needs[0] / 2 and needs == sorted(needs, reverse=True)
    return Verdict(
        "temporary bytes fall with every number of chunks, to less than half of one chunk's",
        falls() if len(needs) > 1 else None,
        ", ".join(f"{value:.0f} MB by {n}" for n, value in points),
    )


def exact(records: Records) -> Verdict:
    """Returns whether gradients in float32 are the plain ones."""
    found = {part: error(records, STREAM32, part) for part in PARTS}
    found = {part: value for part, value in found.items() if value is not None}
    return Verdict(
        f"float32: norm of the difference of gradients at most {FLOAT32_ERROR:g} of their norm, "
        "for the head and for the layers",
        every(value.mean <= FLOAT32_ERROR for value in found.values()),
        ", ".join(f"{part} {format_value(value)}" for part, value in found.items()),
    )


def no_worse(records: Records) -> Verdict:
    """Returns whether errors in bfloat16 are about those of checkpointing."""
    pairs = {part: [error(records, v, part) for v in (STREAM16, BASE16)] for part in PARTS}
    pairs = {part: (a.mean, b.mean) for part, (a, b) in pairs.items() if a and b}
    return Verdict(
        f"relative error in bfloat16, StreamBP / checkpointing: at most {BFLOAT16_FACTOR}, for the "
        "head and for the layers",
        every(a <= BFLOAT16_FACTOR * b for a, b in pairs.values()),
        ", ".join(f"{part} {100 * a:.2f}% and {100 * b:.2f}%" for part, (a, b) in pairs.items()),
    )


def same_losses(records: Records, loss: str) -> Verdict:
    """Returns whether a training's losses are the plain ones'."""
    record = records.one(kind="parity", loss=loss)
    steps = 0 if record is None else len(record.result["plain"])
    return at_most(
        f"largest difference of the losses of all steps: at most {published.DIFFERENCE}",
        {} if record is None else {steps: record.result["largest_difference"]},
        published.DIFFERENCE,
        text="{1:.1e} over {0} steps",
    )
