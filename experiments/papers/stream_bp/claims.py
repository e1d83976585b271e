"""What StreamBP's paper says of lengths, time, exactness, and of what chunks are for."""

from tilescan.experiments.harness import claims as c
from tilescan.experiments.harness.claims import Claim, Effect, Verdict, claim
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.tables import format_value
from tilescan.experiments.measurements import timing
from tilescan.experiments.papers.stream_bp import losses, published, tables
from tilescan.experiments.papers.stream_bp.losses import CHECKPOINT, LOSSES, STREAM
from tilescan.experiments.papers.stream_bp.tables import LOSS_NAMES, NAMES, PARTS, error, gain
from tilescan.experiments.papers.stream_bp.training import BASE16, STREAM16, STREAM32

# Of losses and the methods to compare with: bounds of the ratio of lengths, about the least that is
# published over models and kinds of training; what the paper says.
GAINS = {
    (losses.SFT, CHECKPOINT): (
        2.5,
        "Sequences are 2.8 to 5.5 times as long as with checkpointing (abstract; 7.02 times with "
        "Qwen3-4B, Table 3).",
    ),
    (losses.SFT, losses.NONE): (
        23.0,
        "Sequences are 23 to 36 times as long as without checkpointing (section 4.1).",
    ),
    (losses.GRPO, CHECKPOINT): (1.4, "In GRPO sequences are 1.46 to 2.3 times as long (Table 3)."),
    (losses.DPO, CHECKPOINT): (1.7, "In DPO sequences are 1.77 to 3.1 times as long (Table 3)."),
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
                longer(records, loss, over, least),
            )
            for (loss, over), (least, statement) in GAINS.items()
        ),
        claim(
            "layers save beyond logits",
            "Chunks of logits alone (MsT) do not reach StreamBP's lengths (section 4.1).",
            beyond_logits(records),
        ),
        claim(
            "as fast as checkpointing",
            "A backward pass takes as long as with checkpointing or up to 12.9% less (Table 1).",
            as_fast(records.kind("times")),
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
                by_construction=loss == losses.GRPO,  # whose loss itself is about the bound
            )
            for loss in LOSSES
        ),
        c.not_run(
            "sharded",
            "With ZeRO-2 on 3 to 8 GPUs sequences are 5 to 5.6 times as long (Table 4).",
            "longest sequences of both on several devices",
            needs="several GPUs",
        ),
    ]


def longer(records: Records, loss: str, over: str, least: float) -> Verdict:
    """Returns whether sequences are longer than another method's by a factor at least."""
    criterion = (
        f"longest sequence within one budget of temporary bytes, StreamBP / {NAMES[over]}: at "
        f"least {least:g}"
    )
    value, of_paper = gain(records, loss, over), published.LENGTHS[loss]
    if value is None:
        return Verdict(criterion, None, "")
    lengths = (tables.length(records, loss, method) for method in (STREAM, over))
    return Verdict(
        criterion,
        value >= least,
        "{:.2f}: {:,} and {:,} tokens".format(value, *lengths),
        Effect(of_paper[STREAM] / of_paper[over], [value]),
    )


def beyond_logits(records: Records) -> Verdict:
    """Returns whether chunks of layers give longer sequences than chunks of logits alone."""
    values = {LOSS_NAMES[x]: v for x in LOSSES if (v := gain(records, x, losses.MST))}
    return Verdict(
        "longest sequence, StreamBP / checkpointing with chunks of logits: above 1.2 for each loss",
        c.every(value > 1.2 for value in values.values()),
        c.listed(values, "{} {:.2f}"),
    )


def as_fast(times: Records) -> Verdict:
    """Returns whether a gradient takes no longer than with checkpointing, at the longest."""
    pair = (STREAM, CHECKPOINT)
    found = [(g.first, timing.gain(g.first, *pair)) for g in timing.both_timed(times, *pair)]
    evidence = (f"{format_value(value)} at {r.settings['length']:,}" for r, value in found)
    chunks = f"in {found[-1][0].settings['chunks']} chunks: " if found else ""
    return Verdict(
        "medians over rounds of a gradient's time, StreamBP / checkpointing, at the longest "
        f"sequence and in as many chunks as the memory is claimed for: at most {MOST_TIME}",
        found[-1][1].mean <= MOST_TIME if found else None,
        chunks + ", ".join(evidence),
        timing.effect(published.TIME_RATIO, found[-1][0], *pair) if found else None,
    )


def chunks_save(records: Records) -> Verdict:
    """Returns whether memory falls with every number of chunks."""
    found = [(n, r.result[str(n)]) for r in records.kind("counts") for n in r.settings["counts"]]
    needs = {n: x["temp_bytes"] / 1e6 for n, x in found if x.get("temp_bytes") is not None}
    values = list(needs.values())
    falls = lambda: values[-1] < values[0] / 2 and values == sorted(values, reverse=True)
    return Verdict(
        "temporary bytes fall with every number of chunks, to less than half of one chunk's",
        falls() if len(values) > 1 else None,
        ", ".join(f"{value:.0f} MB by {n}" for n, value in needs.items()),
    )


def exact(records: Records) -> Verdict:
    """Returns whether gradients in float32 are the plain ones."""
    found = {part: value for part in PARTS if (value := error(records, STREAM32, part))}
    return Verdict(
        f"float32: norm of the difference of gradients at most {FLOAT32_ERROR:g} of their norm, "
        "mean over seeds, for the head and for the layers",
        c.every(value.mean <= FLOAT32_ERROR for value in found.values()),
        ", ".join(f"{part} {format_value(value)}" for part, value in found.items()),
    )


def no_worse(records: Records) -> Verdict:
    """Returns whether errors in bfloat16 are about those of checkpointing."""
    pairs = {part: [error(records, v, part) for v in (STREAM16, BASE16)] for part in PARTS}
    pairs = {part: (a.mean, b.mean) for part, (a, b) in pairs.items() if a and b}
    return Verdict(
        f"relative error in bfloat16, StreamBP / checkpointing, means over seeds: at most "
        f"{BFLOAT16_FACTOR}, for the head and for the layers",
        c.every(a <= BFLOAT16_FACTOR * b for a, b in pairs.values()),
        ", ".join(f"{part} {100 * a:.2f}% and {100 * b:.2f}%" for part, (a, b) in pairs.items()),
    )


def same_losses(records: Records, loss: str) -> Verdict:
    """Returns whether a training's losses are the plain ones'."""
    worst: dict[int, float] = {}
    for result in (r.result for r in records.select(kind="parity", loss=loss)):
        steps = len(result["plain"])
        worst[steps] = max(result["largest_difference"], worst.get(steps, 0.0))
    return c.at_most(
        f"largest difference of the losses of all steps: at most {published.DIFFERENCE}, with "
        "every seed",
        worst,
        published.DIFFERENCE,
        text="{1:.1e} over {0} steps",
    )
