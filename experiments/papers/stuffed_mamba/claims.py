"""What "Stuffed Mamba" says of collapse, of its cause, of the two laws and of mitigations."""

import numpy as np

from tilescan.experiments.harness import claims as c
from tilescan.experiments.harness.claims import Claim, Verdict, claim
from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import Spread, exponential_fit, line_fit, scaled
from tilescan.experiments.harness.tables import format_value
from tilescan.experiments.measurements import collapse_readings as of_record
from tilescan.experiments.measurements.state_collapse import (
    CARRIED,
    COLLAPSE,
    FORGET,
    HALF_STEP,
    LONGER,
    NORM,
    TOP,
    WINDOW,
)
from tilescan.experiments.papers.stuffed_mamba import published
from tilescan.experiments.papers.stuffed_mamba import quantities as q
from tilescan.experiments.papers.stuffed_mamba.tables import NAMES, TEXTS
from tilescan.experiments.papers.stuffed_mamba.training import STREAM

CUT = 0.5  # of the excess loss
NEARLY_ALL = 0.9  # of the first token
COLLAPSES = (
    "Trained on short sequences a model breaks beyond the training length; trained on long ones it "
    "does not."
)
# What is said of each mitigation.
MITIGATIONS = {
    FORGET: "Faster decay and smaller inputs mitigate collapse without training.",
    WINDOW: "A sliding window on the state, by the difference of two, mitigates collapse.",
    NORM: "Bounding the norm of the state mitigates collapse.",
    HALF_STEP: "Halving the step size, as LongMamba does, mitigates collapse.",
    CARRIED: "Training with the state carried over rows mitigates collapse.",
    LONGER: "Training on longer rows removes collapse.",
}
# Why claims are not shown.
WHY_TEXT = (
    "bytes of text ask for little from beyond the window: the loss stays where it is, and near the "
    "control's; the largest model tried has 35,072 state elements and read half a million bytes, "
    "the paper's smallest 0.8M"
)
WHY_HEADS = (
    "rows of 8 tokens teach heads to forget: those that keep most keep less than before training"
)
WHY_EXPLODE = (
    "it grows after training on the longest rows, too: one token again and again is unlike the "
    "stream for every model here, however long its rows of up to 48 tokens were"
)
WHY_MITIGATIONS = {
    HALF_STEP: "half a step forgets half as fast, and what is read longer than in training is more",
    CARRIED: "gradients end where a row does, after 12 tokens: what a state of many rows costs is "
    "seen in training, and hardly learned",
}


def claims(records: Records) -> list[Claim]:
    """Returns what the paper says, each claim with its verdict."""
    stream, cuts = q.read(records, STREAM), of_record.excess_cuts(records)
    return [
        claim("state collapse on a stream of recalls", COLLAPSES, short_collapses(stream)),
        *(
            claim(
                f"state collapse on {name}",
                COLLAPSES,
                short_collapses(q.read(records, kind)),
                why=WHY_TEXT,
            )
            for kind, name in TEXTS.items()
        ),
        claim(
            "larger states need longer training",
            "The smallest training length without collapse grows linearly with the state.",
            larger_needs_longer(records),
        ),
        *(
            claim(
                NAMES[name],
                statement,
                cuts_excess(cuts.get(name)),
                why=WHY_MITIGATIONS.get(name, ""),
            )
            for name, statement in MITIGATIONS.items()
        ),
        claim(
            "heads that never forget",
            "After short training some heads keep nearly all of the first token over the whole "
            "length.",
            heads_remember(stream),
            why=WHY_HEADS,
        ),
        claim(
            "states that explode",
            "The variance of some heads' states explodes beyond the training length, on a prompt "
            "of one repeated token.",
            variance_explodes(stream),
            why=WHY_EXPLODE,
        ),
        claim(
            "larger states recall from farther",
            "The length from which a passkey is recalled grows with the state, exponentially.",
            recall_grows(q.recalls(records)),
        ),
        c.not_run(
            "laws' coefficients",
            "T_forget = 5.172 N_S - 4.469 and T_recall = 4.756 (1.365^N_S - 1) - 0.742, N_S in "
            "millions, T in K tokens, with R^2 > 0.999.",
            "coefficients of fits to the six sizes within 10%",
            needs="accelerator",
            evidence="the sizes measured have less than 0.1M state elements",
        ),
    ]


def ends(readings: Records) -> list[Group]:
    """Returns the largest state's readings at the shortest and the longest training length.

    The list is empty where one of them is missing.
    """
    lengths = readings.values("train_length")
    largest = readings.select(state_elements=max(readings.values("state_elements"), default=0))
    found = by(largest, "train_length", order=((lengths[0], lengths[-1]),)) if lengths else []
    return found if len(found) == 2 else []


def short_collapses(readings: Records) -> Verdict:
    """Returns whether short training collapses with every seed, and long training with none."""
    holds, evidence = None, ""
    if found := ends(readings):
        short, long = found
        over = min(map(of_record.over_control(readings), short.records))
        rise, most = (
            min(map(of_record.rise_of, short.records)),
            max(map(of_record.rise_of, long.records)),
        )
        holds = min(over, rise) >= COLLAPSE > most
        evidence = (
            f"{q.name_of(short)}, {len(short)} seeds: trained at {short.key}, at least {over:.2f} "
            f"times the control's and {rise:.2f} times its own; trained at {long.key}, at most "
            f"{most:.2f} times its own"
        )
    return Verdict(
        "with the largest state and every seed, the mean loss beyond the training length is, at "
        f"the shortest one, at least {COLLAPSE:g} times the control's in the same buckets of "
        "positions (same seed, trained at the longest length) and at least "
        f"{COLLAPSE:g} times its own in the second half of the training length; the control's, "
        "beyond its own length, is less",
        holds,
        evidence,
    )


def larger_needs_longer(records: Records) -> Verdict:
    """Returns whether the smallest safe length grows with the state."""
    # Where no length was safe, the next one of the grid stands for it: a lower bound.
    longest = max(q.read(records, STREAM).values("train_length"), default=0)
    found = {n: [min(x, 2 * longest) for x in row] for n, row in q.safe_lengths(records).items()}
    points = [(n / 1e6, x) for n, row in found.items() for x in row]
    holds, evidence, effect = None, "", None
    if len({n for n, _ in points}) > 2 and len(points) > 3:
        means = {n: float(np.mean(row)) for n, row in found.items()}
        slope, low, high, r2 = line_fit(*np.array(points).T)
        holds, effect = (
            bool(_never_falls(means) and low > 0),
            c.effect_of(1e3 * published.SLOPE, slope, kind="difference"),
        )
        evidence = (
            f"smallest safe length, mean over seeds, by state elements {_listed(means)}; slope "
            f"{slope:.0f} tokens per million (95% interval {low:.0f} to {high:.0f}), R^2 {r2:.2f}"
        )
    return Verdict(
        "its mean over seeds (by the criterion of collapse on the stream, of losses beyond the "
        "training length) does not fall with the state, and the slope of the straight line through "
        "all seeds has a 95% interval above 0",
        holds,
        evidence,
        effect,
    )


def cuts_excess(cut: Spread | None) -> Verdict:
    """Returns whether a mitigation takes at least CUT of the excess loss away."""
    return Verdict(
        f"the loss at 4 T exceeds that at T by at most {CUT:.0%} of what it does without, mean "
        "over seeds with an excess (paired by seed: the same rows)",
        cut.mean >= CUT if cut else None,
        f"{format_value(scaled(cut, 100))}% of the excess taken away" if cut else "",
    )


def heads_remember(readings: Records) -> Verdict:
    """Returns whether the heads that keep most keep nearly all, and more than before training."""
    holds, evidence = None, ""
    if found := ends(readings):
        means = [q.mean_of(of)(found[0]) for of in (of_record.kept_of, of_record.untrained_of)]
        more = c.every(of_record.kept_of(r) > of_record.untrained_of(r) for r in found[0].records)
        holds = bool(means[0].mean >= NEARLY_ALL and more)
        kept, before = map(format_value, means)
        evidence = f"{kept} over {found[0].key} tokens, {before} before training"
    return Verdict(
        f"with the largest state at the shortest training length, the {TOP:.0%} of the heads that "
        "keep most of the first token over that length keep, on average over them and over seeds, "
        f"at least {NEARLY_ALL:.0%}, and with every seed more than before training (the same of "
        "the untrained model, on the same rows)",
        holds,
        evidence,
    )


def variance_explodes(readings: Records) -> Verdict:
    """Returns whether the states' variance grows after short training, and not after long."""
    found = {g.key: [of_record.growth_of(r) for r in g.records] for g in ends(readings)}
    short, long = (float(np.median(x)) for x in found.values()) if found else (None, None)
    return Verdict(
        "with the largest state, the growth of the variance of the head at the 95% quantile, from "
        f"the training length to the end of the rows, has a median over seeds of at least "
        f"{COLLAPSE:g} times at the shortest training length, and of less at the longest",
        short >= COLLAPSE > long if found else None,
        ", ".join(f"{np.median(x):.2f} times trained at {n}" for n, x in found.items()),
    )


def recall_grows(answers: Records) -> Verdict:
    """Returns whether larger states recall from farther, at the best training length."""
    means = {n: float(np.mean(found)) for n, found in of_record.recall_lengths(answers).items()}
    sizes, found = np.array(list(means)), list(means.values())
    evidence = f"tokens by state elements: {_listed(means)}" if len(means) > 1 else ""
    if len(means) > 3:
        scale, base, r2 = exponential_fit(sizes / 1e6, np.array(found))
        evidence += f"; {scale:.3g} ({base:.3g}^N_S - 1), R^2 {r2:.3f}"
    return Verdict(
        f"T_recall ({of_record.RECALLED:.0%} right; of each seed the longest over training "
        "lengths), mean over seeds, does not fall with the state, and is longer with the largest "
        "than with the smallest",
        bool(_never_falls(means) and found[-1] > found[0]) if len(means) > 1 else None,
        evidence,
    )


def _never_falls(means: dict[int, float]) -> bool:
    values = [means[n] for n in sorted(means)]
    return values == sorted(values)


def _listed(means: dict[int, float]) -> str:
    return c.listed(means, "{:,}: {:.0f}")
