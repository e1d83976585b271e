"""`tilescan refine`: a learning-rate schedule from the gradient norms of a finished run."""

import argparse
import pathlib
import typing

from tilescan.cli import arguments

if typing.TYPE_CHECKING:
    import numpy as np

ABOUT = "refine a learning-rate schedule by a run's gradient norms"
DESCRIPTION = """\
Make the schedule that the gradient norms of a finished run ask for (arXiv 2310.07831): it decays to
0, warms up where the norms fall at first, and falls sooner where they rise at the end.

  tilescan train --workdir=runs/first --config.train.gradient_norms=True
  tilescan refine runs/first --output=refined.txt
  tilescan train --workdir=runs/second --config.optimizer.schedule=file:refined.txt

The file holds a factor of optimizer.learning_rate for each update. A refined schedule has another
mean than the one before it: try several learning rates again. Beside it a plot is written.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    given = arguments.given
    parser.add_argument("run", metavar="RUN", type=given, help="work folder of the run")
    about = "file to write (default: refined.txt); the plot has its name with .svg"
    parser.add_argument("--output", type=arguments.path, default="refined.txt", help=about)
    about = "updates of the schedule (default: the run's)"
    parser.add_argument("--steps", type=int, help=about)
    about = "which norms: l2 suits sgd, l1 adam (default: by the run's optimizer)"
    parser.add_argument("--norm", choices=("l2", "l1"), help=about)
    about = "weights are norms to minus this power (default: 2 of l2, 1 of l1)"
    parser.add_argument("--power", type=int, choices=(1, 2), help=about)
    about = "width of the median filter, as a share of the updates (default: 0.1)"
    parser.add_argument("--tau", type=float, default=0.1, help=about)


def run(options: argparse.Namespace) -> int:
    """Writes the schedule and its plot; returns the exit status."""
    from tilescan.files import write_atomically
    from tilescan.training import refinement

    norm = options.norm or refinement.norm_for(options.run)
    power = options.power or refinement.POWERS[norm]
    norms = refinement.read_norms(options.run, norm)
    factors = refinement.refined_schedule(norms, power, tau=options.tau, steps=options.steps)
    output = pathlib.Path(options.output)
    about = f"# refined from {norm} norms of {options.run}, power {power}, tau {options.tau}\n"
    write_atomically(output, about + "".join(f"{factor:.9g}\n" for factor in factors))
    plot = output.with_suffix(".svg")
    write_atomically(plot, chart(norms, refinement.smoothed(norms, options.tau), factors, norm))

    peak = int(factors.argmax())
    half = peak + int((factors[peak:] < 0.5).argmax())
    share = lambda step: f"update {step + 1:,} ({100 * step / len(factors):.0f}%)"
    print(f"{output}: {len(factors):,} updates; peak at {share(peak)}, half of it at {share(half)}")
    print(f"plot: {plot}")
    print(f"use it: --config.optimizer.schedule=file:{output} --config.train.steps={len(factors)}")
    return 0


def chart(norms: "np.ndarray", smooth: "np.ndarray", factors: "np.ndarray", norm: str) -> str:
    """Returns an SVG of the norms, as they are and smoothed, and of the schedule."""
    import numpy as np

    from tilescan.experiments.harness.figures import line_chart

    def points(values) -> tuple[list, list]:
        at = np.unique(np.linspace(0, len(values) - 1, 500).astype(int))
        return (at + 1).tolist(), values[at].tolist()

    return line_chart(
        {
            f"{norm} norm of the gradient": {"norm": points(norms), "smoothed": points(smooth)},
            "refined schedule": {"factor of the peak": points(factors)},
        },
        x_label="updates",
        y_label="",
        markers=False,
        share_y=False,
        caption="Gradient norms of the run, after the median filter, and the refined schedule.",
    )
