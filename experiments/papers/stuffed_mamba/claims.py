"""What "Stuffed Mamba" claims, as predicates over what was measured."""

import numpy as np

from tilescan.experiments.harness.claims import Claim, judge
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import Spread, spread
from tilescan.experiments.harness.tables import format_value
from tilescan.experiments.measurements.state_collapse import COLLAPSE
from tilescan.experiments.papers.stuffed_mamba.fits import exponential_fit, line_fit
from tilescan.experiments.papers.stuffed_mamba.tables import (
    FORGET,
    HALF_STEP,
    LONGER,
    NORM,
    RECALLED,
    TBPTT,
    WINDOW,
    excess_cuts,
    growth_of,
    kept_of,
    name_of,
    ratio_of,
    recall_length,
    runs,
    safe_lengths,
    sizes_of,
)

CUT = 0.5  # of the excess loss


def claims(records: Records) -> list[Claim]:
    """What the paper says of collapse, of its cause, of the two laws and of mitigations."""
    return [
        _short_collapses(records, "stream"),
        _short_collapses(records, "text"),
        _larger_needs_longer(records),
        *(_cuts(records, name) for name in (FORGET, WINDOW, NORM, HALF_STEP, TBPTT, LONGER)),
        _heads_remember(records),
        _variance_explodes(records),
        _recall_grows(records),
        judge(
            "laws' coefficients",
            "T_forget = 5.172 N_S - 4.469 and T_recall = 4.756 (1.365^N_S - 1) - 0.742, N_S in "
            "millions, T in K tokens, with R^2 > 0.999.",
            "coefficients of fits to the six sizes within 10%",
            None,
            "the sizes measured have less than 0.1M state elements",
            needs="accelerator",
        ),
    ]


def _short_collapses(records: Records, kind: str) -> Claim:
    sizes, lengths = sizes_of(records, kind)
    holds, evidence = None, ""
    if len(lengths) > 1:
        short, long = (runs(records, kind, max(sizes), n) for n in (lengths[0], lengths[-1]))
        if short and long:
            least, most = min(map(ratio_of, short)), max(map(ratio_of, long))
            holds = least >= COLLAPSE and most < COLLAPSE
            evidence = (
                f"{name_of(records, max(sizes))}: at least {least:.2f} times trained at "
                f"{lengths[0]}, at most {most:.2f} times trained at {lengths[-1]}"
            )
    where = "plain text" if kind == "text" else "a stream of recalls"
    return judge(
        f"state collapse on {where}",
        "Trained on short texts a model breaks behind the training length; trained on long ones "
        "it does not.",
        f"with the largest state, every seed's greatest loss behind the training length is at "
        f"least {COLLAPSE:g} times that within at the shortest training length, and none's at the "
        "longest",
        holds,
        evidence,
    )


def _larger_needs_longer(records: Records) -> Claim:
    _, lengths = sizes_of(records, "stream")
    found = safe_lengths(records)
    # Where no length was safe, the next one of the grid stands for it: a lower bound.
    points = [(n / 1e6, min(x, 2 * max(lengths))) for n, row in found.items() for x in row.values()]
    holds, evidence = None, ""
    if len({n for n, _ in points}) > 2 and len(points) > 3:
        means = [
            np.mean([min(x, 2 * max(lengths)) for x in row.values()]) for row in found.values()
        ]
        slope, low, high, r2 = line_fit(*np.array(points).T)
        rises = all(a <= b for a, b in zip(means, means[1:], strict=False))
        holds = bool(rises and low > 0)
        listed = ", ".join(f"{n:,}: {m:.0f}" for n, m in zip(found, means, strict=True))
        evidence = (
            f"smallest safe length, mean over seeds, by state elements {listed}; slope {slope:.0f} "
            f"tokens per million (95% interval {low:.0f} to {high:.0f}), R^2 {r2:.2f}"
        )
    return judge(
        "larger states need longer training",
        "The smallest training length without collapse grows linearly with the state.",
        "its mean over seeds does not fall with the state, and the slope of the straight line "
        "through all seeds has a 95% interval above 0",
        holds,
        evidence,
    )


def _cuts(records: Records, name: str) -> Claim:
    cut = excess_cuts(records).get(name)
    statements = {
        FORGET: "Faster decay and smaller inputs mitigate collapse without training.",
        WINDOW: "A sliding window on the state, by the difference of two, mitigates collapse.",
        NORM: "Bounding the norm of the state mitigates collapse.",
        HALF_STEP: "Halving the step size, as LongMamba does, mitigates collapse.",
        TBPTT: "Training with the state carried over rows mitigates collapse.",
        LONGER: "Training on longer rows removes collapse.",
    }
    return judge(
        name,
        statements[name],
        f"the loss at 4 T exceeds that at T by at most {CUT:.0%} of what it does without, mean "
        "over seeds",
        cut.mean >= CUT if cut else None,
        f"{100 * cut.mean:.0f}% of the excess taken away" if cut else "",
    )


def _compare_lengths(records: Records, number) -> tuple[Spread, Spread, list[int]] | None:
    """(at the shortest, at the longest training length), with the largest state."""
    sizes, lengths = sizes_of(records, "stream")
    if len(lengths) < 2:
        return None
    found = [spread(map(number, runs(records, "stream", max(sizes), n))) for n in lengths]
    return (found[0], found[-1], lengths) if found[0] and found[-1] else None


def _heads_remember(records: Records) -> Claim:
    found = _compare_lengths(records, kept_of)
    holds, evidence = None, ""
    if found:
        short, long, lengths = found
        holds = short.mean - long.mean > 2 * max(short.std or 0, long.std or 0)
        evidence = (
            f"{format_value(short)} over {lengths[0]} tokens, {format_value(long)} over "
            f"{lengths[-1]}"
        )
    return judge(
        "heads that never forget",
        "After short training some head keeps nearly all of the first token over the whole length.",
        "with the largest state, the greatest share of the first token kept over the training "
        "length is higher at the shortest than at the longest, by more than twice the larger "
        "standard deviation over seeds",
        holds,
        evidence,
    )


def _variance_explodes(records: Records) -> Claim:
    found = _compare_lengths(records, growth_of)
    holds, evidence = None, ""
    if found:
        short, long, lengths = found
        holds = short.mean >= COLLAPSE > long.mean
        evidence = (
            f"{format_value(short)} times trained at {lengths[0]}, {format_value(long)} times "
            f"trained at {lengths[-1]}"
        )
    return judge(
        "states that explode",
        "The variance of some heads' states explodes behind the training length, on a prompt of "
        "one repeated token.",
        "with the largest state, it grows from the training length to the end of the rows to at "
        f"least {COLLAPSE:g} times at the shortest training length, and to less at the longest",
        holds,
        evidence,
    )


def _recall_grows(records: Records) -> Claim:
    sizes, lengths = sizes_of(records, "stream")
    holds, evidence = None, ""
    if len(sizes) > 1:
        found = [spread(map(recall_length, runs(records, "stream", n, lengths[-1]))) for n in sizes]
        if all(found):
            means = [f.mean for f in found]
            rises = all(a <= b for a, b in zip(means, means[1:], strict=False))
            holds = bool(rises and means[-1] > means[0])
            listed = ", ".join(f"{n:,}: {m:.0f}" for n, m in zip(sizes, means, strict=True))
            evidence = f"tokens by state elements: {listed}"
            if len(sizes) > 3:
                scale, base, r2 = exponential_fit(np.array(sizes) / 1e6, np.array(means))
                evidence += f"; {scale:.3g} ({base:.3g}^N_S - 1), R^2 {r2:.3f}"
    return judge(
        "larger states recall from farther",
        "The length from which a passkey is recalled grows with the state, exponentially.",
        f"T_recall ({RECALLED:.0%} right) at the longest training length does not fall with the "
        "state, and is longer with the largest than with the smallest",
        holds,
        evidence,
    )
