"""Where else a run's numbers go: a tracker is a function of a step and of metrics.

    train(config, "runs/first", tracker=lambda step, metrics: mlflow.log_metrics(metrics, step))

`train.tracker = "wandb"` is Weights & Biases: its environment variables (WANDB_PROJECT, WANDB_MODE=
offline, which needs no network, ...) hold. A run that is continued continues there as well.
"""

import contextlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping

from etils import epath

from tilescan.files import is_on_disk
from tilescan.training.paths import write_whole
from tilescan.training.settings import ConfigError

# Called with a step and {"<split>/<metric>": value}: each row of metrics.jsonl, and the speed.
Tracker = Callable[[int, Mapping[str, float]], None]


def check_installed(name: str) -> None:
    """Raises ConfigError, with the command that installs it, for a tracker that is not there."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"train.tracker = {name!r} needs the package {name}: pip install -e .[{name}]"
        )


@contextlib.contextmanager
def weights_and_biases(
    workdir: epath.Path, config: Mapping, restored: int | None
) -> Iterator[Tracker]:
    """Gives a tracker that logs to Weights & Biases; the run ends there with the context.

    Its id is kept in the work folder (tracker.json): a run that is continued goes on under it, and
    rows of steps that are there already are left out. Its name is the work folder's unless
    WANDB_NAME says another, its project WANDB_PROJECT or "tilescan".

    Args:
        workdir: of the run.
        config: JSON-able; logged with the run.
        restored: the step that the run goes on from, None at the beginning.

    Raises:
        RuntimeError: there is no account and no offline mode, or the service refuses the run.
    """
    import wandb  # the extra [wandb]

    # The id of the run: the kept one, or a new one.
    kept = workdir / "tracker.json"
    if restored is None or not kept.exists():
        write_whole(kept, json.dumps({"wandb": uuid.uuid4().hex[:12]}) + "\n")
    identity = json.loads(kept.read_text())["wandb"]

    try:
        run = wandb.init(
            id=identity,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "tilescan"),
            name=os.environ.get("WANDB_NAME", workdir.name),
            dir=str(workdir) if is_on_disk(workdir) else None,
            config=dict(config),
        )
    except wandb.Error as error:
        raise RuntimeError(
            f"train.tracker = 'wandb': {str(error).rstrip('.')}; WANDB_MODE=offline needs neither "
            "account nor network"
        ) from error
    status = 1
    try:
        yield lambda step, metrics: run.log(dict(metrics), step=step)
        status = 0
    finally:
        run.finish(exit_code=status)
