"""`tilescan forecast`: predicts loss curves under other learning-rate schedules."""

import argparse
import pathlib
import typing

from tilescan.cli import arguments

if typing.TYPE_CHECKING:
    import numpy as np

    from tilescan.training.annealing_law import Curve, Law
    from tilescan.training.schedule_config import ScheduleConfig

ABOUT = "predict loss curves under other learning-rate schedules"
DESCRIPTION = """\
Fit the scaling law with learning-rate annealing, L = L0 + A S1^-alpha - C S2 (arXiv 2408.11029), to
finished runs, and predict whole loss curves under other schedules.

  tilescan forecast runs/cosine runs/constant                     the law alone, with intervals
  tilescan forecast runs/cosine runs/constant --schedule=wsd,decay_steps=200
  tilescan forecast mine.csv --schedule=linear --schedule=infinite,cooldown_steps=500 --steps=4000
  tilescan forecast runs/cosine runs/constant --check=runs/wsd    against what was measured

A run is a work folder of `tilescan train`, or a CSV file with columns step, lr and loss. A schedule
is its name, then fields of the section optimizer, see `tilescan train --help-config`; milestones
are written 600:800. The curves (forecast.csv) and a plot (forecast.svg) go to the folder --output.

The law holds for sane schedules below the edge of stability: by it a higher peak is always better.
"""


_SHOWN = 1.3  # times a curve's smallest loss, up to which it is drawn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    given = arguments.given
    about = "work folder of a run, or CSV file, to fit the law to"
    parser.add_argument("runs", nargs="+", metavar="RUN", type=given, help=about)
    parser.add_argument(
        "--schedule",
        action="append",
        default=[],
        type=given,
        metavar="NAME[,FIELD=VALUE...]",
        help="predict this one; more than once for several",
    )
    about = "updates of the schedules (default: those of the first run)"
    parser.add_argument("--steps", type=int, help=about)
    about = "a run to predict and compare with; more than once for several"
    parser.add_argument(
        "--check", action="append", default=[], type=given, metavar="RUN", help=about
    )
    about = "losses of runs (default: validation where there are ten)"
    parser.add_argument("--split", choices=("validation", "train"), help=about)
    about = "updates until the peak of the runs (default: what they say)"
    parser.add_argument("--warmup", type=int, help=about)
    about = "the law's lambda (default: the paper's 0.999, or 0.99 to 0.9995 if clearly better)"
    parser.add_argument("--decay", type=float, help=about)
    about = "resampled fits, for 95%% intervals (default: 200)"
    parser.add_argument("--samples", type=int, default=200, help=about)
    parser.add_argument(
        "--output", type=given, default="forecast", help="folder to write (default: forecast)"
    )


def run(options: argparse.Namespace) -> int:
    """Fits, predicts, prints and writes; returns the exit status."""
    import numpy as np

    from tilescan.training import annealing_law, schedules
    from tilescan.training.loss_curves import read_curve

    if options.samples < 0:
        options.parser.error(f"--samples={options.samples} must be at least 0")
    seen, checked = (
        [read_curve(path, split=options.split, warmup=options.warmup) for path in paths]
        for paths in (options.runs, options.check)
    )
    steps = options.steps or len(seen[0].rates)
    peak = float(seen[0].rates.max())
    asked = {text: parse_schedule(text, peak) for text in options.schedule}
    learning_rates = {text: schedules.rates(c, steps) for text, c in asked.items()}

    # The law.
    decays = annealing_law.DECAYS if options.decay is None else (options.decay,)
    law = annealing_law.fit(seen, decays)
    resampled = annealing_law.bootstrap(seen, law, samples=options.samples)
    print(law_text(law, resampled))
    for heading, curves in (("fitted", seen), ("predicted", checked)):
        for curve in curves:
            error = 100 * np.abs(annealing_law.errors(law, curve)).mean()
            print(f"  {heading:9} {curve.name:30} mean |error| {error:.2f}%")

    # What it says of other schedules.
    predicted = {}
    for text, found in learning_rates.items():
        warmup = schedules.first_peak(asked[text], steps)
        predicted[text] = annealing_law.predict(law, found, warmup)
        ends = [annealing_law.predict(other, found, warmup)[-1] for other in resampled]
        print(f"  {text:40} loss {predicted[text][-1]:.4f}{interval(ends)} after {steps:,} updates")
        for note in beyond(found, seen):
            print(f"    {note}")
    folder = pathlib.Path(options.output)
    write(folder, law, seen, checked, learning_rates, predicted)
    print(f"curves and plot: {folder / 'forecast.csv'}, {folder / 'forecast.svg'}")
    return 0


def parse_schedule(text: str, peak: float) -> "ScheduleConfig":
    """Parses "wsd,decay_steps=200": a schedule with the peak, unless it has its own.

    Raises:
      ValueError: an unknown name or field, or a value that makes no sense.
    """
    import ast
    import dataclasses

    from tilescan.spelling import did_you_mean
    from tilescan.training.schedule_config import ConfigError, ScheduleConfig

    name, *assignments = text.split(",")
    known = [field.name for field in dataclasses.fields(ScheduleConfig)]
    values: dict = {"learning_rate": peak}
    for assignment in assignments:
        field, equals, value = assignment.partition("=")
        field = field.removeprefix("optimizer.")
        if not equals or field not in known:
            hint = did_you_mean(field, known)
            raise ConfigError(
                f"--schedule={text}: {assignment!r} must be FIELD=VALUE; {hint}fields: "
                f"{', '.join(known[2:])}"
            )
        try:
            values[field] = ast.literal_eval(value.replace(":", ","))
        except (ValueError, SyntaxError):
            values[field] = value
    if isinstance(values.get("milestones"), int):
        values["milestones"] = (values["milestones"],)
    try:
        return ScheduleConfig(**values, schedule=name)
    except TypeError as error:  # a number where a name is needed
        raise ConfigError(f"--schedule={text}: {error}") from error


def law_text(law: "Law", resampled: "list[Law]") -> str:
    """Returns the fitted law in words, with 95% intervals where there are resampled ones."""
    lines = [
        f"L = {law.L0:.4g} + {law.A:.4g} S1^-{law.alpha:.4g} - {law.C:.4g} S2, "
        f"lambda = {law.decay:g}"
    ]
    for name in ("L0", "A", "C", "alpha"):
        values = [getattr(other, name) for other in resampled]
        lines.append(f"  {name:5} {getattr(law, name):.4g}{interval(values)}")
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    """Returns " [low, high]", the 95% interval, or "" of no values."""
    import numpy as np

    if not len(values):
        return ""
    low, high = np.quantile(values, [0.025, 0.975])
    return f" [{low:.4g}, {high:.4g}]"


def beyond(learning_rates: "np.ndarray", seen: "list[Curve]") -> list[str]:
    """Returns notes where a schedule leaves what the law was fitted to, or can be fitted to."""
    import numpy as np

    notes = []
    highest = max(curve.rates.max() for curve in seen)
    if learning_rates.max() > 1.001 * highest:
        notes.append(
            f"note: its peak {learning_rates.max():.3g} is above the runs' {highest:.3g}; the law "
            "knows no edge of stability"
        )
    if (idle := int((learning_rates == 0).sum())) > 1:
        notes.append(f"note: {idle} updates have rate 0, by which the law goes on to fall")
    if all(np.ptp(curve.rates[curve.warmup :]) == 0 for curve in seen):
        notes.append("note: all runs have constant rates, which say nothing of annealing")
    return notes


def write(
    folder: pathlib.Path,
    law: "Law",
    seen: "list[Curve]",
    checked: "list[Curve]",
    learning_rates: "dict[str, np.ndarray]",
    predicted: "dict[str, np.ndarray]",
) -> None:
    """Writes forecast.csv, a row an update of each schedule, and forecast.svg."""
    import numpy as np

    from tilescan.experiments.harness.figures import line_chart
    from tilescan.files import write_atomically
    from tilescan.training import annealing_law

    panels: dict = {"loss": {}, "learning rate": {}}

    def draw(panel: str, name: str, steps, values) -> None:
        at = np.unique(np.linspace(0, len(steps) - 1, 400).astype(int))
        if panel == "loss":  # the steep beginning would hide the rest
            at = at[values[at] <= _SHOWN * values.min()]
        panels[panel][name] = steps[at].tolist(), values[at].tolist()

    for curve in (*seen, *checked):
        kept = curve.steps > curve.warmup
        draw("loss", curve.name, curve.steps[kept], curve.losses[kept])
        losses = annealing_law.predict(law, curve.rates, curve.warmup)
        draw("loss", f"{curve.name}, law", curve.steps[kept], losses[curve.steps[kept] - 1])
    rows = ["schedule,step,lr,loss"]
    for text, losses in predicted.items():
        rates, steps = learning_rates[text], np.arange(1, len(losses) + 1)
        draw("loss", text, steps, losses)
        draw("learning rate", text, steps, rates)
        each = zip(steps, rates, losses, strict=True)
        rows += [f'"{text}",{step},{rate:.8g},{loss:.8g}' for step, rate, loss in each]
    write_atomically(folder / "forecast.csv", "\n".join(rows) + "\n")
    chart = line_chart(
        {title: lines for title, lines in panels.items() if lines},
        x_label="updates",
        y_label="",
        markers=False,
        share_y=False,
        dashed=[name for name in panels["loss"] if name.endswith(", law")],
        caption="Losses measured and by the law, and the schedules that it was asked for.",
    )
    write_atomically(folder / "forecast.svg", chart)
