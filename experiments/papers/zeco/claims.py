"""What ZeCO's paper says, as predicates on the records."""

from tilescan.experiments.harness.claims import Claim, judge
from tilescan.experiments.harness.records import Records
from tilescan.experiments.papers.zeco import tables as t

EXACT = {"float32": 1e-5, "float64": 1e-12}
PARITY = 1e-4
MODEL_ERROR = 0.3


def claims(records: Records) -> list[Claim]:
    """Exactness, volume, critical path, training; seconds where published ones decide."""
    return [
        _exact(records),
        _one_state(records),
        _below_two_states(records),
        _gather_grows(records),
        _critical_path(records),
        _chain_steps(records),
        _backward_is_a_scan(records),
        _less_than_softmax(records),
        _parity(records, t.EARLY),
        _parity(records, None),
        _times_follow_counts(records),
        judge(
            "60% faster than LASP-2 on 256 GPUs",
            "ZeCO trains a 1B GLA 60% faster than LASP-2 on 256 GPUs with 8M tokens.",
            "tokens per second, ZeCO / LASP-2, of at least 1.6 on 256 GPUs",
            None,
            "published: 40,967 / 25,402 = 1.61; not run",
            needs="accelerator, 256 GPUs",
        ),
    ]


def _exact(records: Records) -> Claim:
    worst = {}
    for record in t.by_devices(records, "exactness"):
        for name, found in record.result.items():
            dtype = name.split()[0]
            errors = [error for kind in found.values() for error in kind.values()]
            worst[dtype] = max(worst.get(dtype, 0.0), *errors)
    return judge(
        "all schedules are exact",
        "Sequence parallelism of linear attention computes what one device computes.",
        "outputs and gradients of every schedule, decay and number of devices differ by at most "
        + " and ".join(f"{bound:g} ({dtype})" for dtype, bound in EXACT.items())
        + " of the largest value",
        all(worst[d] <= bound for d, bound in EXACT.items()) if len(worst) == 2 else None,
        ", ".join(f"at most {error:.1e} in {dtype}" for dtype, error in worst.items()),
    )


def _one_state(records: Records) -> Claim:
    found = t.by_devices(records, "blocks")
    needed = [r.result["useful_bytes"] / r.result["state_bytes"] for r in found]
    overhead = [
        r.result["bytes"] / r.result["state_bytes"]
        - (r.settings["devices"] + r.settings["blocks"] - 2) / r.settings["blocks"]
        for r in found
    ]
    return judge(
        "one state a device, however many devices",
        "A device sends one state, whatever the number of devices: the least that is possible.",
        "All-Scan's schedule asks one state of a device for every P and K, and the compiled "
        "program moves (P + K - 2) / K states, dummies in idle ticks included, exactly",
        all(n == 1 for n in needed) and not any(overhead) if found else None,
        f"needed {min(needed):g} to {max(needed):g} states in {len(found)} programs of up to "
        f"{found[-1].settings['devices']} devices; moved bytes off the formula by "
        f"{max(map(abs, overhead)):g} states"
        if found
        else "",
    )


def _below_two_states(records: Records) -> Claim:
    found = [
        (r.settings["devices"], r.settings["blocks"], r.result["bytes"] / r.result["state_bytes"])
        for r in t.by_devices(records, "blocks")
        if r.settings["devices"] <= r.settings["blocks"]
    ]
    return judge(
        "idle ticks cost less than a state",
        "Communication does not grow with the devices.",
        "with as many blocks as devices or more, a compiled program moves less than two states",
        all(moved < 2 for *_, moved in found) if found else None,
        ", ".join(f"{moved:.3g} (P {P}, K {K})" for P, K, moved in found),
    )


def _gather_grows(records: Records) -> Claim:
    gathered, scanned = (
        {r.settings["devices"]: t.sent_states(r, kind) for r in t.by_devices(records, "traffic")}
        for kind in ("all_gather", "all_scan")
    )
    finest = {r.settings["devices"]: r for r in t.finest(records)}
    first = next(iter(gathered), None)
    unit = gathered[first] / (first - 1) if first else None
    holds = None
    if len(gathered) > 1:
        holds = all(abs(n / (P - 1) / unit - 1) < 0.01 for P, n in gathered.items())
    parts = []
    for P, n in gathered.items():
        moved = scanned[P]
        if P in finest:
            moved = finest[P].result["bytes"] / finest[P].result["state_bytes"]
        parts.append(f"{n:.4g} / {moved:.3g} on {P}")
    return judge(
        "LASP-2's volume grows with the devices",
        "All-gather sends P times what All-Scan sends.",
        "states that a device sends to have all gathered are proportional to P - 1 within 1%, so "
        "P - 1 times what All-Scan needs",
        holds,
        "gathered / moved by All-Scan at its most blocks: " + ", ".join(parts) if parts else "",
    )


def _critical_path(records: Records) -> Claim:
    found = [
        (r.settings["devices"], r.settings["blocks"], r.result["messages"])
        for r in t.by_devices(records, "blocks")
    ]
    off = [abs(ticks / K - (1 + (P - 1) / K)) * K for P, K, ticks in found]
    return judge(
        "critical path of 1 + (P - 1) / K states",
        "All-Scan's time is that of a state and of P - 1 blocks.",
        "ticks of the compiled programs / K differ from 1 + (P - 1) / K by at most one block",
        max(off) <= 1 + 1e-9 if found else None,
        f"off by at most {max(off):.2g} blocks in {len(found)} programs" if found else "",
    )


def _chain_steps(records: Records) -> Claim:
    found = {
        r.settings["devices"]: [r.result[kind]["messages"] for kind in ("chain", "log_step")]
        for r in t.by_devices(records, "traffic")
    }
    expected = lambda P: [P - 1, 1 + (P - 2).bit_length()]
    return judge(
        "LASP-1 waits for P - 1 states",
        "In a chain the last device waits for all before it; a log-step scan would need "
        "1 + ceil(log2(P - 1)) messages.",
        "messages of the compiled programs are so many exactly",
        all(counts == expected(P) for P, counts in found.items()) if found else None,
        ", ".join(f"{chain} and {log} on {P}" for P, (chain, log) in found.items()),
    )


def _backward_is_a_scan(records: Records) -> Claim:
    ratios = [
        t.sent_states(r, kind, "both") / t.sent_states(r, kind)
        for r in t.by_devices(records, "traffic")
        for kind in t.KINDS
    ]
    return judge(
        "the backward pass is one scan more",
        "Gradients of states take one All-Scan in the other direction.",
        "with the gradient, programs of every schedule send twice what they send forward, within "
        "1% (decays are not gathered twice)",
        all(abs(n / 2 - 1) < 0.01 for n in ratios) if ratios else None,
        f"{min(ratios):.3f} to {max(ratios):.3f} times" if ratios else "",
    )


def _less_than_softmax(records: Records) -> Claim:
    found = []
    for r in t.by_devices(records, "traffic"):
        for way, name in t.SOFTMAX.items():
            if way in r.result:
                share = t.sent_states(r, way) / t.sent_states(r, "all_scan")
                found.append((share, f"{share:.3g} ({name}, {r.settings['devices']})"))
    longest = [r for r in t.by_devices(records, "traffic") if r.settings["length"] >= 1024]
    return judge(
        "states are less than keys",
        "Linear attention needs less communication than softmax attention over devices.",
        "ring attention and Ulysses send more than All-Scan moves at every number of devices; "
        "lengths of 1,024 tokens a device or more",
        all(share > 1 for share, _ in found) if found and longest else None,
        "times as much: " + ", ".join(text for _, text in found) if found else "",
        needs="cpu",
    )


def _parity(records: Records, steps: int | None) -> Claim:
    found = t.parity(records, "float64", steps)
    name = "all steps" if steps is None else f"{steps} steps"
    return judge(
        f"training is the same: {name}",
        "Models train over devices as on one.",
        f"with a float64 model (norms, logits and gradients in float32) the losses of {name} are "
        f"within {PARITY:g} of those of one device, for each schedule",
        max(found.values()) <= PARITY if found else None,
        ", ".join(f"{t.KINDS[kind]} {apart:.1e}" for kind, apart in found.items()),
    )


def _times_follow_counts(records: Records) -> Claim:
    errors = {}
    for name, published in (
        ("primitive", t.PUBLISHED_PRIMITIVE),
        ("operator", t.PUBLISHED_OPERATOR),
    ):
        for kind, times in published.items():
            model = t.modelled(times, t.steps(records, kind))
            for P in list(model)[1:-1]:
                errors[f"{name}, {t.KINDS[kind]}, {P} GPUs"] = abs(model[P] / times[P] - 1)
    worst = max(errors, key=errors.get, default="")
    return judge(
        "published seconds follow the counted steps",
        "Times of the three schedules grow as their critical paths do.",
        f"a line in the counted steps through the first and last published time is within "
        f"{MODEL_ERROR:.0%} of those between",
        errors[worst] <= MODEL_ERROR if errors else None,
        f"modelled, at most {errors[worst]:.0%} off ({worst})" if errors else "",
        needs="cpu",
    )
