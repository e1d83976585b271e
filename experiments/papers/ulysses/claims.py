"""What Ulysses' paper says, as predicates on the records."""

from tilescan.experiments.harness import claims as c
from tilescan.experiments.harness.claims import Claim, claim, judge
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import over, ratio
from tilescan.experiments.harness.tables import RECALLED
from tilescan.experiments.measurements.exactness import worst
from tilescan.experiments.measurements.sharded_training import same_losses
from tilescan.experiments.measurements.traffic import over_forward, sent_bytes
from tilescan.experiments.papers.ulysses import tables as t
from tilescan.experiments.papers.ulysses.published import LONGEST

EXACT = 1e-5
FORMULA = 0.01
# How far tokens of a device may drift over all numbers of devices and still be proportional.
PROPORTIONAL = 0.25


def claims(records: Records) -> list[Claim]:
    """Returns what the paper says of exactness, volumes, longest sequences, and training."""
    exact = records.select(kind="exactness")
    found = worst((t.ATTENTION[r.settings["attention"]], r.result) for r in exact)
    criterion = (
        "float32 outputs and gradients of every kind and number of devices differ from one "
        f"device's by at most {EXACT:g} of the largest value"
    )
    says = "Attention of any kind, dense or sparse, fits between the all-to-alls."
    return [
        claim("any attention is exact", says, c.at_most(criterion, found, EXACT)),
        _volume(
            records,
            t.ULYSSES,
            "a link carries 4 N h / P elements a layer, of which (P - 1) / P are sent",
        ),
        _volume(records, t.MEGATRON, "it is 4 N h: two all-gathers and two reduce-scatters"),
        _backward(records),
        *_times_as_much(records),
        *_longest(records),
        claim(
            "training is the same",
            "Loss curves with and without Ulysses coincide (Figure 7).",
            same_losses(records),
        ),
        c.not_run(
            "2.5 times the throughput",
            "Ulysses trains up to 2.5 times faster than Megatron-SP, at up to 175 TFLOPs a GPU.",
            "tokens per second, Ulysses / Megatron-SP, of at least 2 at some length",
            needs="accelerator, 32 GPUs",
        ),
    ]


def _volume(records: Records, strategy: str, says: str) -> Claim:
    found = [g.first for g in t.traffic(records) if strategy in g.first.result]
    shares = [sent_bytes(r, strategy) / t.formula(r, strategy) for r in found]
    off = max((abs(share - 1) for share in shares), default=0.0)
    return judge(
        f"volume of {t.NAMES[strategy]}",
        f"With {t.NAMES[strategy]} {says}.",
        f"bytes that compiled layers send forward are within {FORMULA:.0%} of the formula for "
        "every length and number of devices",
        c.near(shares, 1, FORMULA),
        f"at most {off:.2%} off in {len(shares)} programs" if shares else "",
        by_construction=True,
    )


def _backward(records: Records) -> Claim:
    found = {
        s: [over_forward(g.first, s) for g in t.traffic(records) if s in g.first.result]
        for s in t.NAMES
    }
    ranges = [f"{t.NAMES[s]} {min(n):.3g} to {max(n):.3g} times" for s, n in found.items() if n]
    return judge(
        "the backward pass sends as much",
        "The transpose of an all-to-all is an all-to-all.",
        f"both passes of Ulysses send twice the forward pass's bytes within {FORMULA:.0%}",
        c.near(found[t.ULYSSES], 2, FORMULA),
        ", ".join(ranges),
    )


def _times_as_much(records: Records) -> list[Claim]:
    """Returns the claims of what Megatron-SP sends over what Ulysses sends."""
    # All lengths of some devices agree, or the first claim fails.
    pairs = [(g.key[0], t.over_ulysses(g.first)) for g in t.traffic(records)]
    pairs = [(P, share) for P, share in pairs if share is not None]
    most = max((share for _, share in pairs), default=None)
    many, shares = any(P >= 16 for P, _ in pairs), dict(pairs)

    # Of as many tokens of a device.
    found = {P: r for P, r in t.weak(records).items() if t.over_ulysses(r) is not None}
    sent = {P: [sent_bytes(r, s) for s in (t.ULYSSES, t.MEGATRON)] for P, r in found.items()}
    scaled = [(ours * P / (P - 1), theirs / (P - 1)) for P, (ours, theirs) in sent.items()]
    both = zip(*scaled, strict=True)
    mib = [f"{a / t.MIB:.4g} and {b / t.MIB:.4g} MiB on {P}" for P, (a, b) in sent.items()]
    enough = len(found) > 1
    return [
        judge(
            "Megatron-SP sends P times as much",
            "Ulysses' volume is that of Megatron-SP divided by the number of devices.",
            f"bytes sent forward, Megatron-SP / Ulysses, are P within {FORMULA:.0%}",
            c.near((share / P for P, share in pairs), 1, FORMULA),
            c.listed(shares, "{1:.4g} on {0}"),
            effect=c.effect_of(max(shares), shares[max(shares)]) if shares else None,
            by_construction=True,
        ),
        judge(
            "constant volume when sequences grow with the devices",
            "Ulysses' volume stays constant when N and P grow together; Megatron-SP's grows with "
            "N.",
            "with the same tokens of a device, Ulysses' bytes over (P - 1) / P and Megatron-SP's "
            f"over P - 1 are constant within {FORMULA:.0%}",
            c.every(max(x) / min(x) - 1 <= FORMULA for x in both) if enough else None,
            ", ".join(mib) if enough else "",
            by_construction=True,
        ),
        judge(
            "more than ten times less communication",
            "Ulysses reduces communication by more than a factor of 10.",
            "bytes sent forward, Megatron-SP / Ulysses, above 10 on 16 devices or more",
            most > 10 if many else None,
            f"at most {most:.4g}" if most else "",
            needs="cpu",
            effect=c.effect_of(10, most) if many else None,
            by_construction=True,
        ),
    ]


def _longest(records: Records) -> list[Claim]:
    ours, theirs = (t.longest(records, strategy) for strategy in (t.ULYSSES, t.MEGATRON))
    each = [length / P for P, length in ours.items() if P > 1]
    drift = max(each) / min(each) - 1 if len(each) > 1 else None
    times = over(ours, theirs)
    gain = list(times.values())
    return [
        judge(
            "the longest sequence grows with the devices",
            "Sequences of GPT-1.2B grow in proportion to the devices, to 1M tokens on 64 "
            "(Figure 2).",
            "on two devices or more, tokens of a device in the longest sequence that fits vary by "
            f"at most {PROPORTIONAL:.0%}",
            None if drift is None else drift <= PROPORTIONAL,
            c.listed(ours, "{1:,} on {0}") + ("" if drift is None else f": by {drift:.1%}"),
            why="they grow by more than in proportion, as weights take less of each device where "
            "there are more",
            source=RECALLED,
            effect=c.effect_of(LONGEST[64] / LONGEST[1], ratio(ours.get(64), ours.get(1))),
        ),
        judge(
            "four times longer sequences than Megatron-SP",
            "Ulysses trains on four times longer sequences than Megatron-SP (published of sparse "
            "models of 7B and 30B; here of a dense one of 1.2B).",
            "the longest sequence that fits, Ulysses / Megatron-SP, is at least 4 on the most "
            "devices and more than on the fewest",
            gain[-1] >= 4 and gain[-1] > gain[0] if len(gain) > 1 else None,
            c.listed(times, "{1:.3g} on {0}"),
            effect=c.effect_of(4, *gain[-1:]),
        ),
    ]
