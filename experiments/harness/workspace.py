"""Where a cell may keep files while it is measured, and the trained models that cells share."""

import dataclasses
import functools
import pathlib
import shutil
import warnings
from collections.abc import Mapping
from typing import Any

from tilescan.experiments.harness import records as records_lib
from tilescan.experiments.harness import shared_models
from tilescan.experiments.harness.locks import locked
from tilescan.experiments.harness.shared_models import Make, Trained
from tilescan.files import write_atomically
from tilescan.training.checkpoints import UnusableCheckpoint
from tilescan.training.trained import finished_step, load_trained


@dataclasses.dataclass(frozen=True)
class Workspace:
    """A cell's folders, and the models that it shares with other cells.

    Attributes:
      folder: the cell's own scratch space, kept when the cell fails or is interrupted, so that
        training can resume in it; removed when the cell is done.
      models: where all cells of a run keep their trained models, a folder each, named by a digest
        of settings and seed; they stay. None: there are none to share.
      timeout: seconds to wait for another process that trains the same model.
      used: {digest: {"settings", "seed"}} of the models that were asked for.
    """

    folder: pathlib.Path
    models: pathlib.Path | None = None
    timeout: float = 24 * 3600.0
    used: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def trained(self, settings: Mapping[str, Any], seed: int, make: Make | None = None) -> Trained:
        """Returns the model of these settings and this seed, trained by the first that asks.

        A training that was interrupted goes on. Of two processes that ask at once one trains and
        the other one waits. A damaged folder is set aside with a warning, and trained again.

        Args:
          settings: all that the model depends on, as plain values: {"train": keys of the training
            config} with, for an exact task instead of text, "task", "options" and "train_examples"
            as of `measurements.training.measure_task`; or {"checkpoint": "smollm2", "dtype":
            "float32" or "bfloat16"} for a published one.
          seed: of the training.
          make: trains instead of `shared_models.train_as_set`, by other data or from other
            parameters, and saves its last step as `training.train.train` does; what it depends on
            must be in the settings too, under keys of any name.

        Raises:
          ValueError: settings that say nothing to train, or keys that nothing reads.
          TimeoutError: another process trains the same model for too long.
          ConfigError, FloatingPointError, OSError: as of `training.train.train`.
        """
        if self.models is None:
            raise ValueError("this workspace has no folder of models: Workspace(folder, models)")
        digest = shared_models.digest(settings, seed)
        folder = self.models / digest
        if "checkpoint" in settings:
            found = shared_models.published(settings, folder)
        else:
            config = shared_models.training_config(settings, seed)
            if make is None:
                shared_models.check_keys(settings)
                make = functools.partial(shared_models.train_as_set, settings)
            with locked(self.models / f"{digest}.lock", self.timeout):
                found = self._trained_or_read(config, folder, make)
        self.used[digest] = {"settings": records_lib.plain(settings), "seed": seed}
        write_atomically(folder / "model.json", records_lib.dumps(self.used[digest]))
        return found

    def _trained_or_read(self, config, folder: pathlib.Path, make: Make) -> Trained:
        """Reads the model, trained first where it is not; again where its files are damaged."""

        def once() -> Trained:
            if finished_step(config, folder) is None:
                make(config, folder)
            return Trained(*load_trained(config, folder), folder)

        try:
            return once()
        except UnusableCheckpoint as error:
            aside = folder.with_name(f"{folder.name}.damaged")
            warnings.warn(f"{error} The model is trained again; {aside} keeps it", stacklevel=3)
        shutil.rmtree(aside, ignore_errors=True)
        folder.replace(aside)
        return once()
