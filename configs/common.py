"""What every paper's config begins with, and the parts that several of them share."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from tilescan.spelling import did_you_mean

SCALES = ("smoke", "cpu", "accelerator")


def check_scale(scale: str) -> str:
    """Returns `scale` itself if it is one of SCALES.

    Raises:
      ValueError: it is not; the message names the nearest.
    """
    if scale not in SCALES:
        hint = did_you_mean(scale, SCALES)
        raise ValueError(f"scale={scale!r} is unknown; {hint}it must be one of {', '.join(SCALES)}")
    return scale


def paper(name: str, scale: str) -> ConfigDict:
    """Returns the beginning of a paper's config: its name and the scale.

    Raises:
      ValueError: an unknown scale.
    """
    return ConfigDict({"paper": name, "scale": check_scale(scale)})


def section(**values: Any) -> ConfigDict:
    """Returns one section of a paper's config."""
    return ConfigDict(values)


def training(
    *, steps: int, learning_rate: float, batch_size: int, eval_batches: int, **data: Any
) -> ConfigDict:
    """Returns a part of `training.config.default_config()`, with the schedule small runs share.

    The warm-up is a tenth of the steps, validation comes ten times, and b2 is 0.999.

    Args:
      steps: optimizer steps.
      learning_rate: its peak.
      batch_size: sequences a step.
      eval_batches: batches of a validation or a test.
      **data: other keys of the section data, such as sources and seq_len.
    """
    return ConfigDict(
        {
            "data": {"batch_size": batch_size, **data},
            "train": {
                "steps": steps,
                "log_every": steps,
                "eval_every": max(1, steps // 10),
                "eval_batches": eval_batches,
            },
            "optimizer": {
                "learning_rate": learning_rate,
                "warmup_steps": steps // 10,
                "b2": 0.999,
            },
        }
    )


def sharded_training(**changes: Any) -> ConfigDict:
    """Returns the section of a small model that trains on one device and over several.

    Data and seeds are the same, sequences are sharded. The keys that a paper must add are devices,
    seq_len, and those that differ.
    """
    model = dict(n_layers=2, d_model=64, n_heads=4, vocab_size=65, dtypes=("float64", "float32"))
    return section(
        **{
            **model,
            "seeds": (0, 1, 2),
            "batch_size": 4,
            "steps": 150,
            "learning_rate": 3e-3,
            **changes,
        }
    )


def flat(config: ConfigDict) -> dict[str, Any]:
    """Returns {"data.batch_size": 8, ...}: what the settings of a cell hold."""
    return {f"{part}.{key}": value for part, keys in config.items() for key, value in keys.items()}


def smoke_sharded_training(part: ConfigDict, **changes: Any) -> None:
    """Shrinks a `sharded_training` to a model that shows nothing."""
    part.update(n_layers=1, d_model=16, n_heads=2, vocab_size=17, dtypes=("float64",))
    part.update(batch_size=1, seq_len=32, steps=3, seeds=(0,), **changes)


def smoke(config: ConfigDict, *, models: Sequence[str], seeds: Sequence[int] = (0,)) -> None:
    """Shrinks every section that trains to sizes that show nothing and need no download."""
    for part in config.values():
        if isinstance(part, ConfigDict) and "train" in part:
            part.update(models=models, seeds=seeds, d_model=16)
            part.train.data.batch_size = 8
            set_steps(part.train, 2, eval_batches=1)
            if "sources" in part.train.data:
                part.train.data.update(sources=("python_stdlib",), tokenizer="byte", seq_len=16)


def set_steps(config: ConfigDict, steps: int, **train: Any) -> None:
    """Sets the number of steps of a `training` part, and the schedule that follows from it."""
    config.train.update(steps=steps, log_every=steps, eval_every=max(1, steps // 10), **train)
    config.optimizer.warmup_steps = steps // 10
