"""What FlashAttention-2's paper says of counts, skipped tiles, speed and training."""

import statistics

from tilescan.experiments.harness.claims import Claim, Effect, Verdict, claim, every, not_run
from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.tables import format_value
from tilescan.experiments.measurements import attention, static_kernels, timing, training_steps
from tilescan.experiments.measurements.attention import FORWARD, FORWARD_BACKWARD, MASKS, TILED
from tilescan.experiments.papers.flash_attention_2 import published
from tilescan.experiments.papers.flash_attention_2.tables import VARIANTS, compared, training_gain

LEAST_OVER_STANDARD = published.OVER_STANDARD[0]
LEAST_GAIN = 1.2  # of tiled over standard attention at the longest context
LONGEST = "GPT3-1.3B, 8k"  # whose gain is the published one of the longest context


def claims(records: Records) -> list[Claim]:
    """Returns the paper's statements, and those that need more than one machine."""
    found = attention.longest(records.select(kind="speed"))
    return [
        claim(
            "fewer operations",
            "The new loop order does less work outside matrix products (section 3.1).",
            fewer_flops(records.select(kind="counts")),
            by_construction=True,
        ),
        claim(
            "skipped tiles",
            "Causal attention leaves out the tiles above the diagonal, about half of them, and "
            "masks the elements of one tile a row (section 3.1.1).",
            skipped_tiles(records.select(kind="tiles")),
        ),
        claim(
            "causal masks",
            "Skipping the tiles above the diagonal makes causal attention 1.7 to 1.8 times faster "
            "(section 3.1.1).",
            causal_gain(found),
        ),
        *(
            claim(
                f"over standard attention, {mask}",
                "3 to 10 times faster than standard attention (section 4.1).",
                over_standard(found, mask),
                why=slow_cause(found, mask),
            )
            for mask in MASKS
        ),
        *static_kernels.claims(records),
        not_run(
            "twice FlashAttention",
            "FlashAttention-2 is about twice as fast as FlashAttention (section 4.1).",
            "time of both kernels on one GPU",
            needs="a GPU with both kernels",
        ),
        claim(
            "faster training",
            "Training is faster than without FlashAttention, the more the longer the context "
            "(Table 1, 1.3B parameters: 1.4 times at 2k, 3.1 times at 8k).",
            faster_training(training_steps.by_context(records.select(kind="training"))),
        ),
        not_run(
            "end to end",
            "Training GPT-style models reaches 225 TFLOP/s per A100 (Table 1).",
            "6 FLOPs per token and parameter and 12 x layers x hidden x N², per second",
            needs="8 GPUs",
        ),
    ]


def fewer_flops(counts: Records) -> Verdict:
    """Returns whether the new loop does less outside matrix products, and as much in them."""
    found = [(r.settings, r.result["fa1"], r.result["fa2"]) for r in counts]
    evidence = ""
    if found:
        _, one, two = max(found, key=lambda row: (row[0]["length"], not row[0]["causal"]))
        evidence = (
            f"rescalings {one['rescales']:,} against {two['rescales']:,}, "
            f"divisions {one['divisions']:,} against {two['divisions']:,} at the longest length"
        )
    return Verdict(
        "in every count: one division per output element, at most half the rescalings, no more "
        "exponentials, the same tile visits and matrix products",
        every(
            two["divisions"] == s["length"] * s["head_dim"]
            and one["rescales"] >= 2 * two["rescales"]
            and one["exps"] >= two["exps"]
            and all(one[key] == two[key] for key in ("visits", "matmul_flops"))
            for s, one, two in found
        ),
        evidence,
    )


def skipped_tiles(tiles: Records) -> Verdict:
    """Returns whether the op visits the lower triangle alone and masks the diagonal alone."""
    found = [(g.key, g.first.result) for g in by(tiles, "side")]
    listed = ", ".join(f"{r['all'] / r['live']:.2f} at {n}" for n, r in found if n >= 8)
    return Verdict(
        "of n² tiles the op visits n(n+1)/2 and masks n, for every n",
        every(r["live"] == n * (n + 1) // 2 and r["partial"] == n for n, r in found),
        f"all / live {listed} tiles a side" if found else "",
    )


def causal_gain(found: list[Record]) -> Verdict:
    """Returns whether skipping tiles gives about the published speed-up."""
    full, causal = (f"{TILED} {mask} {FORWARD}" for mask in MASKS)
    return timing.gain_within(
        "medians over rounds, full / causal: between 1.5 and 2 at the longest length, forward, "
        "smallest head dim",
        found[0] if found else None,
        (full, causal),
        1.5,
        2.0,
        published=statistics.fmean(published.CAUSAL),
        digits=4,
    )


def over_standard(found: list[Record], mask: str) -> Verdict:
    """Returns whether tiled attention is faster than standard attention by the range's low end.

    The effect's published size is that low end; it has a measured one for each head dim.
    """
    gains = {r.settings["head_dim"]: timing.gain(r, *compared(mask)) for r in found}
    known = bool(gains) and None not in gains.values()
    listed = ", ".join(f"{format_value(g)} for head dim {d}" for d, g in gains.items())
    return Verdict(
        f"medians over rounds, standard / tiled: at least {LEAST_OVER_STANDARD}, forward + "
        "backward, longest length, every head dim",
        every(g.mean >= LEAST_OVER_STANDARD for g in gains.values()) if known else None,
        f"{listed} at length {found[0].settings['length']}" if known else "",
        Effect(LEAST_OVER_STANDARD, [g.mean for g in gains.values()]) if known else None,
    )


def slow_cause(found: list[Record], mask: str) -> str:
    """Returns why the gain falls as heads grow, with the speeds."""
    speed = lambda r, variant: format_value(attention.rate(r, variant, mask, FORWARD_BACKWARD))
    speeds = [
        f"{' and '.join(speed(r, v) for v in VARIANTS)} GFLOP/s with head dim "
        f"{r.settings['head_dim']}"
        for r in found
    ]
    return (
        "of one hidden size larger heads are fewer and have fewer scores for as many FLOPs; "
        "standard attention, which stores the scores, gains more by that than tiled attention: "
        f"{', '.join(speeds)}"
    )


def faster_training(steps: list[Group]) -> Verdict:
    """Returns whether training is faster with tiles, the more the longer the context."""
    criterion = (
        f"medians over rounds of a training step's time, standard / tiled: at least {LEAST_GAIN} "
        "at the longest context and larger than at the shortest"
    )
    gains = {step.key: timing.gain(step.first, *VARIANTS) for step in steps}
    if len(steps) < 2 or None in gains.values():
        return Verdict(criterion, None, "")
    first, *_, last = gains.values()
    return Verdict(
        criterion,
        last.mean >= LEAST_GAIN and last.mean > first.mean,
        ", ".join(f"{format_value(gain)} at {context}" for context, gain in gains.items()),
        timing.effect(training_gain(published.TRAINING[LONGEST]), steps[-1].first, *VARIANTS),
    )
