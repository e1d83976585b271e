"""The work folder of a run: proof that it can be written, its records, what a full disk says."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator

import jax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree

from tilescan.training import config as config_lib
from tilescan.training.checkpoints import CheckpointError, Checkpoints, is_full_disk
from tilescan.training.environment import environment
from tilescan.training.metrics import Recorder
from tilescan.training.paths import writable_path, write_whole
from tilescan.training.schedule_config import FILE, ScheduleConfig
from tilescan.training.schedules import read_schedule
from tilescan.training.settings import AUTO, Settings
from tilescan.training.trackers import Tracker, weights_and_biases


def prepare(workdir: str | os.PathLike) -> epath.Path:
    """Makes the work folder and proves that it can be written, before anything that takes time.

    Raises:
        ValueError: an empty path, or one with a scheme that can't be written, as
            `training.paths.writable_path` says.
        OSError: it cannot be written; says why and what to do.
    """
    workdir = writable_path(workdir, "workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable_{jax.process_index()}"
        write_whole(probe, " " * 4096)  # an empty file fits on a full disk
        probe.unlink()
    except OSError as error:
        why, do = error.strerror or str(error), "choose another one or change its permissions"
        if is_full_disk(error):
            why, do = "its disk is full", "make room, then run the same command"
        raise OSError(f"the workdir {workdir} cannot be written ({why}): {do}") from error
    return workdir


@contextlib.contextmanager
def full_disk_is_named(workdir: epath.Path, saver: Checkpoints) -> Iterator[None]:
    """Makes a write of metrics that fails for want of space say so, and what still stands."""
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise CheckpointError(f"the disk of {workdir} is full. {saver.standing()}") from error


def with_compute_dtype(
    c: Settings, workdir: str | os.PathLike, platform: str | None = None
) -> Settings:
    """Returns the settings with what precision.compute_dtype=auto is in a work folder.

    A run that has a checkpoint keeps the dtype it began with; a new one takes the devices'.

    Args:
        c: the settings.
        workdir: the run's work folder.
        platform: of the devices; None takes this machine's.
    """
    workdir = epath.Path(workdir)
    if c.precision.compute_dtype != AUTO:
        return c
    if saved_steps(workdir):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads((workdir / "config.json").read_text())["precision"]["compute_dtype"]
            return dataclasses.replace(
                c, precision=dataclasses.replace(c.precision, compute_dtype=kept)
            )
    return c.on(jax.default_backend() if platform is None else platform)


def keep_schedule(
    config: ScheduleConfig, steps: int, workdir: str | os.PathLike, restored: int | None
) -> None:
    """Keeps a copy of a schedule that is a file, as schedule.txt, in the work folder.

    Raises:
        ConfigError: a file without numbers for all steps.
        CheckpointError: the run that goes on began with other numbers; says which.
    """
    if not config.schedule.startswith(FILE):
        return
    now = read_schedule(config.schedule.removeprefix(FILE), steps).tolist()
    kept = epath.Path(workdir) / "schedule.txt"
    if restored is not None and kept.exists():
        then = read_schedule(kept, steps).tolist()
        if differing := [t for t in range(steps) if now[t] != then[t]]:
            t = differing[0]
            raise CheckpointError(
                f"{config.schedule} is not what the run in {workdir} began with ({kept}): update "
                f"{t} is {now[t]} of the peak, was {then[t]}. Choose another workdir for a new run"
            )
    if jax.process_index() == 0:
        write_whole(kept, "".join(f"{number}\n" for number in now))


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps of a run's checkpoints, in no order; none where there is no run."""
    folder = epath.Path(workdir) / "checkpoints"
    found = folder.iterdir() if folder.exists() else ()
    return [int(path.name) for path in found if path.name.isdigit()]


@contextlib.contextmanager
def records(
    workdir: epath.Path, c: Settings, restored: int | None, tracker: Tracker | None = None
) -> Iterator[Recorder]:
    """Opens the records: process 0's in the work folder, the others' in folders below it.

    Args:
        workdir: of the run.
        c: its settings.
        restored: the step that it goes on from, None at the beginning.
        tracker: is told the metrics as well, by process 0, beside what train.tracker names.
    """
    first = jax.process_index() == 0
    place = workdir if first else workdir / f"process_{jax.process_index()}"
    place.mkdir(exist_ok=True)
    if first:
        write_whole(place / "config.json", json.dumps(config_lib.as_dict(c), indent=2) + "\n")
    write_whole(place / "environment.json", json.dumps(environment(), indent=2) + "\n")
    with contextlib.ExitStack() as stack:
        told = [tracker] if tracker and first else []
        if c.train.tracker == "wandb" and first:
            config = config_lib.as_dict(c)
            told.append(stack.enter_context(weights_and_biases(workdir, config, restored)))
        recorder = Recorder(
            place,
            restored,
            c.train.steps,
            tensorboard=c.train.tensorboard and first,
            progress=c.train.progress and first,
            samples=c.train.sample_every > 0,
            gradient_norms=c.train.gradient_norms,
            trackers=told,
        )
        stack.callback(recorder.close)
        yield recorder


def summary(
    c: Settings, params: PyTree, mesh: Mesh, restored: int | None, auto: bool = False
) -> str:
    """Says in a line what a run is about to do: its size, its devices, where it starts.

    Args:
        c: the run's settings.
        params: the model's parameters, or their shapes.
        mesh: the devices.
        restored: the step that it goes on from, None at the beginning.
        auto: whether precision.compute_dtype was left to the devices.
    """
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    kind = mesh.devices.flat[0].device_kind
    start = f"steps 1 to {c.train.steps}"
    if restored is not None:
        start = f"continues from step {restored} to {c.train.steps}"
    if restored == c.train.steps:
        start = f"already finished at step {restored}"
    return (
        f"{count:,} parameters in {c.precision.param_dtype}, computed in "
        f"{c.precision.compute_dtype}{' (auto)' if auto else ''}; "
        f"{c.data.batch_size * c.data.seq_len:,} tokens a step on {mesh.size} x {kind}; {start}"
    )


def final_metrics(rows: list[dict]) -> dict:
    """Returns {"step": last, "<split>/<metric>": value} from the last row of every split."""
    final: dict = {}
    for row in rows:
        final["step"] = row["step"]
        final |= {f"{row['split']}/{k}": v for k, v in row.items() if k not in ("step", "split")}
    return final
