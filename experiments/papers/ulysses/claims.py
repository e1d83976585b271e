"""What Ulysses' paper says, as predicates on the records."""

from tilescan.experiments.harness.claims import Claim, judge
from tilescan.experiments.harness.records import Records
from tilescan.experiments.papers.ulysses import tables as t

EXACT = 1e-5
FORMULA = 0.01
PARITY = 1e-4
# How far tokens of a device may fall when devices are added: growth at least in proportion.
PROPORTIONAL = 0.05


def claims(records: Records) -> list[Claim]:
    """Exactness, volumes and their laws, longest texts, training."""
    return [
        _exact(records),
        *(_volume(records, way) for way in ("ulysses", "megatron_sp")),
        _backward(records),
        _ratio_is_devices(records),
        _constant(records),
        _ten_times(records),
        _longest_grows(records),
        _megatron_is_bounded(records),
        _parity(records),
        judge(
            "2.5 times the throughput",
            "Ulysses trains up to 2.5 times faster than Megatron-SP, at up to 175 TFLOPs a GPU.",
            "tokens per second, Ulysses / Megatron-SP, of at least 2 at some length",
            None,
            "not run",
            needs="accelerator, 32 GPUs",
        ),
    ]


def _exact(records: Records) -> Claim:
    worst = {}
    for r in records.select(kind="exactness"):
        kind = r.settings["attention"]
        worst[kind] = max(worst.get(kind, 0.0), *r.result.values())
    return judge(
        "any attention is exact",
        "Attention of any kind, dense or sparse, fits between the all-to-alls.",
        f"float32 outputs and gradients of every kind and number of devices differ from one "
        f"device's by at most {EXACT:g} of the largest value",
        max(worst.values()) <= EXACT if worst else None,
        ", ".join(f"{t.ATTENTION[kind]} {error:.1e}" for kind, error in worst.items()),
    )


def _volume(records: Records, way: str) -> Claim:
    off = [
        abs(t.sent(r, way) / t.formula(r, way) - 1) for r in t.traffic(records) if way in r.result
    ]
    said = {
        "ulysses": "a link carries 4 N h / P elements a layer, of which (P - 1) / P are sent",
        "megatron_sp": "it is 4 N h: two all-gathers and two reduce-scatters",
    }[way]
    return judge(
        f"volume of {t.WAYS[way]}",
        f"With {t.WAYS[way]} {said}.",
        f"bytes that compiled layers send forward are within {FORMULA:.0%} of the formula for "
        "every length and number of devices",
        max(off) <= FORMULA if off else None,
        f"at most {max(off):.2%} off in {len(off)} programs" if off else "",
    )


def _backward(records: Records) -> Claim:
    found = {
        way: [
            t.sent(r, way, "both") / t.sent(r, way) for r in t.traffic(records) if way in r.result
        ]
        for way in t.WAYS
    }
    mine = found["ulysses"]
    return judge(
        "the backward pass sends as much",
        "The transpose of an all-to-all is an all-to-all.",
        f"both passes of Ulysses send twice the forward pass's bytes within {FORMULA:.0%}",
        all(abs(n / 2 - 1) <= FORMULA for n in mine) if mine else None,
        ", ".join(
            f"{t.WAYS[way]} {min(n):.3g} to {max(n):.3g} times" for way, n in found.items() if n
        ),
    )


def _pairs(records: Records):
    return [
        (r.settings["devices"], t.sent(r, "megatron_sp") / t.sent(r, "ulysses"), r)
        for r in t.traffic(records)
        if {"ulysses", "megatron_sp"} <= set(r.result)
    ]


def _ratio_is_devices(records: Records) -> Claim:
    pairs = _pairs(records)
    return judge(
        "Megatron-SP sends P times as much",
        "Ulysses' volume is that of Megatron-SP divided by the number of devices.",
        f"bytes sent forward, Megatron-SP / Ulysses, are P within {FORMULA:.0%}",
        all(abs(share / P - 1) <= FORMULA for P, share, _ in pairs) if pairs else None,
        ", ".join(f"{share:.4g} on {P}" for P, share in dict((P, s) for P, s, _ in pairs).items()),
    )


def _constant(records: Records) -> Claim:
    found = [r for r in t.weak(records) if {"ulysses", "megatron_sp"} <= set(r.result)]
    holds, evidence = None, ""
    if len(found) > 1:
        P = [r.settings["devices"] for r in found]
        each = [t.sent(r, "ulysses") * n / (n - 1) for r, n in zip(found, P, strict=True)]
        other = [t.sent(r, "megatron_sp") / (n - 1) for r, n in zip(found, P, strict=True)]
        constant = lambda x: max(x) / min(x) - 1 <= FORMULA
        holds = constant(each) and constant(other)
        evidence = ", ".join(
            f"{t.sent(r, 'ulysses') / 2**20:.4g} and {t.sent(r, 'megatron_sp') / 2**20:.4g} MiB "
            f"on {r.settings['devices']}"
            for r in found
        )
    return judge(
        "constant volume when texts grow with the devices",
        "Ulysses' volume stays constant when N and P grow together; Megatron-SP's grows with N.",
        "with the same tokens of a device, Ulysses' bytes over (P - 1) / P and Megatron-SP's over "
        f"P - 1 are constant within {FORMULA:.0%}",
        holds,
        evidence,
    )


def _ten_times(records: Records) -> Claim:
    pairs = _pairs(records)
    most = max((share for _, share, _ in pairs), default=None)
    return judge(
        "more than ten times less communication",
        "Ulysses reduces communication by more than a factor of 10.",
        "bytes sent forward, Megatron-SP / Ulysses, above 10 on 16 devices or more",
        None if most is None or max(P for P, *_ in pairs) < 16 else most > 10,
        f"at most {most:.4g}" if most else "",
        needs="cpu",
    )


def _longest_grows(records: Records) -> Claim:
    found = t.longest(records, "ulysses")
    each = [length / P for P, length in found.items()]
    holds = None
    if len(each) > 1:
        steps = zip(each, each[1:], strict=False)
        holds = all(more >= (1 - PROPORTIONAL) * few for few, more in steps)
    return judge(
        "the longest text grows with the devices",
        "Texts of GPT-1.2B grow in proportion to the devices, to 1M tokens on 64 (Figure 2).",
        "with each step to more devices, tokens of a device in the longest text that fits fall by "
        f"at most {PROPORTIONAL:.0%} (they may grow: weights take less of each device)",
        holds,
        ", ".join(f"{length:,} on {P}" for P, length in found.items()),
    )


def _megatron_is_bounded(records: Records) -> Claim:
    ours, theirs = (t.longest(records, way) for way in ("ulysses", "megatron_sp"))
    both = [P for P in ours if theirs.get(P)]
    holds = None
    if len(both) > 1:
        first, last = both[0], both[-1]
        gain = [ours[P] / theirs[P] for P in (first, last)]
        holds = gain[1] > gain[0] and gain[1] >= 4
    return judge(
        "four times longer texts than Megatron-SP",
        "Ulysses trains on four times longer texts than Megatron-SP.",
        "the longest text that fits, Ulysses / Megatron-SP, is at least 4 on the most devices and "
        "more than on the fewest",
        holds,
        ", ".join(f"{ours[P] / theirs[P]:.3g} on {P}" for P in both),
    )


def _parity(records: Records) -> Claim:
    found, single = t.parity(records, "float64"), t.parity(records, "float32")
    return judge(
        "training is the same",
        "Loss curves with and without Ulysses coincide (Figure 7).",
        f"with a float64 model the losses of all steps are within {PARITY:g} of those of one "
        "device, on every number of devices",
        max(found.values()) <= PARITY if found else None,
        ", ".join(
            [f"{apart:.1e} on {P}" for P, apart in found.items()]
            + [f"{apart:.1e} on {P} in float32" for P, apart in single.items()]
        ),
    )
