"""What ZeCO's paper says, as predicates on the records."""

from tilescan.experiments.harness.claims import Claim, at_most, claim, every, judge, near
from tilescan.experiments.harness.records import Records
from tilescan.experiments.measurements.exactness import worst
from tilescan.experiments.measurements.sharded_training import parity
from tilescan.experiments.measurements.traffic import over_forward
from tilescan.experiments.papers.zeco import tables as t
from tilescan.experiments.papers.zeco.published import TRAINING

EXACT = {"float32": 1e-5, "float64": 1e-12}
PARITY = 1e-4
MODEL_ERROR = 0.3


def claims(records: Records) -> list[Claim]:
    """Returns what the paper says of exactness, volume, critical path, training, and seconds."""
    return [
        _exact(records),
        _one_state(records),
        _below_two_states(records),
        _gather_grows(records),
        _critical_path(records),
        _chain_steps(records),
        _backward_is_a_scan(records),
        _less_than_softmax(records),
        _converges(records, t.EARLY),
        _converges(records, None),
        _times_follow_counts(records),
        _faster(),
    ]


def _exact(records: Records) -> Claim:
    found = worst(
        (name.split()[0], errors)
        for r in t.by_devices(records, "exactness")
        for name, errors in r.result.items()
    )
    bounds = " and ".join(f"{bound:g} ({dtype})" for dtype, bound in EXACT.items())
    return judge(
        "all schedules are exact",
        "Sequence parallelism of linear attention computes what one device computes.",
        "outputs and gradients of every schedule, decay and number of devices differ by at most "
        f"{bounds} of the largest value",
        all(found[d] <= bound for d, bound in EXACT.items()) if len(found) == 2 else None,
        ", ".join(f"at most {error:.1e} in {dtype}" for dtype, error in found.items()),
    )


def _scanned(records: Records) -> list[tuple[int, int, int, float, float]]:
    """Returns `tables.scanned` of every program, the fewest devices first."""
    return [t.scanned(r) for r in t.by_devices(records, "blocks")]


def _one_state(records: Records) -> Claim:
    found = _scanned(records)
    needed = [need for *_, need, _ in found]
    off = [moved - (P + K - 2) / K for P, K, *_, moved in found]
    evidence = ""
    if found:
        evidence = (
            f"needed {min(needed):g} to {max(needed):g} states in {len(found)} programs of up to "
            f"{found[-1][0]} devices; moved bytes off the formula by {max(map(abs, off)):g} states"
        )
    return judge(
        "one state a device, however many devices",
        "A device sends one state, whatever the number of devices: the least that is possible.",
        "All-Scan's schedule asks one state of a device for every P and K, and the compiled "
        "program moves (P + K - 2) / K states, dummies in idle ticks included, exactly",
        every(n == 1 and not d for n, d in zip(needed, off, strict=True)),
        evidence,
    )


def _below_two_states(records: Records) -> Claim:
    found = [(P, K, moved) for P, K, *_, moved in _scanned(records) if P <= K]
    return judge(
        "idle ticks cost less than a state",
        "Communication does not grow with the devices.",
        "with as many blocks as devices or more, a compiled program moves less than two states",
        every(moved < 2 for *_, moved in found),
        ", ".join(f"{moved:.3g} (P {P}, K {K})" for P, K, moved in found),
    )


def _gather_grows(records: Records) -> Claim:
    gathered, moved = (
        {r.settings["devices"]: t.sent_states(r, kind) for r in t.by_devices(records, "traffic")}
        for kind in ("all_gather", "all_scan")
    )
    moved |= {P: t.scanned(r)[-1] for P, r in t.finest(records).items() if P in moved}
    each = [n / (P - 1) for P, n in gathered.items()]
    parts = [f"{n:.4g} / {moved[P]:.3g} on {P}" for P, n in gathered.items()]
    return judge(
        "LASP-2's volume grows with the devices",
        "All-gather sends P times what All-Scan sends.",
        "states that a device sends to have all gathered are proportional to P - 1 within 1%, "
        "so P - 1 times what All-Scan needs",
        near(each, each[0], 0.01) if len(each) > 1 else None,
        "gathered / moved by All-Scan at its most blocks: " + ", ".join(parts) if parts else "",
    )


def _critical_path(records: Records) -> Claim:
    off = [abs(ticks - (K + P - 1)) for P, K, ticks, *_ in _scanned(records)]
    return judge(
        "critical path of 1 + (P - 1) / K states",
        "All-Scan's time is that of a state and of P - 1 blocks.",
        "ticks of the compiled programs / K differ from 1 + (P - 1) / K by at most one block",
        every(blocks <= 1 for blocks in off),
        f"off by at most {max(off):.2g} blocks in {len(off)} programs" if off else "",
    )


def _chain_steps(records: Records) -> Claim:
    found = {
        r.settings["devices"]: [r.result[kind]["messages"] for kind in ("chain", "log_step")]
        for r in t.by_devices(records, "traffic")
    }
    return judge(
        "LASP-1 waits for P - 1 states",
        "In a chain the last device waits for all before it; a log-step scan would need "
        "1 + ceil(log2(P - 1)) messages.",
        "messages of the compiled programs are so many exactly",
        every(counts == [P - 1, 1 + (P - 2).bit_length()] for P, counts in found.items()),
        ", ".join(f"{chain} and {log} on {P}" for P, (chain, log) in found.items()),
    )


def _backward_is_a_scan(records: Records) -> Claim:
    traffic = t.by_devices(records, "traffic")
    ratios = [over_forward(r, kind) for r in traffic for kind in t.KINDS]
    return judge(
        "the backward pass is one scan more",
        "Gradients of states take one All-Scan in the other direction.",
        "with the gradient, programs of every schedule send twice what they send forward, "
        "within 1% (decays are not gathered twice)",
        near(ratios, 2, 0.01),
        f"{min(ratios):.3f} to {max(ratios):.3f} times" if ratios else "",
    )


def _less_than_softmax(records: Records) -> Claim:
    traffic = t.by_devices(records, "traffic")
    found = [
        (t.sent_states(r, s) / t.sent_states(r, "all_scan"), f"{name}, {r.settings['devices']}")
        for r in traffic
        for s, name in t.SOFTMAX.items()
        if s in r.result
    ]
    long = any(r.settings["length"] >= 1024 for r in traffic)
    listed = ", ".join(f"{share:.3g} ({name})" for share, name in found)
    return judge(
        "states are less than keys",
        "Linear attention needs less communication than softmax attention over devices.",
        "ring attention and Ulysses send more than All-Scan moves at every number of devices; "
        "lengths of 1,024 tokens a device or more",
        every(share > 1 for share, _ in found) if long else None,
        f"times as much: {listed}" if found else "",
        needs="cpu",
    )


def _converges(records: Records, steps: int | None) -> Claim:
    found = parity(records, "float64", "schedule", steps)
    name = "all steps" if steps is None else f"{steps} steps"
    criterion = (
        f"with a float64 model (norms, logits and gradients in float32) the losses of {name} are "
        f"within {PARITY:g} of those of one device, for each schedule"
    )
    return claim(
        f"training is the same: {name}",
        "Models train over devices as on one.",
        at_most(criterion, {t.KINDS[kind]: error for kind, error in found.items()}, PARITY),
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
        f"{MODEL_ERROR:.0%} of those between",
        errors[worst_of] <= MODEL_ERROR if errors else None,
        f"modelled, at most {errors[worst_of]:.0%} off ({worst_of})" if errors else "",
        needs="cpu",
    )


def _faster() -> Claim:
    ours, theirs = (TRAINING[256][kind] for kind in ("all_scan", "all_gather"))
    return judge(
        "60% faster than LASP-2 on 256 GPUs",
        "ZeCO trains a 1B GLA 60% faster than LASP-2 on 256 GPUs with 8M tokens.",
        "tokens per second, ZeCO / LASP-2, of at least 1.6 on 256 GPUs",
        None,
        f"published: {ours:,} / {theirs:,} = {ours / theirs:.2f}; not run",
        needs="accelerator, 256 GPUs",
    )
