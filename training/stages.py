"""A run in stages: one run after another, each with data, schedule and steps of its own.

    config.stages = (
        {"name": "english", "data.sources": ("shakespeare",), "train.steps": 2000},
        {"name": "german", "data.sources": ("german.txt",), "train.steps": 800,
         "data.replay": 0.05, "data.replay_sources": ("shakespeare",)},
    )
    train_stages(config, "runs/both")

A stage is the run in the folder WORKDIR/NAME: it has its own metrics and checkpoints, starts from
the newest checkpoint of the stage before unless its train.start_from says otherwise, and resets the
optimizer unless its train.start_optimizer keeps it. Interrupted, the same call goes on in the stage
where it was.
"""

import os
from collections.abc import Mapping

import ml_collections
from etils import epath

from tilescan.training import config as config_lib
from tilescan.training.config_errors import ConfigError
from tilescan.training.train import train


def stage_configs(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> dict[str, ml_collections.ConfigDict]:
    """Returns {name: the config of its run} of each stage, in order.

    Args:
      config: with `stages`, a tuple of {dotted key: value}, and "name"; what no stage sets is for
        all.
      workdir: of all stages.

    Raises:
      ConfigError: no stages, two of one name, an unknown key or a value that makes no sense; says
        in which stage.
    """
    if not config.stages:
        raise ConfigError("stages is empty: it must be a tuple of {key: value}, one for each stage")
    made: dict[str, ml_collections.ConfigDict] = {}
    for number, stage in enumerate(config.stages, 1):
        if not isinstance(stage, Mapping):
            raise ConfigError(f"stages: stage {number} is {stage!r}, not a mapping of keys")
        keys = dict(stage)
        name = str(keys.pop("name", f"stage_{number}"))
        if name in made or not name or "/" in name:
            raise ConfigError(
                f"stages: stage {number} needs a name of its own, without '/', not {name!r}"
            )
        own = config.copy_and_resolve_references()
        own.unlock()
        own.stages = ()
        if made:
            own.train.start_from = str(epath.Path(workdir) / list(made)[-1])
            own.train.update(start_step=None, start_optimizer=False, resume_step=None)
        own.lock()
        known = [key for key in config_lib.known_keys(own) if key != "stages"]
        for key in keys:
            if key not in known:
                raise ConfigError(
                    f"stages: stage {name!r}: unknown key {key!r}; did you mean "
                    f"{config_lib.nearest_key(key, known)!r}?"
                )
        try:
            own.update_from_flattened_dict(keys)
            config_lib.settings(own)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"stages: stage {name!r}: {error}") from error
        last = number == len(config.stages)
        if not last and not own.train.checkpoint_every:
            raise ConfigError(
                f"stages: stage {name!r}: train.checkpoint_every = 0 leaves nothing for the next "
                "stage to start from"
            )
        made[name] = own
    return made


def train_stages(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> dict[str, dict[str, float]]:
    """Trains all stages, those that are finished excepted; returns {name: final metrics}.

    Args:
      config: see `stage_configs`.
      workdir: folder of the stages' folders.

    Raises:
      ConfigError: before anything is trained, see `stage_configs`; else as of `train.train`.
    """
    configs = stage_configs(config, workdir)
    return {name: train(own, epath.Path(workdir) / name) for name, own in configs.items()}
