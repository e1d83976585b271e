"""The papers that can be reproduced: one folder of experiments/papers and one config file each."""

import importlib
from collections.abc import Collection, Sequence
from typing import Any

import ml_collections

from tilescan.configs.common import SCALES, check_scale
from tilescan.experiments.harness.catalogue import NAMES
from tilescan.experiments.harness.cells import Paper
from tilescan.spelling import did_you_mean
from tilescan.training.config import override


def nearest(name: str, known: Collection[str]) -> str:
    """Returns a hint for a mistyped name: the nearest known one, and all of them."""
    return f"{did_you_mean(name, known)}(known: {', '.join(known)})"


def load(name: str) -> Paper:
    """Returns the paper's definition.

    Raises:
      ValueError: no such paper; the message names the nearest.
    """
    if name not in NAMES:
        raise ValueError(f"paper={name!r} is unknown; {nearest(name, NAMES)}")
    return importlib.import_module(f"tilescan.experiments.papers.{name}").PAPER


def load_config(name: str, scale: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Returns the paper's config at a scale, with overrides such as "--config.runtime.repeats=3".

    The config is locked: it cannot grow keys.

    Raises:
      ValueError: unknown paper, scale or key (the nearest is named), or a value of a wrong type.
    """
    load(name)
    config = (
        importlib.import_module(f"tilescan.configs.{name}").get_config(check_scale(scale)).lock()
    )
    apply_overrides(config, overrides)
    return config


def apply_overrides(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> None:
    """Sets values of a paper's config in place.

    Raises:
      ValueError: as `training.config.override`; a size below 1; or it is the paper or the scale
        that is set, which would give the measurements another's name.
    """
    for assignment in overrides:
        key = assignment.removeprefix("--config.").partition("=")[0]
        if key in ("paper", "scale"):
            raise ValueError(
                f"{assignment} would misname the records: choose the paper and the scale by "
                f"`tilescan run PAPER --scale=SCALE` or --config=configs/PAPER.py:SCALE"
            )
        before = _value(config, key)
        override(config, assignment)
        _check_size(key, before, _value(config, key), config.paper)


def _check_size(key: str, old: Any, new: Any, paper: str) -> None:
    """Raises ValueError for a negative number, and for 0 where no scale of the paper has it.

    Parts of a training config are checked by `training.settings`, where 0 often has a meaning.
    """
    for item in new if isinstance(new, tuple) else (new,):
        if not isinstance(item, int | float) or isinstance(item, bool):
            continue
        nothing = item == 0 and not isinstance(new, tuple) and ".train." not in key
        if item < 0 or nothing and not any(value == 0 for value in _at_all_scales(key, paper)):
            name = key.rpartition(".")[2]
            raise ValueError(f"{name}={item} must be a positive number, e.g. {old!r}")


def _at_all_scales(key: str, paper: str) -> list[Any]:
    module = importlib.import_module(f"tilescan.configs.{paper}")
    return [_value(module.get_config(scale), key) for scale in SCALES]


def _value(config: ml_collections.ConfigDict, key: str) -> Any:
    """Returns the value at a dotted key, None where there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, ml_collections.ConfigDict) else None
    return config
