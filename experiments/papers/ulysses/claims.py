"""What Ulysses' paper says, as predicates on the records."""

import itertools

from tilescan.experiments.harness.claims import Claim, at_most, claim, every, judge, near, not_run
from tilescan.experiments.harness.records import Records
from tilescan.experiments.measurements.exactness import worst
from tilescan.experiments.measurements.sharded_training import parity
from tilescan.experiments.measurements.traffic import over_forward, sent_bytes
from tilescan.experiments.papers.ulysses import tables as t

EXACT = 1e-5
FORMULA = 0.01
PARITY = 1e-4
# How far tokens of a device may fall when devices are added: growth at least in proportion.
PROPORTIONAL = 0.05


def claims(records: Records) -> list[Claim]:
    """Returns what the paper says of exactness, volumes, longest sequences, and training."""
    return [
        _exact(records),
        _volume(
            records,
            t.ULYSSES,
            "a link carries 4 N h / P elements a layer, of which (P - 1) / P are sent",
        ),
        _volume(records, t.MEGATRON, "it is 4 N h: two all-gathers and two reduce-scatters"),
        _backward(records),
        _ratio_is_devices(records),
        _constant(records),
        _ten_times(records),
        _longest_grows(records),
        _megatron_is_bounded(records),
        _converges(records),
        not_run(
            "2.5 times the throughput",
            "Ulysses trains up to 2.5 times faster than Megatron-SP, at up to 175 TFLOPs a GPU.",
            "tokens per second, Ulysses / Megatron-SP, of at least 2 at some length",
            needs="accelerator, 32 GPUs",
        ),
    ]


def _exact(records: Records) -> Claim:
    found = worst(
        (t.ATTENTION[r.settings["attention"]], r.result) for r in records.select(kind="exactness")
    )
    criterion = (
        "float32 outputs and gradients of every kind and number of devices differ from one "
        f"device's by at most {EXACT:g} of the largest value"
    )
    says = "Attention of any kind, dense or sparse, fits between the all-to-alls."
    return claim("any attention is exact", says, at_most(criterion, found, EXACT))


def _volume(records: Records, strategy: str, says: str) -> Claim:
    found = [g.first for g in t.traffic(records) if strategy in g.first.result]
    shares = [sent_bytes(r, strategy) / t.formula(r, strategy) for r in found]
    off = max((abs(share - 1) for share in shares), default=0.0)
    return judge(
        f"volume of {t.NAMES[strategy]}",
        f"With {t.NAMES[strategy]} {says}.",
        f"bytes that compiled layers send forward are within {FORMULA:.0%} of the formula for "
        "every length and number of devices",
        near(shares, 1, FORMULA),
        f"at most {off:.2%} off in {len(shares)} programs" if shares else "",
    )


def _backward(records: Records) -> Claim:
    found = {
        s: [over_forward(g.first, s) for g in t.traffic(records) if s in g.first.result]
        for s in t.NAMES
    }
    return judge(
        "the backward pass sends as much",
        "The transpose of an all-to-all is an all-to-all.",
        f"both passes of Ulysses send twice the forward pass's bytes within {FORMULA:.0%}",
        near(found[t.ULYSSES], 2, FORMULA),
        ", ".join(
            f"{t.NAMES[s]} {min(n):.3g} to {max(n):.3g} times" for s, n in found.items() if n
        ),
    )


def _shares(records: Records) -> list[tuple[int, float]]:
    """Returns (devices, what Megatron-SP sends over what Ulysses sends)."""
    pairs = [(g.key[0], t.over_ulysses(g.first)) for g in t.traffic(records)]
    return [(P, share) for P, share in pairs if share is not None]


def _ratio_is_devices(records: Records) -> Claim:
    shares = _shares(records)
    return judge(
        "Megatron-SP sends P times as much",
        "Ulysses' volume is that of Megatron-SP divided by the number of devices.",
        f"bytes sent forward, Megatron-SP / Ulysses, are P within {FORMULA:.0%}",
        near((share / P for P, share in shares), 1, FORMULA),
        ", ".join(f"{share:.4g} on {P}" for P, share in dict(shares).items()),
    )


def _constant(records: Records) -> Claim:
    found = [r for r in t.weak(records) if t.over_ulysses(r) is not None]
    P = [r.settings["devices"] for r in found]
    ours, theirs = ([sent_bytes(r, s) for r in found] for s in (t.ULYSSES, t.MEGATRON))
    each = [sent * n / (n - 1) for n, sent in zip(P, ours, strict=True)]
    other = [sent / (n - 1) for n, sent in zip(P, theirs, strict=True)]
    mib = zip(P, ours, theirs, strict=True)
    parts = [f"{a / t.MIB:.4g} and {b / t.MIB:.4g} MiB on {n}" for n, a, b in mib]
    enough = len(found) > 1
    return judge(
        "constant volume when texts grow with the devices",
        "Ulysses' volume stays constant when N and P grow together; Megatron-SP's grows with N.",
        "with the same tokens of a device, Ulysses' bytes over (P - 1) / P and Megatron-SP's "
        f"over P - 1 are constant within {FORMULA:.0%}",
        all(max(x) / min(x) - 1 <= FORMULA for x in (each, other)) if enough else None,
        ", ".join(parts) if enough else "",
    )


def _ten_times(records: Records) -> Claim:
    shares = _shares(records)
    most = max((share for _, share in shares), default=None)
    many = any(P >= 16 for P, _ in shares)
    return judge(
        "more than ten times less communication",
        "Ulysses reduces communication by more than a factor of 10.",
        "bytes sent forward, Megatron-SP / Ulysses, above 10 on 16 devices or more",
        most > 10 if many else None,
        f"at most {most:.4g}" if most else "",
        needs="cpu",
    )


def _longest_grows(records: Records) -> Claim:
    found = t.longest(records, t.ULYSSES)
    each = [length / P for P, length in found.items()]
    steps = itertools.pairwise(each)
    return judge(
        "the longest text grows with the devices",
        "Texts of GPT-1.2B grow in proportion to the devices, to 1M tokens on 64 (Figure 2).",
        "with each step to more devices, tokens of a device in the longest text that fits fall "
        f"by at most {PROPORTIONAL:.0%} (they may grow: weights take less of each device)",
        every(more >= (1 - PROPORTIONAL) * fewer for fewer, more in steps),
        ", ".join(f"{length:,} on {P}" for P, length in found.items()),
    )


def _megatron_is_bounded(records: Records) -> Claim:
    ours, theirs = (t.longest(records, strategy) for strategy in (t.ULYSSES, t.MEGATRON))
    gain = {P: ours[P] / theirs[P] for P in ours if theirs.get(P)}
    values = list(gain.values())
    return judge(
        "four times longer texts than Megatron-SP",
        "Ulysses trains on four times longer texts than Megatron-SP.",
        "the longest text that fits, Ulysses / Megatron-SP, is at least 4 on the most devices "
        "and more than on the fewest",
        values[-1] >= 4 and values[-1] > values[0] if len(values) > 1 else None,
        ", ".join(f"{value:.3g} on {P}" for P, value in gain.items()),
    )


def _converges(records: Records) -> Claim:
    found, single = (parity(records, dtype) for dtype in ("float64", "float32"))
    evidence = [f"{error:.1e} on {P}" for P, error in found.items()]
    evidence += [f"{error:.1e} on {P} in float32" for P, error in single.items()]
    return judge(
        "training is the same",
        "Loss curves with and without Ulysses coincide (Figure 7).",
        f"with a float64 model the losses of all steps are within {PARITY:g} of those of one "
        "device, on every number of devices",
        every(error <= PARITY for error in found.values()),
        ", ".join(evidence),
    )
