"""What FlashAttention's paper says of exactness, speed, memory, traffic and longer contexts."""

import statistics

from tilescan.experiments.harness import claims as c
from tilescan.experiments.harness.claims import Claim, Effect, Verdict, claim
from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import log_slope, ratio
from tilescan.experiments.harness.tables import format_value
from tilescan.experiments.measurements import attention, contexts, timing
from tilescan.experiments.measurements.attention import DIRECTIONS, FORWARD, FORWARD_BACKWARD
from tilescan.experiments.measurements.attention_exactness import exact
from tilescan.experiments.measurements.training import attention_pairs, curve_difference
from tilescan.experiments.papers.flash_attention import published, tables

OVER_STANDARD, OVER_SPARSE = attention.OVER_STANDARD, attention.OVER_SPARSE
# Smallest accepted standard / tiled at the longest common length.
FASTER = {FORWARD: 1.5, FORWARD_BACKWARD: 1.2}
SLOPE_ERROR = 0.1  # largest accepted distance of a measured power from that of the bound
CONTEXT_GAIN = 0.01  # of the perplexity: smallest accepted gain of the longest context
CURVE_TOLERANCE = 0.01  # nats: largest accepted difference of two training curves
SAVED = published.GIGABYTES[0] / published.GIGABYTES[1]  # traffic, in figure 2
# What the paper measured, without dropout and padding, as here, and with them.
SPEED_UPS = {
    FORWARD: "Table 18: 2.0 times at 4096; 3.5 times with dropout and padding, Table 9",
    FORWARD_BACKWARD: "Table 20: 1.7 times at 4096; 3.3 times with dropout and padding, Table 11",
}
MEMORY = {FORWARD: "", FORWARD_BACKWARD: " (Table 21: 20 times as much at 4096)"}


def claims(records: Records) -> list[Claim]:
    """Returns the paper's statements, and those that need more than one machine."""
    runtime, memory = (records.select(kind=kind) for kind in ("runtime", "memory"))
    return [
        *(
            claim(
                f"faster, {title}",
                "Tiled attention is faster than standard attention on long sequences "
                f"({SPEED_UPS[direction]}).",
                faster(runtime.select(direction=direction), direction),
            )
            for direction, title in DIRECTIONS.items()
        ),
        claim(
            "block-sparse",
            "Block-sparse attention's time falls with the live fraction s of its tiles (Table 20: "
            "9.4 times at 4096, 149 times at 64k; with dropout and padding 9.1 and 146 times, "
            "Table 11).",
            sparse_faster(runtime.select(direction=FORWARD_BACKWARD)),
        ),
        *(
            claim(
                f"linear memory, {title}",
                "Tiled attention needs memory linear in the length, standard attention quadratic"
                f"{MEMORY[direction]}.",
                linear_memory(memory.select(direction=direction), direction),
            )
            for direction, title in DIRECTIONS.items()
        ),
        claim(
            "exact attention",
            "Tiled attention computes the same function as standard attention (theorem 1).",
            exact(records.select(kind="exactness")),
        ),
        claim(
            "less traffic",
            f"Tiling moves {SAVED:.1f} times fewer bytes between HBM and chip (Figure 2).",
            less_traffic(records.select(kind="io").one(**tables.PAPER_IO)),
        ),
        claim(
            "traffic follows the bound",
            "Tiled attention's traffic is Θ(N²d²/M), block-sparse attention's Θ(Nd + N²d²s/M) "
            "(theorem 2, proposition 4).",
            follows_bound(records),
        ),
        claim(
            "equal training curves",
            "Tiled attention is exact: models train to the same perplexity (section 4.1, Table 2).",
            equal_curves(records.select(kind="curves")),
        ),
        claim(
            "longer context",
            "A longer context lowers perplexity (Table 4: 18.2 at 1k, 17.2 at 4k).",
            longer_context(*(records.select(kind=kind) for kind in tables.CONTEXTS)),
        ),
        claim(
            "longer documents",
            "Reading more of a document classifies it better (Table 5: +4.3 and +7.0 points).",
            longer_documents(by(records.select(kind="documents"), "length")),
        ),
        c.not_run(
            "BERT training time",
            "BERT-large trains to 72.0% masked accuracy in 17.4 ± 1.4 minutes, the MLPerf 1.1 "
            "record took 20.0 ± 1.5 (Table 1).",
            "time to 72.0% on 8 A100s",
            needs="8 A100s and MLPerf's Wikipedia",
        ),
        c.not_run(
            "GPT-2 training time",
            "GPT-2 small trains 3.5 times faster than with HuggingFace's attention at the same "
            "perplexity 18.2, GPT-2 medium 3.0 times at 14.2 (Table 2).",
            "time to 400k steps on OpenWebText, 8 GPUs",
            needs="8 GPUs and OpenWebText",
        ),
        c.not_run(
            "Long-Range Arena",
            "2.4 times faster than the Transformer at an average of 59.8 against 59.3, 2.8 times "
            "at 59.6 if block-sparse (Table 3).",
            "accuracy on the five tasks and training time on one GPU",
            needs="a GPU and the five tasks' data",
        ),
        c.not_run(
            "Path-X and Path-256",
            "First Transformer above chance: 61.4% on Path-X; block-sparse 56.0% there and 63.1% "
            "on Path-256 (Table 6).",
            "accuracy above 50% at lengths of 16k and 64k",
            needs="weeks of one GPU and Pathfinder's images",
        ),
    ]


def faster(runtime: Records, direction: str) -> Verdict:
    """Returns whether tiled attention is faster than standard attention, in one direction."""
    timed = timing.both_timed(runtime, *OVER_STANDARD)
    return timing.gain_within(
        "medians over rounds, standard / tiled: at least "
        f"{FASTER[direction]} at the longest length that both ran",
        timed[-1].first if timed else None,
        OVER_STANDARD,
        FASTER[direction],
        published=plain(timed[-1].key, direction, OVER_STANDARD) if timed else None,
    )


def plain(length: int, direction: str, pair: tuple[str, str]) -> float | None:
    """Returns the paper's ratio of times without dropout and padding, as here."""
    return published.over(length, published.PLAIN_MS[direction], *pair)


def sparse_faster(runtime: Records) -> Verdict:
    """Returns whether the time falls as tiles are left out."""
    criterion = (
        "medians over rounds, tiled / block-sparse: grows with length and is at least 0.5 / s at "
        "the longest one"
    )
    inverse = lambda g: 1 / attention.live_fraction(g.key, g.first.settings["block"])  # 1 / s
    timed = [g for g in timing.both_timed(runtime, *OVER_SPARSE) if inverse(g) > 1]
    if len(timed) < 2:
        return Verdict(criterion, None, "")
    short, long = timed[0], timed[-1]
    least, most = (timing.gain(g.first, *OVER_SPARSE) for g in (short, long))
    return Verdict(
        criterion,
        most.mean > least.mean and most.mean >= 0.5 * inverse(long),
        f"{format_value(least)} at {short.key}, {format_value(most)} at {long.key} where 1/s is "
        f"{inverse(long):.2f}",
        timing.effect(plain(long.key, FORWARD_BACKWARD, OVER_SPARSE), long.first, *OVER_SPARSE),
    )


def linear_memory(memory: Records, direction: str) -> Verdict:
    """Returns whether memory is linear if tiled and quadratic if standard, in one direction.

    Its effect is standard / tiled at the longest length that the paper has, too.
    """
    dense, tiled = powers = [attention.growth(memory, variant) for variant in OVER_STANDARD]
    effects = []
    for group in by(memory, "length"):
        of_paper = published.over(group.key, published.MEGABYTES.get(direction, {}), *OVER_STANDARD)
        found = ratio(*(attention.outcome(group, v, "temp_bytes") for v in OVER_STANDARD))
        effects += [Effect(of_paper, [found])] if of_paper and found else []
    known = None not in powers
    return Verdict(
        "log-log slope over lengths >= 1024: standard >= 1.8 and tiled <= 1.2",
        dense >= 1.8 and tiled <= 1.2 if known else None,
        f"standard {dense:.2f}, tiled {tiled:.2f}" if known else "",
        effects[-1] if effects else None,
    )


def less_traffic(record: Record | None) -> Verdict:
    """Returns whether tiling saves about as much traffic as in figure 2."""
    criterion = "counted with the A100's on-chip memory, standard / tiled is at least half of that"
    if record is None:
        return Verdict(criterion, None, "")
    saved = record.result["standard_forward_backward"] / record.result["forward_backward"]
    evidence = f"counted {saved:.2f}, published {SAVED:.2f}"
    return Verdict(criterion, saved >= SAVED / 2, evidence, Effect(SAVED, [saved]))


def follows_bound(records: Records) -> Verdict:
    """Returns whether counted traffic has the powers of M (up to Nd), N and s of the bound."""
    on_chip, lengths, sparse = (
        by(records.select(kind=kind), axis)
        for kind, axis in (("io", "on_chip"), ("io_length", "length"), ("io_sparse", "factors"))
    )
    size = lambda g: g.first.settings["length"] * g.first.settings["head_dim"]  # Nd
    moved = lambda g: g.first.result["forward"]
    # Of M where the bound holds; of s without K and V, which are read once.
    bounded = [g for g in on_chip if g.key <= size(g)]
    powers = [log_slope([g.key for g in x], [moved(g) for g in x]) for x in (bounded, lengths)]
    live = [g.first.result["live_fraction"] for g in sparse]
    powers.append(log_slope(live, [moved(g) - 2 * size(g) for g in sparse]))
    criterion = (
        f"powers of counted forward traffic within {SLOPE_ERROR:g} of -1 in M (up to Nd), of 2 in "
        "N, of 1 in s (without K and V, which are read once)"
    )
    if None in powers:
        return Verdict(criterion, None, "")
    return Verdict(
        criterion,
        all(abs(p - bound) <= SLOPE_ERROR for p, bound in zip(powers, (-1, 2, 1), strict=True)),
        "M to the {:.2f}, N to the {:.2f}, s to the {:.2f}".format(*powers),
    )


def equal_curves(curves: Records) -> Verdict:
    """Returns whether both attentions train alike, step by step."""
    gaps = [curve_difference(pair) for pair in attention_pairs(curves)]
    return Verdict(
        f"the losses of every step differ by at most {CURVE_TOLERANCE} nats, each seed",
        c.every(gap <= CURVE_TOLERANCE for gap in gaps),
        f"largest difference {max(gaps):.2g} nats over {len(gaps)} seeds" if gaps else "",
    )


def longer_context(measured: Records, compared: Records) -> Verdict:
    """Returns whether the longest context is better; other positions are evidence alone."""
    gains, evidence = contexts.gains(measured)
    others, told = contexts.gains(compared)
    if others:
        evidence += f"; with {tables.position(compared)} {told}"
    (short, _), (long, _) = published.PERPLEXITY[1024], published.PERPLEXITY[4096]
    return Verdict(
        "with every seed (same batches) the longest context has a lower perplexity than the "
        f"shortest, on average by at least {100 * CONTEXT_GAIN:g}%; this criterion and ALiBi's "
        "positions were chosen after a pilot of seed 0, which is not among these",
        min(gains) > 0 and statistics.fmean(gains) >= CONTEXT_GAIN if gains else None,
        evidence,
        Effect(short / long, [1 / (1 - gain) for gain in gains]) if gains else None,
    )


def longer_documents(groups: list[Group]) -> Verdict:
    """Returns whether more of a document is worth more than seeds differ.

    The effect's published size is the mean over the two sets of documents.
    """
    criterion = (
        "mean micro-F1 of the longest length is above that of the shortest by more than twice the "
        "larger standard deviation over seeds (means, not paired)"
    )
    if len(groups) < 2:
        return Verdict(criterion, None, "")
    short, long = (g.mean_std("test_accuracy", 100) for g in (groups[0], groups[-1]))
    of_paper = statistics.fmean(f1[16384] - f1[512] for f1 in published.F1.values())
    points = [100 * (b - a) for a, b in contexts.by_seed(groups, "test_accuracy").values()]
    return Verdict(
        criterion,
        c.higher_by(long, short, 0.0),
        f"{long.mean - short.mean:+.1f} points from {groups[0].key} to {groups[-1].key} tokens, "
        f"deviation {max(short.std or 0, long.std or 0):.1f}",
        Effect(of_paper, points, "difference"),
    )
