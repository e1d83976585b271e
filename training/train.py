"""The training loop: one function to read from top to bottom.

    from tilescan.training.config import default_config
    from tilescan.training.train import train

    config = default_config()
    config.train.steps = 500
    final = train(config, "runs/first")

The same call again continues where the run stopped, or returns the final metrics if it was over. A
config file for a command line is a Python file whose `get_config()` returns such a
`default_config()`, edited.

In the work folder: config.json, environment.json, metrics.jsonl and, where samples are asked for,
samples.jsonl and gradient_norms.jsonl (see training.metrics), tensorboard/, checkpoints/;
schedule.txt where a file holds the learning rates.
"""

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import PyTree

from tilescan.training import config as config_lib
from tilescan.training import inputs, programs, sharding, starts, steps, stream_bp, trackers
from tilescan.training import workdir as work
from tilescan.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    DataIterator,
    UnusableCheckpoint,
)
from tilescan.training.environment import compiler_warning
from tilescan.training.interrupts import Interrupts
from tilescan.training.optimizers import check_groups, make_optimizer
from tilescan.training.samples import make_sampler
from tilescan.training.settings import Settings

# Keys that may change when a run is continued: they do not change what is computed.
FREE_ON_RESUME = (
    "train.log_every", "train.eval_every", "train.eval_early", "train.eval_batches",
    "train.checkpoint_every", "train.keep", "train.resume_step", "train.progress",
    "train.tensorboard", "train.tracker", "train.sample_every", "train.sample_prompt",
    "train.sample_tokens", "train.sample_temperature", "train.gradient_norms", "train.logit_chunk",
    "train.stream_chunks", "train.start_from", "train.start_step", "train.start_optimizer",
    "mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor", "mesh.parameters_over_sequence",
    "model.attention_sequence_parallel", "model.scan_sequence_parallel", "model.sequence_balance",
)  # fmt: skip


def train(
    config: config_lib.Config,
    workdir: str | os.PathLike,
    *,
    model: nn.Module | None = None,
    datasets: Mapping[str, Iterable] | None = None,
    params: PyTree | None = None,
    tracker: trackers.Tracker | None = None,
) -> dict[str, float]:
    """Trains a model as configured and returns its final metrics.

    Args:
        config: a ConfigDict of `training.config.default_config()`.
        workdir: folder of the run; a run found there is continued.
        model: a Linen module to train instead of the one that `config.model` describes.
        datasets: {"train", "validation", "test"} instead of what `config.data` describes. Each is
            an iterable of batches (see data.pipelines). The iterator of "train" has get_state and
            set_state, JSON-able, and does not end; "validation" and "test" (evaluated once, at the
            end) are optional.
        params: the parameters to start from instead of random ones, e.g. those of a published
            checkpoint. A run that is continued goes on from its own.
        tracker: is called with step and metrics, tracker(10, {"train/loss": ...}), for each row of
            metrics.jsonl; see `training.trackers`.

    Returns:
        {"step": ..., "<split>/<metric>": ...}: the last row of metrics.jsonl of every split.

    Raises:
        ConfigError: an unknown key or a value that makes no sense, such as a model.vocab_size below
            that of the data.
        ValueError: a batch with tokens, targets or labels that the model does not have, or params
            of another model.
        FloatingPointError: the loss or the gradient is not finite; the last checkpoint is from
            before.
        CheckpointError: a checkpoint cannot be read or written, or belongs to another
            configuration.
        OSError: the work folder cannot be written.
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM, after saving.
    """
    asked = config_lib.settings(config)
    if asked.stages:
        raise config_lib.ConfigError("stages are runs of their own: training.stages trains them")
    trackers.check_installed(asked.train.tracker)
    workdir = work.prepare(workdir)
    if params is not None and asked.train.start_from:
        raise config_lib.ConfigError("params and train.start_from both say what to start from")
    asked = starts.with_start(asked, workdir)

    # Mesh, and the dtype that its devices compute in.
    mesh = sharding.make_mesh(asked.mesh)
    c = work.with_compute_dtype(asked, workdir)
    sharding.check_batch(mesh, c.data.batch_size, c.train.microbatches)
    shard = sharding.data_shard(mesh)
    rows = local_rows(c, shard[1])

    # Data.
    if datasets is None:
        datasets = inputs.make_datasets(c, *shard)
    iterator = iter(datasets["train"])
    example = sharding.in_order(_peek(iterator), mesh, c.balance)

    # Model.
    model = model if model is not None else inputs.make_model(c, datasets)
    inputs.check_vocabulary(model, datasets["train"])
    limits = inputs.id_limits(model)
    inputs.check_ids(example, limits)
    tx, rate = make_optimizer(c.optimizer, c.train.steps)
    loss = make_loss(model, c)

    # Shard.
    sharded = functools.partial(
        sharded_init, model, example=example, seed=c.seed, mesh=mesh, rules=sharding.rules(c.mesh)
    )
    state_shardings, abstract_state, initialize = sharded(tx)
    check_groups(c.optimizer, abstract_state.params)
    sample = make_sampler(model, c, datasets["train"], mesh, abstract_state.params)

    # Steps.
    everywhere = sharding.replicated(mesh)

    def jitted() -> tuple[Callable, Callable]:
        step = steps.make_train_step(loss, tx, rate, c.train.microbatches, c.train.gradient_norms)
        outputs = (state_shardings, everywhere)
        evaluation = steps.make_eval_step(loss)
        return (
            jax.jit(step, out_shardings=outputs, donate_argnums=0),
            jax.jit(evaluation, out_shardings=everywhere),
        )

    train_step, eval_step = programs.kept(model, c, mesh, jitted)

    with contextlib.ExitStack() as stack:
        # Restore.
        saver = Checkpoints(workdir / "checkpoints", c.train.keep, config_lib.as_dict(c))
        stack.callback(saver.close)
        restored = step_to_restore(saver, c)
        work.keep_schedule(c.optimizer, c.train.steps, workdir, restored)
        if restored is None:
            state = initialize()
            if params is not None:
                state = steps.start_from(state, params, state_shardings)
            elif c.train.start_from:
                abstract_of = lambda tx: sharded(tx)[1]
                state = starts.started(c, state, abstract_of, state_shardings)
        else:
            state = saver.restore(restored, abstract_state, iterator)
            saver.drop_after(restored)
        recorder = stack.enter_context(work.records(workdir, c, restored, tracker))
        if c.train.progress and jax.process_index() == 0:
            auto = c.precision != asked.precision
            print(work.summary(c, abstract_state.params, mesh, restored, auto), file=sys.stderr)
            if warning := compiler_warning(mesh.devices.flat[0].platform):
                print(f"warning: {warning}", file=sys.stderr)
            sys.stderr.flush()

        # Evaluations: of "test" once, of all others again and again.
        def validate(step: int) -> None:
            for split in datasets:
                if split.partition("/")[0] == "validation":
                    evaluate(step, split)

        def evaluate(step: int, split: str) -> None:
            sums: dict[str, float] = {}
            for batch in inputs.eval_batches(datasets[split], rows, c.train.eval_batches):
                inputs.check_ids(batch, limits)
                part = jax.device_get(
                    eval_step(state.params, sharding.put_batch(batch, mesh, c.balance))
                )
                sums = {name: sums.get(name, 0.0) + float(x) for name, x in part.items()}
            recorder.row(step, split, eval_metrics(sums, split))
            recorder.restart_clock()

        # Loop.
        pending = None  # (step, its metrics on the device): fetched while the next step runs

        def finish_pending() -> None:
            nonlocal pending
            if pending is None:
                return
            (step, metrics), pending = pending, None
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            check_finite(step, values, saver)
            recorder.count(values["weight"])
            if recorder.gradient_norms is not None:
                norms = {"l2": values["grad_norm"], "l1": values.pop("grad_l1")}
                recorder.gradient_norms.write({"step": step, **norms})
            if step % c.train.log_every == 0 or step == c.train.steps:
                recorder.row(step, "train", values)
                recorder.speed(step, values["loss"])

        stack.enter_context(work.full_disk_is_named(workdir, saver))
        stack.enter_context(sharding.use(mesh))
        stop = stack.enter_context(Interrupts())
        if restored is None:
            validate(0)
        for step in range((restored or 0) + 1, c.train.steps + 1):
            batch = _next(iterator, step, c.train.steps)
            inputs.check_ids(batch, limits)
            batch = sharding.put_batch(batch, mesh, c.balance)
            state, metrics = train_step(state, batch)
            finish_pending()
            pending = (step, metrics)
            last = step == c.train.steps
            early = c.train.eval_early and step < c.train.eval_every and step & (step - 1) == 0
            if last or early or step % c.train.eval_every == 0:
                finish_pending()
                validate(step)
            if last and "test" in datasets:
                evaluate(step, "test")
            if sample and (last or step % c.train.sample_every == 0):
                finish_pending()
                recorder.sample(step, sample(state.params, step))
                recorder.restart_clock()
            # Several processes must stop at the same step, and asking all of them takes time.
            asking = jax.process_count() == 1 or step % c.train.log_every == 0
            stopped = stop.agreed() if asking else None
            every = c.train.checkpoint_every
            if every and (last or stopped or step % every == 0):
                finish_pending()  # raises if it is not finite: that is never saved
                recorder.sync()
                saver.save(step, state, iterator)
                recorder.restart_clock()
            if stopped and not last:
                finish_pending()
                saver.wait()
                stop.raise_for(stopped, step, workdir if every else None)
        saver.wait()
        return work.final_metrics(recorder.metrics.rows)


def make_loss(model: nn.Module, c: Settings) -> Callable:
    """Returns the loss that the configuration asks for: of all tokens at once, or by chunks."""
    if c.train.logit_chunk is None and c.train.stream_chunks is None:
        return steps.make_loss(model, c.task, c.train.z_loss)
    return stream_bp.stream_loss(
        model,
        chunks=c.train.stream_chunks,
        logit_chunk=c.train.logit_chunk or stream_bp.LOGIT_CHUNK,
        z_loss=c.train.z_loss,
    )


def sharded_init(
    model: nn.Module,
    tx: optax.GradientTransformation,
    example: dict,
    seed: int,
    mesh: Mesh,
    rules: sharding.Rules = sharding.RULES,
) -> tuple[steps.TrainState, steps.TrainState, Callable[[], steps.TrainState]]:
    """Returns the TrainState's (shardings, abstract state, initialize()), the last on the mesh.

    The values depend on the seed, and on the mesh in their last bits alone.
    """

    def init():
        return steps.init_state(model, tx, example, seed)

    # Shapes, and the sharding of each leaf by its logical axis names.
    with sharding.use(mesh):
        boxed = jax.eval_shape(init)
    params = nn.meta.unbox(boxed.params)
    where = sharding.param_shardings(boxed.params, mesh, rules)
    everywhere = sharding.replicated(mesh)
    masters = None
    if boxed.masters is not None:  # each lies where its parameter lies
        masters = jax.tree.map(lambda p, at: at if steps.is_narrow(p) else None, params, where)
    shardings = steps.TrainState(
        step=everywhere,
        params=where,
        opt_state=sharding.optimizer_shardings(tx, params, where, mesh),
        key=everywhere,
        masters=masters,
    )
    abstract = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        boxed.replace(params=params),
        shardings,
    )

    def unboxed():
        state = init()
        return state.replace(params=nn.meta.unbox(state.params))

    def initialize():
        with sharding.use(mesh):
            return jax.jit(unboxed, out_shardings=shardings)()

    return shardings, abstract, initialize


def step_to_restore(saver: Checkpoints, c: Settings) -> int | None:
    """Returns the step to continue from, or None to start afresh.

    Raises:
        CheckpointError: train.resume_step has no checkpoint.
        UnusableCheckpoint: it cannot be read, or its configuration differs in a key that changes
            what is computed; the keys are named with both values.
    """
    # The step that was asked for, or the newest.
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

    # Its configuration, but for what does not change the numbers.
    free = set(FREE_ON_RESUME)
    if c.optimizer.endless:
        free.add("train.steps")  # it does not look at the end: training longer is the same run
    differing = config_lib.differing_keys(config_lib.as_dict(c), saver.config_at(step))
    listed = "; ".join(
        f"{key} = {ours!r}, was {theirs!r}"
        for key, (ours, theirs) in differing.items()
        if key not in free
    )
    if listed:
        raise UnusableCheckpoint(
            f"{saver.path(step)} was written with another configuration: {listed}. Set these keys "
            "back to continue, or choose another workdir for a new run"
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
                "Lower optimizer.learning_rate, raise optimizer.warmup_steps or set "
                "optimizer.clip_norm, in a new workdir; JAX_DEBUG_NANS=True in the environment "
                "names the operation"
            )


def local_rows(c: Settings, shards: int) -> int:
    """Returns the rows of a batch that this process feeds, as one of `shards` groups."""
    if c.data.batch_size % shards:
        raise ValueError(
            f"data.batch_size = {c.data.batch_size} must be a multiple of the {shards} groups of "
            "processes that feed it"
        )
    return c.data.batch_size // shards


def eval_metrics(sums: dict[str, float], split: str) -> dict[str, float]:
    """Returns means over the tokens of an evaluation.

    Raises:
        ValueError: no token counts.
    """
    if not sums.get("weight"):
        raise ValueError(f"the {split} data hold no token that counts: give it more documents")
    nll = sums["nll"] / sums["weight"]
    return {
        "loss": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        "accuracy": sums["correct"] / sums["weight"],
        "exact": sums["exact"] / sums["rows"],
        "weight": sums["weight"],
    }


def _peek(iterator: DataIterator) -> dict:
    """Returns the first batch, for its shapes; the iterator is put back."""
    state = iterator.get_state()
    batch = next(iterator)
    iterator.set_state(state)
    return batch


def _next(iterator: DataIterator, step: int, total: int) -> dict:
    try:
        return next(iterator)
    except StopIteration:
        raise ValueError(
            f"the training data ended before step {step} of train.steps = {total}: repeat them "
            "(num_epochs=None)"
        ) from None
