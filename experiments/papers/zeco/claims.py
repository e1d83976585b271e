"""What ZeCO's paper says, as predicates on the records."""

from tilescan.experiments.harness import claims as c
from tilescan.experiments.harness.claims import Claim, claim, judge
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import over
from tilescan.experiments.measurements.exactness import worst
from tilescan.experiments.measurements.sharded_training import PARITY, parity
from tilescan.experiments.measurements.traffic import over_forward
from tilescan.experiments.papers.zeco import tables as t
from tilescan.experiments.papers.zeco.published import TRAINING

EXACT = {"float32": 1e-5, "float64": 1e-12}
MODEL_ERROR = 0.3


def claims(records: Records) -> list[Claim]:
    """Returns what the paper says of exactness, volume, critical path, training, and seconds."""
    scans, traffic = t.scans(records), t.by_devices(records, "traffic")
    ours, theirs = (TRAINING[256][kind] for kind in ("all_scan", "all_gather"))
    return [
        _exact(records),
        _one_state(scans),
        _below_two_states(scans),
        _gather_grows(records, traffic),
        _critical_path(records, scans),
        _chain_steps(traffic),
        _backward_is_a_scan(traffic),
        _less_than_softmax(traffic),
        _converges(records, t.EARLY),
        _converges(records, None),
        _times_follow_counts(records),
        c.not_run(
            "60% faster than LASP-2 on 256 GPUs",
            "ZeCO trains a 1B GLA 60% faster than LASP-2 on 256 GPUs with 8M tokens.",
            "tokens per second, ZeCO / LASP-2, of at least 1.6 on 256 GPUs",
            "accelerator, 256 GPUs",
            f"published: {ours:,} / {theirs:,} = {ours / theirs:.2f}; not run",
        ),
    ]


def _exact(records: Records) -> Claim:
    exact = t.by_devices(records, "exactness").values()
    found = worst((name.split()[0], e) for r in exact for name, e in r.result.items())
    bounds = " and ".join(f"{bound:g} ({dtype})" for dtype, bound in EXACT.items())
    return judge(
        "all schedules are exact",
        "Sequence parallelism of linear attention computes what one device computes.",
        "outputs and gradients of every schedule, decay and number of devices differ by at most "
        f"{bounds} of the largest value",
        all(found[d] <= bound for d, bound in EXACT.items()) if len(found) == 2 else None,
        c.listed(found, "at most {1:.1e} in {0}"),
    )


def _one_state(scans: list[t.Scan]) -> Claim:
    needed = [s.needed for s in scans]
    off = [abs(s.moved - (s.P + s.K - 2) / s.K) for s in scans]
    evidence = ""
    if scans:
        evidence = (
            f"needed {min(needed):g} to {max(needed):g} states in {len(scans)} programs of up to "
            f"{scans[-1].P} devices; moved bytes off the formula by {max(off):g} states"
        )
    return judge(
        "one state a device, however many devices",
        "A device sends one state, whatever the number of devices: the least that is possible.",
        "All-Scan's schedule asks one state of a device for every P and K, and the compiled "
        "program moves (P + K - 2) / K states, dummies in idle ticks included, exactly",
        c.every(states == 1 for states in needed) and c.every(states == 0 for states in off),
        evidence,
        by_construction=True,
    )


def _below_two_states(scans: list[t.Scan]) -> Claim:
    found = {(s.P, s.K): s.moved for s in scans if s.P <= s.K}
    return judge(
        "idle ticks cost less than a state",
        "Communication does not grow with the devices.",
        "with as many blocks as devices or more, a compiled program moves less than two states",
        c.every(moved < 2 for moved in found.values()),
        c.listed(found, "{1:.3g} (P {0[0]}, K {0[1]})"),
        by_construction=True,
    )


def _gather_grows(records: Records, traffic: dict[int, Record]) -> Claim:
    gathered = {P: t.sent_states(r, "all_gather") for P, r in traffic.items()}
    moved = {P: t.sent_states(r, "all_scan") for P, r in traffic.items()}
    moved |= {P: scan.moved for P, scan in t.finest(records).items() if P in moved}
    each = [states / (P - 1) for P, states in gathered.items()]
    parts = [f"{states:.4g} / {moved[P]:.3g} on {P}" for P, states in gathered.items()]
    most = max(traffic, default=0)
    return judge(
        "LASP-2's volume grows with the devices",
        "All-gather sends P times what All-Scan sends.",
        "states that a device sends to have all gathered are proportional to P - 1 within 1%, "
        "so P - 1 times what All-Scan needs",
        c.near(each, each[0], 0.01) if len(each) > 1 else None,
        "gathered / moved by All-Scan at its most blocks: " + ", ".join(parts) if parts else "",
        effect=c.effect_of(most, over(gathered, moved).get(most)),
        by_construction=True,
    )


def _critical_path(records: Records, scans: list[t.Scan]) -> Claim:
    off = [abs(s.ticks - (s.K + s.P - 1)) for s in scans]
    longest = list(t.finest(records).values())[-1:]
    return judge(
        "critical path of 1 + (P - 1) / K states",
        "All-Scan's time is that of a state and of P - 1 blocks.",
        "ticks of the compiled programs / K differ from 1 + (P - 1) / K by at most one block",
        c.every(blocks <= 1 for blocks in off),
        f"off by at most {max(off):.2g} blocks in {len(off)} programs" if off else "",
        effect=next((c.effect_of(s.path, s.ticks / s.K) for s in longest), None),
        by_construction=True,
    )


def _chain_steps(traffic: dict[int, Record]) -> Claim:
    found = {
        P: [r.result[k]["messages"] for k in ("chain", "log_step")] for P, r in traffic.items()
    }
    most = max(traffic, default=0)
    return judge(
        "LASP-1 waits for P - 1 states",
        "In a chain the last device waits for all before it; a log-step scan would need "
        "1 + ceil(log2(P - 1)) messages.",
        "messages of the compiled programs are so many exactly",
        c.every(counts == [P - 1, 1 + (P - 2).bit_length()] for P, counts in found.items()),
        c.listed(found, "{1[0]} and {1[1]} on {0}"),
        effect=c.effect_of(most - 1, *found.get(most, [])[:1]),
        by_construction=True,
    )


def _backward_is_a_scan(traffic: dict[int, Record]) -> Claim:
    ratios = [over_forward(r, kind) for r in traffic.values() for kind in t.KINDS]
    return judge(
        "the backward pass is one scan more",
        "Gradients of states take one All-Scan in the other direction.",
        "with the gradient, programs of every schedule send twice what they send forward, "
        "within 1% (decays are not gathered twice)",
        c.near(ratios, 2, 0.01),
        f"{min(ratios):.3f} to {max(ratios):.3f} times" if ratios else "",
    )


def _less_than_softmax(traffic: dict[int, Record]) -> Claim:
    found = {
        f"{name}, {P}": t.sent_states(r, s) / t.sent_states(r, "all_scan")
        for P, r in traffic.items()
        for s, name in t.SOFTMAX.items()
        if s in r.result
    }
    long = any(r.settings["length"] >= 1024 for r in traffic.values())
    return judge(
        "states are less than keys",
        "Linear attention needs less communication than softmax attention over devices.",
        "ring attention and Ulysses send more than All-Scan moves at every number of devices; "
        "lengths of 1,024 tokens a device or more",
        c.every(share > 1 for share in found.values()) if long else None,
        "times as much: " + c.listed(found, "{1:.3g} ({0})") if found else "",
        needs="cpu",
    )


def _converges(records: Records, steps: int | None) -> Claim:
    found = parity(records, "float64", "schedule", steps)
    name = "all steps" if steps is None else f"{steps} steps"
    criterion = (
        f"with a float64 model (norms, logits and gradients in float32) the losses of {name} are "
        f"within {PARITY:g} of those of one device, for each schedule and seed"
    )
    return claim(
        f"training is the same: {name}",
        "Models train over devices as on one.",
        c.at_most(criterion, {t.KINDS[kind]: error for kind, error in found.items()}, PARITY),
        why="the schedules differ from one device by float32 rounding at first, and this training "
        "multiplies any such difference about tenfold every 12 steps, at a third of the rate too "
        "(tried apart with one seed, not recorded)",
    )


def _times_follow_counts(records: Records) -> Claim:
    errors = {}
    for name, published in t.TIMES.items():
        for kind, times in published.items():
            model = t.modelled(times, t.steps(records, kind))
            for P in list(model)[1:-1]:
                errors[f"{name}, {t.KINDS[kind]}, {P} GPUs"] = abs(model[P] / times[P] - 1)
    worst_of = max(errors, key=errors.get, default="")
    return judge(
        "published seconds follow the counted steps",
        "Times of the three schedules grow as their critical paths do.",
        "a line in the counted steps through the first and last published time is within "
        f"{MODEL_ERROR:.0%} of those between (chosen with both numbers known; no measurement of "
        "this project enters)",
        errors[worst_of] <= MODEL_ERROR if errors else None,
        f"modelled, at most {errors[worst_of]:.0%} off ({worst_of})" if errors else "",
        needs="cpu",
    )
