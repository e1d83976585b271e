"""The measurements: laws of published curves, and runs under several schedules."""

from typing import Any

from ml_collections import ConfigDict

from tilescan.configs.common import flat
from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.measurements.loss_curves import fit_published, measure_loss_curve


def cells(config: ConfigDict) -> list[Cell]:
    """Returns all measurements of the config."""
    published, own = config.published, config.own

    def curves(size: int) -> dict[str, Any]:
        fixed = {"fitted": tuple(published.fitted), "decay": published.decay}
        return {"kind": "published", "size": size, **fixed}

    def run(schedule: str) -> dict[str, Any]:
        options = own.schedules[schedule].to_dict()
        peak = own.train.optimizer.learning_rate * options.pop("learning_rate_times", 1.0)
        model = {
            "model.pattern": ("attention", "mlp"),
            "model.repeats": own.repeats,
            "model.d_model": own.d_model,
            "model.n_heads": own.n_heads,
        }
        optimizer = {f"optimizer.{name}": value for name, value in options.items()}
        train = {**model, **flat(own.train), **optimizer, "optimizer.learning_rate": peak}
        fixed = {"fitted": tuple(own.fitted), "decay": own.decay}
        return {"kind": "own", "schedule": schedule, **fixed, "train": train}

    return [
        *sweep("published-{size}M", fit_published, curves, size=published.sizes, seconds=2),
        *sweep(
            "own-{schedule}-seed{seed}",
            measure_loss_curve,
            run,
            seeds=own.seeds,
            seconds=100,
            schedule=tuple(own.schedules),
        ),
    ]
