"""What the paper says of its law, and the limits that its reviewers named."""

import statistics
from collections.abc import Mapping

from tilescan.experiments.harness.claims import Claim, Verdict, claim, every, not_run
from tilescan.experiments.harness.records import Records
from tilescan.experiments.measurements.loss_curves import ANNEALING, AREA, STEPS, Fitted, fitted
from tilescan.experiments.papers.annealing_law.tables import LIMITS, NAMES
from tilescan.training.annealing_law import errors, predict

PUBLISHED_ERROR, OWN_ERROR = 0.3, 0.5  # percent
BETTER = 2.0  # times
R2 = 0.999
PREDICTS = "Fitted to two schedules, the law predicts the whole curves of others (about 0.2%)."


def claims(records: Records) -> list[Claim]:
    """Returns the claims, each with its verdict."""
    published, own = records.kind("published"), fitted(records.kind("own"))
    return [
        claim("published curves", PREDICTS, predicts_published(published)),
        claim("runs of this code", PREDICTS, predicts_own(own)),
        claim(
            "the fit explains the curves",
            "The law explains more than 0.999 of the variance of the curves it is fitted to.",
            explains(published, own),
        ),
        claim(
            "no edge of stability",
            "By the law a higher peak is always better: it holds below the edge of stability alone "
            "(named by its reviewers).",
            fails_hot(own),
        ),
        claim(
            "rates of 0",
            "By the law the loss goes on falling at rates of 0 (named by its reviewers).",
            falls_idle(own),
            by_construction=True,
        ),
        not_run(
            "594M to 2.1B parameters",
            "The law fits dense and mixture-of-experts models of up to 2.1B parameters, and with a "
            "term of their size.",
            "mean error of at most 0.3% at these sizes",
            needs="accelerator",
        ),
        not_run(
            "less than 1% of the compute",
            "Against Chinchilla's way of fitting, the law needs less than 1% of the compute "
            "(Table 2).",
            "FLOPs of both ways to the same error",
            needs="accelerator",
        ),
    ]


def _criterion(bound: float, each: str, but: str = "") -> str:
    return (
        f"mean absolute error on the curves that were not fitted{but} of at most {bound:g}% with "
        f"every {each}, at which both the same law without annealing and a power law in steps have "
        f"at least {BETTER:g} times as much"
    )


def _verdict(bound: float, each: str, found: dict[str, dict[str, float]], but: str = "") -> Verdict:
    """Returns whether the law's errors are small, and smaller than those of the others."""
    holds = every(
        e[ANNEALING] <= bound / 100 and BETTER * e[ANNEALING] <= min(e[AREA], e[STEPS])
        for e in found.values()
    )
    said = [
        f"{name}: " + ", ".join(f"{NAMES[law]} {100 * e[law]:.2f}%" for law in NAMES)
        for name, e in found.items()
    ]
    return Verdict(_criterion(bound, each, but), holds, "; ".join(said))


def predicts_published(published: Records) -> Verdict:
    """Returns whether the law predicts the published curves of every size."""
    found = {
        f"{r.settings['size']}M": {
            law: statistics.fmean(r.result["errors"][law].values()) for law in NAMES
        }
        for r in published
    }
    return _verdict(PUBLISHED_ERROR, "size", found)


def predicts_own(own: Mapping[int, Fitted]) -> Verdict:
    """Returns whether the law predicts the unseen schedules of every seed."""
    found = {}
    for seed, runs in own.items():
        unseen = [name for name in runs.curves if name not in (*runs.seen, *LIMITS)]
        if unseen:
            found[f"seed {seed}"] = {law: runs.error(law, *unseen) for law in NAMES}
    but = ", but for those of the two claims of limits,"
    return _verdict(OWN_ERROR, "seed", found, but)


def explains(published: Records, own: Mapping[int, Fitted]) -> Verdict:
    """Returns whether R^2 of every fit is above R2."""
    found = {f"{r.settings['size']}M": r.result["r2"] for r in published}
    found |= {f"own, seed {seed}": runs.r_squared() for seed, runs in own.items()}
    return Verdict(
        f"R^2 above {R2} of every fit, both curves together",
        every(r2 > R2 for r2 in found.values()),
        ", ".join(f"{name} {r2:.4f}" for name, r2 in found.items()),
    )


def fails_hot(own: Mapping[int, Fitted]) -> Verdict:
    """Returns whether runs from ten times the peak end far above what the law says."""
    off = lambda runs: float(errors(runs.laws[ANNEALING], runs.curves["hot"])[-1])
    found = {seed: off(runs) for seed, runs in own.items() if "hot" in runs.curves}
    return Verdict(
        "from ten times the peak the law's last loss is more than 5% below the measured one, with "
        "every seed",
        every(error < -0.05 for error in found.values()),
        ", ".join(f"{100 * error:.1f}% (seed {seed})" for seed, error in found.items()),
    )


def falls_idle(own: Mapping[int, Fitted]) -> Verdict:
    """Returns whether the law falls where nothing is updated."""
    found = {}
    for seed, runs in own.items():
        if curve := runs.curves.get("idle"):
            losses = predict(runs.laws[ANNEALING], curve.rates, curve.warmup)
            found[seed] = float(losses[-1] / losses[curve.rates > 0][-1] - 1)
    return Verdict(
        "over the last fifth of the steps, at rates of 0, by which nothing changes, the law falls, "
        "with every seed",
        every(change < 0 for change in found.values()),
        ", ".join(f"{100 * change:.3f}% (seed {seed})" for seed, change in found.items()),
    )
