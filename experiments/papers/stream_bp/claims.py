"""What StreamBP's paper says, as predicates on the records."""

from tilescan.experiments.harness.claims import Claim, judge
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.tables import format_value
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
    PUBLISHED_DIFFERENCE,
    by_length,
    error,
    gain,
    length,
    time_ratio,
)
from tilescan.experiments.papers.stream_bp.training import BASE16, STREAM16, STREAM32

# Bounds on ratios of lengths: about the least, and for SFT the greatest, that is published over
# models and ways of training.
GAINS = {
    (SFT, CHECKPOINT): (2.5, 6.0),
    (SFT, NONE): (23.0, None),
    (GRPO, CHECKPOINT): (1.4, None),
    (DPO, CHECKPOINT): (1.7, None),
}
STATEMENTS = {
    (SFT, CHECKPOINT): "Sequences are 2.8 to 5.5 times as long as with checkpointing (abstract).",
    (SFT, NONE): "Sequences are 23 to 36 times as long as without checkpointing (section 4.1).",
    (GRPO, CHECKPOINT): "In GRPO sequences are 1.46 to 2.3 times as long (Table 3).",
    (DPO, CHECKPOINT): "In DPO sequences are 1.77 to 3.1 times as long (Table 3).",
}
MOST_TIME = 1.05
FLOAT32_ERROR = 1e-5
BFLOAT16_FACTOR = 1.1


def claims(records: Records) -> list[Claim]:
    """Lengths, time, exactness, and what chunks are for."""
    return [
        *(_longer(records, loss, over) for loss, over in GAINS),
        _beyond_logits(records),
        _as_fast(records),
        _chunks_save(records),
        _exact(records),
        _no_worse_in_bfloat16(records),
        *(_same_losses(records, loss) for loss in LOSSES),
        judge(
            "sharded",
            "With ZeRO-2 on 3 to 8 GPUs sequences are 5 to 5.6 times as long (Table 4).",
            "longest sequences of both on several devices",
            None,
            "not run",
            needs="several GPUs",
        ),
    ]


def _longer(records: Records, loss: str, over: str) -> Claim:
    low, high = GAINS[loss, over]
    value = gain(records, loss, over)
    bound = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
    evidence = ""
    if value is not None:
        lengths = (length(records, loss, m) for m in (STREAM, over))
        evidence = "{:.2f}: {:,} and {:,} tokens".format(value, *lengths)
    return judge(
        f"longer sequences than with {NAMES[over]}, {LOSS_NAMES[loss]}",
        STATEMENTS[loss, over],
        f"longest sequence within one budget of temporary bytes, StreamBP / {NAMES[over]}: {bound}",
        None if value is None else low <= value <= (high or value),
        evidence,
    )


def _beyond_logits(records: Records) -> Claim:
    values = {loss: gain(records, loss, MST) for loss in LOSSES}
    values = {loss: value for loss, value in values.items() if value is not None}
    return judge(
        "layers save beyond logits",
        "Chunks of logits alone (MsT) do not reach StreamBP's lengths (section 4.1).",
        "longest sequence, StreamBP / checkpointing with chunks of logits: above 1.2 for each loss",
        min(values.values()) > 1.2 if values else None,
        ", ".join(f"{LOSS_NAMES[loss]} {value:.2f}" for loss, value in values.items()),
    )


def _as_fast(records: Records) -> Claim:
    points = [(r.settings["length"], time_ratio(r, STREAM)) for r in by_length(records)]
    points = [(n, value) for n, value in points if value is not None]
    return judge(
        "as fast as checkpointing",
        "A backward pass takes as long as with checkpointing or up to 12.9% less (Table 1).",
        f"time of a gradient, StreamBP / checkpointing, at the longest sequence: at most "
        f"{MOST_TIME}",
        points[-1][1].mean <= MOST_TIME if points else None,
        ", ".join(f"{format_value(value)} at {n:,}" for n, value in points),
    )


def _chunks_save(records: Records) -> Claim:
    record, points = records.one(kind="counts"), []
    if record is not None:
        found = [(n, record.result[str(n)].get("temp_bytes")) for n in record.settings["counts"]]
        points = [(n, value / 1e6) for n, value in found if value is not None]
    holds = None
    if len(points) > 1:
        needs = [value for _, value in points]
        holds = needs[-1] < needs[0] / 2 and needs == sorted(needs, reverse=True)
    return judge(
        "more chunks, less memory",
        "Memory falls with the number of chunks (Figure 5).",
        "temporary bytes fall with every number of chunks, to less than half of one chunk's",
        holds,
        ", ".join(f"{value:.0f} MB by {n}" for n, value in points),
    )


def _exact(records: Records) -> Claim:
    found = {part: error(records, STREAM32, part) for part in ("head", "layers")}
    missing = None in found.values()
    return judge(
        "exact gradients",
        "StreamBP's gradients are those of backpropagation (section 3).",
        f"float32: norm of the difference of gradients at most {FLOAT32_ERROR:g} of their norm, "
        "for the head and for the layers",
        None if missing else max(value.mean for value in found.values()) <= FLOAT32_ERROR,
        "" if missing else ", ".join(f"{k} {format_value(v)}" for k, v in found.items()),
    )


def _no_worse_in_bfloat16(records: Records) -> Claim:
    parts = ("head", "layers")
    pairs = {p: [error(records, v, p) for v in (STREAM16, BASE16)] for p in parts}
    missing = any(None in pair for pair in pairs.values())
    return judge(
        "no worse in bfloat16",
        "In bfloat16 StreamBP's errors are the baseline's: 1.47% and 1.43% for the head, 6.59% and "
        "6.63% for layers (Table 6).",
        f"relative error in bfloat16, StreamBP / checkpointing: at most {BFLOAT16_FACTOR}, for the "
        "head and for the layers",
        None if missing else all(a.mean <= BFLOAT16_FACTOR * b.mean for a, b in pairs.values()),
        ""
        if missing
        else ", ".join(
            f"{p} {100 * a.mean:.2f}% and {100 * b.mean:.2f}%" for p, (a, b) in pairs.items()
        ),
    )


def _same_losses(records: Records, loss: str) -> Claim:
    record = records.one(kind="parity", loss=loss)
    largest = None if record is None else record.result["largest_difference"]
    return judge(
        f"same training losses, {LOSS_NAMES[loss]}",
        "Losses over 500 steps are the baseline's to 0.004 (Table 7).",
        f"largest difference of the losses of all steps: at most {PUBLISHED_DIFFERENCE}",
        None if largest is None else largest <= PUBLISHED_DIFFERENCE,
        "" if largest is None else f"{largest:.1e} over {len(record.result['plain'])} steps",
    )
