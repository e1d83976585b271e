"""The training loop: one function to read from top to bottom.

    from training.config import default_config
    from training.train import train

    config = default_config()
    config.train.steps = 500
    final = train(config, "runs/first")

The same call again continues where the run stopped, or returns the final metrics if it was over. A
config file for a command line is a Python file whose `get_config()` returns such a
`default_config()`, edited.

In the work folder: config.json, environment.json, metrics.jsonl (see training.metrics),
tensorboard/, checkpoints/.
"""

import contextlib
import json
import math
import pathlib

import jax
from flax import linen as nn

from training import config as config_lib
from training import inputs, sharding, steps
from training.checkpoints import CheckpointError, Checkpoints, is_full_disk
from training.environment import environment
from training.interrupts import Interrupts
from training.metrics import Recorder, write_atomically
from training.optimizers import check_groups, make_optimizer

# Keys that may change when a run is continued: they do not change what is computed.
FREE_ON_RESUME = (
    "train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every",
    "train.keep", "train.resume_step", "train.progress", "train.tensorboard",
    "mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor",
)  # fmt: skip


def train(config, workdir, *, model=None, datasets=None) -> dict:
    """Trains a model as configured and returns its final metrics.

    Args:
        config: a ConfigDict of `training.config.default_config()`.
        workdir: folder of the run; a run found there is continued.
        model: a Linen module to train instead of the one that `config.model` describes.
        datasets: {"train", "validation", "test"} instead of what `config.data` describes. Each is
            an iterable of batches (see data.pipelines). The iterator of "train" has get_state and
            set_state, JSON-able, and does not end; "validation" and "test" (evaluated once, at the
            end) are optional.

    Returns:
        {"step": ..., "<split>/<metric>": ...}: the last row of metrics.jsonl of every split.

    Raises:
        ConfigError: an unknown key or a value that makes no sense.
        FloatingPointError: the loss or the gradient is not finite; the last checkpoint is from
            before.
        CheckpointError: a checkpoint cannot be read or written, or belongs to another
            configuration.
        OSError: the work folder cannot be written.
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM, after saving.
    """
    c = config_lib.settings(config)
    workdir = _prepare(workdir)

    # Mesh.
    mesh = sharding.make_mesh(c.mesh)
    sharding.check_batch(mesh, c.data.batch_size, c.train.microbatches)

    # Data.
    if datasets is None:
        datasets = inputs.make_datasets(c)
    iterator = iter(datasets["train"])
    example = _peek(iterator)

    # Model.
    model = model if model is not None else inputs.make_model(c, datasets)
    tx, rate = make_optimizer(c.optimizer, c.train.steps)
    loss = steps.make_loss(model, c.task, c.train.z_loss)

    # Shard.
    state_shardings, abstract_state, initialise = sharded_init(model, tx, example, c.seed, mesh)
    check_groups(c.optimizer, abstract_state.params)

    # Step.
    everywhere = sharding.replicated(mesh)
    train_step = jax.jit(
        steps.make_train_step(loss, tx, rate, c.train.microbatches),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )
    eval_step = jax.jit(steps.make_eval_step(loss), out_shardings=everywhere)

    # Restore.
    saver = Checkpoints(workdir / "checkpoints", c.train.keep, config_lib.as_dict(c))
    restored = step_to_restore(saver, c)
    if restored is None:
        state = initialise()
    else:
        state = saver.restore(restored, abstract_state, iterator)
        saver.drop_after(restored)
    recorder = _start_records(workdir, c, restored)

    # Evaluations.
    def evaluate(step: int, split: str) -> None:
        if split not in datasets:
            return
        sums: dict[str, float] = {}
        for batch in inputs.eval_batches(datasets[split], local_rows(c), c.train.eval_batches):
            for name, value in jax.device_get(
                eval_step(state.params, sharding.put_batch(batch, mesh))
            ).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        if not sums.get("weight"):
            raise ValueError(f"the {split} data hold no token that counts: give it more documents")
        recorder.row(step, split, _eval_metrics(sums))
        recorder.restart_clock()

    # Loop.
    pending = (
        None  # (step, metrics on the device) of the step before: fetched while the next one runs
    )

    def finish_pending() -> None:
        nonlocal pending
        if pending is None:
            return
        step, metrics = pending
        pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        check_finite(step, values, saver)
        recorder.count(values["weight"])
        if step % c.train.log_every == 0 or step == c.train.steps:
            recorder.row(step, "train", values)
            recorder.speed(step, values["loss"])

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Interrupts())
        stack.callback(saver.close)
        stack.callback(recorder.close)
        stack.enter_context(_full_disk_is_named(workdir, saver))
        stack.enter_context(sharding.use(mesh))
        if restored is None:
            evaluate(0, "validation")
        for step in range((restored or 0) + 1, c.train.steps + 1):
            batch = sharding.put_batch(_next(iterator, step, c.train.steps), mesh)
            state, metrics = train_step(state, batch)
            finish_pending()
            pending = (step, metrics)
            last = step == c.train.steps
            if last or step % c.train.eval_every == 0:
                finish_pending()
                evaluate(step, "validation")
            if last:
                evaluate(step, "test")
            ask = jax.process_count() == 1 or step % c.train.log_every == 0
            stopped = stop.agreed() if ask else None
            if c.train.checkpoint_every and (
                last or stopped or step % c.train.checkpoint_every == 0
            ):
                finish_pending()  # so that nothing that is not finite is ever saved
                recorder.sync()
                saver.save(step, state, iterator)
                recorder.restart_clock()
            if stopped and not last:
                finish_pending()
                saver.wait()
                stop.raise_for(stopped, step, workdir if c.train.checkpoint_every else None)
        saver.wait()
        return final_metrics(recorder.metrics.rows)


def sharded_init(model: nn.Module, tx, example: dict, seed: int, mesh):
    """Returns the TrainState's (shardings, abstract state, initialise()), the last on the mesh.

    The values depend on the seed, and on the mesh in their last bits alone.
    """

    def init():
        return steps.init_state(model, tx, example, seed)

    with sharding.use(mesh):
        boxed = jax.eval_shape(init)
    params = nn.meta.unbox(boxed.params)
    where = sharding.param_shardings(boxed.params, mesh)
    everywhere = sharding.replicated(mesh)
    shardings = steps.TrainState(
        step=everywhere,
        params=where,
        opt_state=sharding.optimizer_shardings(tx, params, where, mesh),
        key=everywhere,
    )
    abstract = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        boxed.replace(params=params),
        shardings,
    )

    def unboxed():
        state = init()
        return state.replace(params=nn.meta.unbox(state.params))

    def initialise():
        with sharding.use(mesh):
            return jax.jit(unboxed, out_shardings=shardings)()

    return shardings, abstract, initialise


def step_to_restore(saver: Checkpoints, c: config_lib.Settings) -> int | None:
    """The step to continue from, or None to start afresh.

    Raises:
        CheckpointError: train.resume_step has no checkpoint, or the checkpoint's configuration
            differs in a key that changes what is computed; the keys are named with both values.
    """
    saved = saver.steps()
    wanted = c.train.resume_step
    if wanted is not None and wanted not in saved:
        raise CheckpointError(
            f"train.resume_step = {wanted} has no checkpoint in {saver.directory}; there are "
            f"{saved or 'none'}"
        )
    if not saved:
        return None
    step = saved[-1] if wanted is None else wanted
    free = set(FREE_ON_RESUME)
    if c.optimizer.schedule in ("constant", "inverse_sqrt"):
        free.add(
            "train.steps"
        )  # these schedules do not look at the end: training longer is the same run
    differing = {
        key: values
        for key, values in config_lib.differing_keys(
            config_lib.as_dict(c), saver.config_at(step)
        ).items()
        if key not in free
    }
    if differing:
        listed = "; ".join(f"{key} = {new!r}, was {old!r}" for key, (new, old) in differing.items())
        raise CheckpointError(
            f"{saver.path(step)} was written with another configuration: {listed}. Set these keys "
            "back to continue, "
            "or choose another workdir for a new run"
        )
    return step


def check_finite(step: int, values: dict[str, float], saver: Checkpoints) -> None:
    """Raises FloatingPointError, with what to do, if loss or gradient is NaN or infinite."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            saver.wait()
            good = saver.steps()
            kept = (
                f"the checkpoint of step {good[-1]} is from before"
                if good
                else "no checkpoint was saved yet"
            )
            raise FloatingPointError(
                f"{name} is {values[name]} at step {step} (loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}, learning rate {values['learning_rate']:.3g}); {kept}. "
                "Lower "
                "optimizer.learning_rate, raise optimizer.warmup_steps or set optimizer.clip_norm, "
                "in a new workdir; "
                "JAX_DEBUG_NANS=True in the environment names the operation"
            )


def final_metrics(rows: list[dict]) -> dict:
    """{"step": last, "<split>/<metric>": value} from the last row of every split."""
    final: dict = {}
    for row in rows:
        final["step"] = row["step"]
        final |= {f"{row['split']}/{k}": v for k, v in row.items() if k not in ("step", "split")}
    return final


def local_rows(c: config_lib.Settings) -> int:
    """Rows of a batch that this process feeds."""
    if c.data.batch_size % jax.process_count():
        raise ValueError(
            f"data.batch_size = {c.data.batch_size} must be a multiple of the "
            f"{jax.process_count()} processes"
        )
    return c.data.batch_size // jax.process_count()


def _eval_metrics(sums: dict[str, float]) -> dict[str, float]:
    nll = sums["nll"] / sums["weight"]
    return {
        "loss": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        "accuracy": sums["correct"] / sums["weight"],
        "weight": sums["weight"],
    }


def _prepare(workdir) -> pathlib.Path:
    """Makes the work folder and proves that it can be written, before anything that takes time."""
    workdir = pathlib.Path(workdir).absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable_{jax.process_index()}"
        write_atomically(probe, "")
        probe.unlink()
    except OSError as error:
        why = "its disk is full" if is_full_disk(error) else error.strerror
        raise OSError(
            error.errno,
            f"the workdir {workdir} cannot be written ({why}): choose another one or change its "
            "permissions",
        ) from error
    return workdir


@contextlib.contextmanager
def _full_disk_is_named(workdir, saver: Checkpoints):
    """A write of metrics that fails for want of space says so, and what still stands."""
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise CheckpointError(f"the disk of {workdir} is full. {saver.standing()}") from error


def _peek(iterator) -> dict:
    """The first batch, for its shapes; the iterator is put back."""
    state = iterator.get_state()
    batch = next(iterator)
    iterator.set_state(state)
    return batch


def _next(iterator, step: int, total: int) -> dict:
    try:
        return next(iterator)
    except StopIteration:
        raise ValueError(
            f"the training data ended before step {step} of train.steps = {total}: repeat them "
            "(num_epochs=None)"
        ) from None


def _start_records(workdir: pathlib.Path, c: config_lib.Settings, restored: int | None) -> Recorder:
    """Process 0 records in the work folder, the others in folders of their own below it."""
    first = jax.process_index() == 0
    place = workdir if first else workdir / f"process_{jax.process_index()}"
    place.mkdir(exist_ok=True)
    if first:
        write_atomically(place / "config.json", json.dumps(config_lib.as_dict(c), indent=2) + "\n")
    write_atomically(place / "environment.json", json.dumps(environment(), indent=2) + "\n")
    return Recorder(
        place,
        restored,
        c.train.steps,
        tensorboard=c.train.tensorboard and first,
        progress=c.train.progress and first,
    )
