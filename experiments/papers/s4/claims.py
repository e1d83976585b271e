"""What S4's paper says, as predicates on the records."""

from tilescan.experiments.harness.claims import Claim, judge
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import Spread, ratio
from tilescan.experiments.harness.tables import format_value
from tilescan.experiments.papers.s4.kernels import CAUCHY, DENSE
from tilescan.experiments.papers.s4.tables import (
    INITS,
    NAMES,
    PAIRS,
    PUBLISHED_ACCURACY,
    PUBLISHED_SPEED,
    SOURCES,
    TASKS,
    accuracy,
    by,
    token_ms,
)

FLOAT64_BOUND, FLOAT32_BOUND = 1e-9, 1e-4
# Models of the width from which the paper's factor of table 8 is judged.
PUBLISHED_WIDTH = 1024


def claims(records: Records) -> list[Claim]:
    """Exactness, costs, accuracies against a Transformer, generation and initialisation."""
    return [
        _kernel_is_exact(records),
        _convolution_is_recurrence(records),
        _cheaper(records, "median_ms", "time"),
        _cheaper(records, "temp_bytes", "memory"),
        *(_beats_transformer(records, task) for task in TASKS),
        judge(
            "Path-X",
            "S4 solves Path-X, 16,384 steps, at 96.35% where all others guess (Table 4).",
            "accuracy on Path-X",
            None,
            "not run",
            needs="accelerator, and days",
        ),
        _ratio_grows(records),
        _constant_time(records),
        _sixty_times(records),
        *(_init_matters(records, init, frozen) for init in PAIRS for frozen in (False, True)),
    ]


def _kernel_is_exact(records: Records) -> Claim:
    found = {}
    for record in by(records, "exactness", "length"):
        errors = [v for k, v in record.result["kernel"].items() if k.endswith("float64")]
        found[record.settings["length"]] = max(errors)
    return judge(
        "DPLR kernels are exact",
        "The Cauchy products compute the convolution kernel of the dense HiPPO matrix (Theorem 3).",
        f"float64 errors of both DPLR kernels below {FLOAT64_BOUND:g} at every length",
        max(found.values()) < FLOAT64_BOUND if found else None,
        ", ".join(f"{error:.1e} at {length}" for length, error in found.items()),
    )


def _convolution_is_recurrence(records: Records) -> Claim:
    found = {
        r.settings["length"]: max(r.result["mixer"].values())
        for r in by(records, "exactness", "length")
    }
    return judge(
        "convolution is recurrence",
        "A trained layer is a convolution over a whole sequence and a recurrence token by token "
        "(section 2).",
        f"float32 layers differ by less than {FLOAT32_BOUND:g} of the largest value at every "
        "length",
        max(found.values()) < FLOAT32_BOUND if found else None,
        ", ".join(f"{error:.1e} at {length}" for length, error in found.items()),
    )


def _cheaper(records: Records, field: str, name: str) -> Claim:
    """Of the longest kernels: dense / DPLR by state dim."""
    lengths = records.select(kind="cost").values("length")
    points = []
    for record in by(records, "cost", "state_dim"):
        if record.settings["length"] == lengths[-1]:
            dense, cauchy = (record.result.get(way, {}).get(field) for way in (DENSE, CAUCHY))
            points.append((record.settings["state_dim"], ratio(dense, cauchy)))
    points = [(N, value) for N, value in points if value is not None]
    holds = None
    if len(points) > 1:
        holds = points[-1][1] > points[0][1] and points[-1][1] > 1
    return judge(
        f"DPLR kernels take less {name} than dense ones",
        f"S4's kernel takes less {name} than powers of a dense matrix, the more so the more "
        "states (Table 2).",
        "dense / DPLR at the greatest length grows from the fewest to the most states and ends "
        "above 1",
        holds,
        ", ".join(f"{value:.2f} at {N} states" for N, value in points),
    )


def _exceeds(one: Spread | None, two: Spread | None) -> bool | None:
    """Whether a mean is above another by twice the larger deviation; None: not both, or no spread.

    One seed has no spread, and decides nothing.
    """
    if one is None or two is None or None in (one.std, two.std):
        return None
    return one.mean - two.mean > 2 * max(one.std, two.std)


def _beats_transformer(records: Records, task: str) -> Claim:
    found = records.select(kind="task", name=task, task=SOURCES[task])
    s4, attention = (accuracy(found, model=m) for m in ("s4", "attention"))
    evidence = ", ".join(
        f"{NAMES[m]} {format_value(value)}%"
        for m, value in (("s4", s4), ("attention", attention))
        if value
    )
    published = PUBLISHED_ACCURACY[task]
    missing = s4 is None or attention is None
    return judge(
        f"S4 beats a Transformer: {TASKS[task]}",
        f"S4 {published['s4']:g}%, Transformer {published['attention']:g}% "
        f"(Table {6 if task == 'digits' else 4}).",
        "test accuracy with equally many parameters and examples: S4's mean is above by more than "
        "twice the larger standard deviation over seeds",
        _exceeds(s4, attention),
        evidence,
        needs="accelerator" if missing and task == "pathfinder" else "",
    )


def _ratios(records: Records) -> list[tuple[int, float]]:
    points = [
        (r.settings["context"], ratio(token_ms(r, "attention"), token_ms(r, "s4")))
        for r in by(records, "generation", "context")
    ]
    return [(context, value) for context, value in points if value is not None]


def _ratio_grows(records: Records) -> Claim:
    points = _ratios(records)
    holds = None
    if len(points) > 1:
        holds = points[-1][1] > points[0][1] and points[-1][1] > 1
    return judge(
        "S4 generates faster, the more so the longer the context",
        "As a recurrence S4 generates 60 times faster than a Transformer (Table 8).",
        "time of a token, Transformer / S4, grows from the shortest to the longest context and "
        "ends above 1",
        holds,
        ", ".join(f"{value:.2f} at {context}" for context, value in points),
    )


def _constant_time(records: Records) -> Claim:
    times = {r.settings["context"]: token_ms(r, "s4") for r in by(records, "generation", "context")}
    times = {context: value for context, value in times.items() if value is not None}
    return judge(
        "S4's time of a token is constant",
        "A step of the recurrence costs the same whatever came before (section 2.3).",
        "its longest time over contexts is less than 1.5 times its shortest",
        max(times.values()) < 1.5 * min(times.values()) if len(times) > 1 else None,
        ", ".join(f"{value:.3g} ms at {context}" for context, value in times.items()),
    )


def _sixty_times(records: Records) -> Claim:
    points = _ratios(records)
    most = max((value for _, value in points), default=None)
    widths = [
        r.settings["models"]["s4"]["model.d_model"] for r in records.select(kind="generation")
    ]
    holds = None
    if most is not None and (most >= PUBLISHED_SPEED or max(widths) >= PUBLISHED_WIDTH):
        holds = most >= PUBLISHED_SPEED
    return judge(
        "60 times faster generation",
        "S4 of 249M parameters generates 48K tokens a second, a Transformer 0.8K (Table 8).",
        f"time of a token, Transformer / S4, of at least {PUBLISHED_SPEED:g} at some context; "
        f"refuted only by models of the paper's width, {PUBLISHED_WIDTH:,}",
        holds,
        f"at most {most:.2f}" if most is not None else "",
        needs="accelerator",
    )


def _init_matters(records: Records, random: str, frozen: bool) -> Claim:
    found = records.select(kind="init", frozen=frozen)
    names = (PAIRS[random], random)
    hippo, other = (accuracy(found, init=name) for name in names)
    state = "frozen" if frozen else "trained"
    pairs = zip(names, (hippo, other), strict=True)
    return judge(
        f"{INITS[PAIRS[random]]} beats {INITS[random]}, {state}",
        "HiPPO initialisation generalises better than random ones, by more than 15 points "
        "(Figure 3).",
        f"test accuracy with A {state}: the mean is above by more than twice the larger standard "
        "deviation over seeds",
        _exceeds(hippo, other),
        ", ".join(f"{INITS[name]} {format_value(value)}%" for name, value in pairs if value),
    )
