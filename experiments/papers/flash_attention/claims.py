"""What FlashAttention's paper says of exactness, speed, memory, traffic and longer contexts."""

from tilescan.experiments.harness.claims import Claim, Verdict, claim, every, higher_by, not_run
from tilescan.experiments.harness.groups import by
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import log_slope
from tilescan.experiments.harness.tables import format_value
from tilescan.experiments.measurements import attention
from tilescan.experiments.papers.flash_attention import tables
from tilescan.experiments.papers.flash_attention.exactness import OUTPUTS, STANDARD
from tilescan.experiments.papers.flash_attention.published import GIGABYTES

# Smallest accepted standard / tiled at the longest common length. On an A100 it is 3.3.
FASTER = {attention.FORWARD: 1.5, attention.FORWARD_BACKWARD: 1.2}
FLOAT32_BOUND = 2e-6  # relative to the largest value
BFLOAT16_BOUND = 2.0  # times the error of standard attention in bfloat16
SLOPE_ERROR = 0.1  # largest accepted distance of a measured power from that of the bound
CONTEXT_GAIN = 0.01  # of the perplexity: smallest accepted gain of the longest context
CURVE_TOLERANCE = 0.01  # nats: largest accepted difference of two training curves


def claims(records: Records) -> list[Claim]:
    """Returns the paper's statements, and those that need more than one machine."""
    runtime, memory = (records.select(kind=kind) for kind in ("runtime", "memory"))
    return [
        *(
            claim(
                f"faster, {tables.TITLES[direction]}",
                "Tiled attention is faster than standard attention on long sequences (Table 11: "
                "3.3 times at 4096).",
                faster(runtime.select(direction=direction), FASTER[direction]),
            )
            for direction in attention.DIRECTIONS
        ),
        claim(
            "block-sparse",
            "Block-sparse attention's time falls with the live fraction s of its tiles (Table 11: "
            "9.1 times at 4096, 146 times at 64k).",
            sparse_faster(runtime.select(direction=attention.FORWARD_BACKWARD)),
        ),
        *(
            claim(
                f"linear memory, {tables.TITLES[direction]}",
                "Tiled attention needs memory linear in the length, standard attention quadratic.",
                linear_memory(memory.select(direction=direction)),
            )
            for direction in attention.DIRECTIONS
        ),
        claim(
            "exact attention",
            "Tiled attention computes the same function as standard attention (theorem 1).",
            exact(records.select(kind="exactness")),
        ),
        claim(
            "less traffic",
            f"Tiling moves {GIGABYTES[0] / GIGABYTES[1]:.1f} times fewer bytes between HBM and "
            "chip (Figure 2).",
            less_traffic(records.select(kind="io")),
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
            longer_documents(records.select(kind="documents")),
        ),
        not_run(
            "BERT training time",
            "BERT-large trains to 72.0% masked accuracy in 17.4 ± 1.4 minutes, the MLPerf 1.1 "
            "record took 20.0 ± 1.5 (Table 1).",
            "time to 72.0% on 8 A100s",
            needs="8 A100s and MLPerf's Wikipedia",
        ),
        not_run(
            "GPT-2 training time",
            "GPT-2 small trains 3.5 times faster than with HuggingFace's attention at the same "
            "perplexity 18.2, GPT-2 medium 3.0 times at 14.2 (Table 2).",
            "time to 400k steps on OpenWebText, 8 GPUs",
            needs="8 GPUs and OpenWebText",
        ),
        not_run(
            "Long-Range Arena",
            "2.4 times faster than the Transformer at an average of 59.8 against 59.3, 2.8 times "
            "at 59.6 if block-sparse (Table 3).",
            "accuracy on the five tasks and training time on one GPU",
            needs="a GPU and the five tasks' data",
        ),
        not_run(
            "Path-X and Path-256",
            "First Transformer above chance: 61.4% on Path-X; block-sparse 56.0% there and 63.1% "
            "on Path-256 (Table 6).",
            "accuracy above 50% at lengths of 16k and 64k",
            needs="weeks of one GPU and Pathfinder's images",
        ),
    ]


def faster(runtime: Records, bar: float) -> Verdict:
    """Returns whether tiled attention is faster than standard attention, in one direction."""
    gains = {g.key: tables.gain(g, "standard", "tiled") for g in by(runtime, "length")}
    longest = max((n for n, found in gains.items() if found), default=None)
    return Verdict(
        f"standard / tiled >= {bar} at the longest length that both ran",
        None if longest is None else gains[longest].mean >= bar,
        "" if longest is None else f"{format_value(gains[longest])} at length {longest}",
    )


def sparse_faster(runtime: Records) -> Verdict:
    """Returns whether the time falls as tiles are left out."""
    points = [
        (
            g.key,
            tables.gain(g, "tiled", "block_sparse"),
            attention.live_fraction(g.key, g.first.settings["block"]),
        )
        for g in by(runtime, "length")
    ]
    points = [(n, found, 1 / live) for n, found, live in points if found and live < 1]
    holds, evidence = None, ""
    if len(points) > 1:
        (short, least, _), (long, most, ideal) = points[0], points[-1]
        holds = most.mean > least.mean and most.mean >= 0.5 * ideal
        evidence = (
            f"{format_value(least)} at {short}, {format_value(most)} at {long} where 1/s is "
            f"{ideal:.2f}"
        )
    return Verdict(
        "tiled / block-sparse grows with length and is at least 0.5 / s at the longest one",
        holds,
        evidence,
    )


def linear_memory(memory: Records) -> Verdict:
    """Returns whether memory is linear if tiled and quadratic if standard, in one direction."""
    dense, tiled = (tables.growth(memory, variant) for variant in ("standard", "tiled"))
    known = dense is not None and tiled is not None
    return Verdict(
        "log-log slope over lengths >= 1024: standard >= 1.8 and tiled <= 1.2",
        dense >= 1.8 and tiled <= 1.2 if known else None,
        f"standard {dense:.2f}, tiled {tiled:.2f}" if known else "",
    )


def exact(found: Records) -> Verdict:
    """Returns whether errors of tiled attention are those of rounding."""
    single, half = (_worst(found.select(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    known = bool(single and half)
    return Verdict(
        f"outputs and gradients, every mask and tile: float32 within {FLOAT32_BOUND:g} of float64, "
        f"bfloat16 within {BFLOAT16_BOUND:g} times the error of standard attention",
        single[0] <= FLOAT32_BOUND and half[1] <= BFLOAT16_BOUND if known else None,
        f"float32 {single[0]:.2g}, bfloat16 {half[1]:.2f} times" if known else "",
    )


def _worst(found: Records) -> tuple[float, float] | None:
    """Returns the largest error of one dtype, and the largest ratio to the standard one."""
    pairs = [
        (error[output], record.result[f"{STANDARD}, none"][output])
        for record in found
        for name, tiles in tables.by_implementation(record).items()
        if name != STANDARD
        for error in tiles.values()
        for output in OUTPUTS
    ]
    return (max(a for a, _ in pairs), max(a / b for a, b in pairs)) if pairs else None


def less_traffic(on_chip: Records) -> Verdict:
    """Returns whether tiling saves about as much traffic as in figure 2."""
    record, paper = on_chip.one(**tables.PAPER_IO), GIGABYTES[0] / GIGABYTES[1]
    holds, evidence = None, ""
    if record:
        saved = record.result["standard_forward_backward"] / record.result["forward_backward"]
        holds, evidence = saved >= paper / 2, f"counted {saved:.2f}, published {paper:.2f}"
    return Verdict(
        "counted with the A100's on-chip memory, standard / tiled is at least half of that",
        holds,
        evidence,
    )


def follows_bound(records: Records) -> Verdict:
    """Returns whether counted traffic has the powers of M (up to Nd), N and s of the bound."""
    small = [
        r
        for r in records.select(kind="io")
        if r.settings["on_chip"] <= r.settings["length"] * r.settings["head_dim"]
    ]
    by_memory, by_length = (
        by(Records(small), "on_chip"),
        by(records.select(kind="io_length"), "length"),
    )
    sparse = [g.first for g in by(records.select(kind="io_sparse"), "factors")]
    once = [2 * r.settings["length"] * r.settings["head_dim"] for r in sparse]  # K and V
    moved = [r.result["forward"] - n for r, n in zip(sparse, once, strict=True)]
    powers = [
        log_slope([g.key for g in groups], [g.first.result["forward"] for g in groups])
        for groups in (by_memory, by_length)
    ]
    powers.append(log_slope([r.result["live_fraction"] for r in sparse], moved))
    holds, evidence = None, ""
    if None not in powers:
        pairs = zip(powers, (-1, 2, 1), strict=True)
        holds = all(abs(power - bound) <= SLOPE_ERROR for power, bound in pairs)
        evidence = "M to the {:.2f}, N to the {:.2f}, s to the {:.2f}".format(*powers)
    return Verdict(
        f"powers of counted forward traffic within {SLOPE_ERROR:g} of -1 in M (up to Nd), of 2 in "
        "N, of 1 in s (without K and V, which are read once)",
        holds,
        evidence,
    )


def equal_curves(curves: Records) -> Verdict:
    """Returns whether both attentions train alike, step by step."""
    gaps = [tables.curve_difference(pair) for pair in tables.curve_pairs(curves)]
    return Verdict(
        f"the losses of every step differ by at most {CURVE_TOLERANCE} nats, each seed",
        every(gap <= CURVE_TOLERANCE for gap in gaps),
        f"largest difference {max(gaps):.2g} nats over {len(gaps)} seeds" if gaps else "",
    )


def longer_context(measured: Records, compared: Records) -> Verdict:
    """Returns whether the longest context is better; other positions are told of, no more."""
    gains, evidence = _context_gains(measured)
    others, told = _context_gains(compared)
    if others:
        evidence += f"; with {tables.position(compared)} {told}"
    return Verdict(
        "with every seed (same batches) the longest context has a lower perplexity than the "
        f"shortest, on average by at least {100 * CONTEXT_GAIN:g}%; this criterion and ALiBi's "
        "positions were chosen after a pilot of seed 0, which is not among these",
        min(gains) > 0 and sum(gains) / len(gains) >= CONTEXT_GAIN if gains else None,
        evidence,
    )


def _context_gains(found: Records) -> tuple[list[float], str]:
    """Returns the gain of the longest over the shortest context for each seed, also in words."""
    groups = by(found, "context")
    if len(groups) < 2:
        return [], ""
    ends = groups[0], groups[-1]
    short, long = ({r.seed: r.result["test_perplexity"] for r in g.records} for g in ends)
    gains = {seed: 1 - long[seed] / short[seed] for seed in sorted(short) if seed in long}
    listed = ", ".join(f"{-100 * gain:+.1f}% (seed {seed})" for seed, gain in gains.items())
    return list(gains.values()), f"{listed} from {ends[0].key} to {ends[1].key} tokens"


def longer_documents(documents: Records) -> Verdict:
    """Returns whether more of a document is worth more than seeds are apart."""
    groups = by(documents, "length")
    holds, evidence = None, ""
    if len(groups) > 1:
        short, long = (g.mean_std("test_accuracy") for g in (groups[0], groups[-1]))
        change, noise = 100 * (long.mean - short.mean), 100 * max(short.std or 0, long.std or 0)
        holds = higher_by(long, short, 0.0)
        evidence = (
            f"{change:+.1f} points from {groups[0].key} to {groups[-1].key} tokens, "
            f"deviation {noise:.1f}"
        )
    return Verdict(
        "mean micro-F1 of the longest length is above that of the shortest by more than twice the "
        "larger standard deviation over seeds",
        holds,
        evidence,
    )
