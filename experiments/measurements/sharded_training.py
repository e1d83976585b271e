"""Trainings of one small model on one device and with the sequence sharded over several."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from tilescan.experiments.harness.claims import Verdict, every, listed
from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import Spread, spread
from tilescan.experiments.harness.tables import MEASURED, Column, Table, columns, table
from tilescan.experiments.measurements.devices import devices
from tilescan.experiments.measurements.words import recorded
from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.earlier_configs import current_fields
from tilescan.training import sharding, steps
from tilescan.training.settings import MeshConfig
from tilescan.training.train import sharded_init

PARITY = 1e-4  # how far losses over devices may be from those of one
ALL_STEPS = {"max abs. difference from one device": None}
# Of a group of records that differ in their seeds.
DEVICES = Column("devices", of=lambda group: str(group.first.settings["parts"]))
DTYPE = Column("dtype", of=lambda group: group.first.settings["dtype"])


def training_settings(section: ConfigDict, *, masked: bool = False, **model: Any) -> dict[str, Any]:
    """Returns settings of `train`, but for "parts" and "dtype".

    Args:
      section: of a paper's config, with training's keys.
      masked: see `train`.
      **model: fields of LanguageModelConfig but for those of the section.
    """
    fields = {"vocab_size": section.vocab_size, "d_model": section.d_model}
    return recorded(
        section,
        *("batch_size", "seq_len", "steps", "learning_rate"),
        kind="training",
        masked=masked,
        model={**fields, "repeats": section.n_layers, **model},
    )


def train(settings: Mapping[str, Any], seed: int) -> dict:
    """Trains a small model with its sequences sharded over devices: {"losses": of every step}.

    Settings: "model", fields of LanguageModelConfig of this or an earlier version; "parts",
    devices along time; "batch", "length", "steps", Adam's learning "rate"; "masked", True for
    guessing hidden tokens and False for the next ones; "dtype" of parameters and layers (gradients
    and Adam's moments are float32).
    """
    s = settings
    mesh = sharding.make_mesh(MeshConfig(data=1, sequence=s["parts"]), devices(s["parts"]))
    with jax.enable_x64(s["dtype"] == "float64"):
        return {"losses": list(_losses(s, seed, mesh))}


def _losses(s, seed, mesh) -> Iterator[float]:
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in s["model"].items()}
    fields |= {"dtype": s["dtype"], "param_dtype": s["dtype"]}
    model = LanguageModel(LanguageModelConfig(**current_fields(fields)))
    batches = markov_chains(s["model"]["vocab_size"], s["batch"], s["length"], s["masked"], seed)
    tx = optax.adam(s["rate"])
    where, _, initialise = sharded_init(model, tx, next(batches), seed, mesh)
    loss = steps.make_loss(model, "language_model")
    step = jax.jit(
        steps.make_train_step(loss, tx, lambda _: s["rate"]),
        out_shardings=(where, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    with sharding.use(mesh):
        state = initialise()
        for _ in range(s["steps"]):
            state, metrics = step(state, sharding.put_batch(next(batches), mesh))
            yield float(metrics["loss"])


def markov_chains(vocab: int, batch: int, length: int, masked: bool, seed: int) -> Iterator[dict]:
    """Yields batches of a Markov chain in which a token has four successors.

    With `masked`, 15% of the tokens are replaced by the last token, which the chain lacks, and
    count; else all do, and targets are the next tokens.
    """
    rng = np.random.default_rng(seed)
    words = vocab - 1
    successors = rng.integers(0, words, (words, 4))
    odds = np.cumsum(rng.dirichlet(np.ones(4), words), axis=1)
    while True:
        rows = np.empty((batch, length + 1), np.int32)
        rows[:, 0] = rng.integers(0, words, batch)
        uniform = rng.random((batch, length))
        for t in range(length):
            now = rows[:, t]
            choice = np.minimum((uniform[:, t, None] > odds[now]).sum(1), 3)
            rows[:, t + 1] = successors[now, choice]
        tokens, targets = rows[:, :-1], rows[:, 1:]
        weights = np.ones((batch, length), np.float32)
        if masked:
            hidden = rng.random((batch, length)) < 0.15
            tokens, targets = np.where(hidden, words, tokens), tokens
            weights = hidden.astype(np.float32)
        yield {"tokens": tokens.astype(np.int32), "targets": targets, "weights": weights}


def parity(
    records: Records, dtype: str, setting: str = "parts", steps: int | None = None
) -> dict[Any, float]:
    """Returns {value of a setting: max abs. difference of its losses from those of one device}.

    The largest of all seeds.

    Args:
      records: of all kinds.
      dtype: of the trainings to compare.
      setting: in which trainings over devices differ.
      steps: the first so many alone; None: all.
    """
    found = records.select(kind="training", dtype=dtype)
    curve = lambda r: r.result["losses"][:steps]
    alone = {r.seed: curve(r) for r in found.select(parts=1)}
    apart: dict[Any, float] = {}
    for r in sorted(found, key=lambda r: r.settings[setting]):
        if r.settings["parts"] != 1 and r.seed in alone:
            most = max(abs(a - b) for a, b in zip(curve(r), alone[r.seed], strict=True))
            apart[r.settings[setting]] = max(most, apart.get(r.settings[setting], 0.0))
    return apart


def same_losses(records: Records) -> Verdict:
    """Returns whether losses over devices are those of one device, judged by a float64 model."""
    double, single = (parity(records, dtype) for dtype in ("float64", "float32"))
    evidence = listed(double, "{1:.1e} on {0}"), listed(single, "{1:.1e} on {0} in float32")
    return Verdict(
        f"with a float64 model the losses of all steps are within {PARITY:g} of those of one "
        "device, on every number of devices, for every seed",
        every(error <= PARITY for error in double.values()),
        ", ".join(text for text in evidence if text),
    )


def training_table(
    records: Records,
    title: str,
    details: str,
    note: str,
    *,
    labels: Sequence[Column] = (DEVICES, DTYPE),
    differences: Mapping[str, int | None] = ALL_STEPS,
    setting: str = "parts",
) -> Table:
    """Returns the table of first and last losses, and of the largest differences from one device.

    Args:
      records: of all kinds.
      title, note: the paper's.
      details: of the model; with {name}s as of `groups.first`.
      labels: what names a training.
      differences: of two loss curves, {heading: the first so many steps, None for all}.
      setting: see `parity`.
    """

    def difference(group: Group, steps: int | None) -> float | None:
        dtype, value = group.key
        return parity(records, dtype, setting, steps).get(value)

    def loss(step: int) -> Callable[[Group], Spread | None]:
        return lambda group: spread([r.result["losses"][step] for r in group.records])

    trained = records.select(kind="training")
    losses = {"first loss": loss(0), "last loss": loss(-1)}
    off = {name: lambda group, n=n: difference(group, n) for name, n in differences.items()}
    shown = [*labels, *columns(MEASURED, losses, digits=5), *columns(MEASURED, off)]
    about = first(
        trained,
        "{model[repeats]} layers of width {model[d_model]}" + details + "; {batch} sequences of "
        "{length} tokens of a Markov chain, {steps} steps; differences: the largest of all seeds. ",
    )
    return table("training", title, by(trained, "dtype", setting), shown, about + note)
