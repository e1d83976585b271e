"""Stuffed Mamba's measurements: models are trained once, then read, asked and mitigated."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tilescan.data.batches import Batch
from tilescan.data.tasks import recall_stream
from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.harness.shared_models import Trained
from tilescan.experiments.harness.workspace import Workspace
from tilescan.experiments.measurements import state_collapse
from tilescan.experiments.measurements.state_collapse import CARRIED, LONGER
from tilescan.experiments.measurements.training import metrics, state_size
from tilescan.experiments.papers.stuffed_mamba.training import STREAM, TEXT, make_rows, trained

READ, RECALL, MITIGATE = "read", "recall", "mitigate"  # kinds of cells
# Seeds of the rows that are read, by split; the same for all models.
_READ = {"validation": (11,), "test": (12,)}


def cells(config: ConfigDict) -> list[Cell]:
    """Returns all measurements of the config."""
    kinds = (STREAM, *config.text.sources)
    return [cell for kind in kinds for cell in _cells_of(config, kind)]


def _cells_of(config: ConfigDict, kind: str) -> list[Cell]:
    """Returns the cells of one kind of data: the stream of recalls, or a source of text."""
    section, e, m = config.get(kind, config.text), config.evaluation, config.mitigation
    sizes = list(zip(config.model.n_layers, config.model.d_model, strict=True))
    name = f"{kind}-L{{size[0]}}-E{{size[1]}}-N{{state_dim}}-T{{train_length}}-carry{{carry}}"
    axes = {
        "size": sizes,
        "state_dim": section.state_dims,
        "train_length": section.train_lengths,
        "carry": sorted({1, section.get("carry", 1)}),
    }

    # All lengths are read in buckets that fit the shortest. The largest state's shortest and
    # longest lengths, and what is mitigated, have more seeds.
    shortest, longest = min(section.train_lengths), max(section.train_lengths)
    size, chunk = max(sizes, key=math.prod), lambda train_length: min(e.chunk, train_length)
    plain = lambda **point: point["carry"] == 1

    def ends(**point) -> bool:
        extreme = {"size": size, "state_dim": max(section.state_dims), "carry": 1}
        return extreme.items() <= point.items() and point["train_length"] in (shortest, longest)

    def make(measure: Callable, seconds: float, where: Callable, seeds: tuple, **settings) -> list:
        """Cells of one measurement; `settings` are numbers, or functions of the training length."""

        def of(train_length: int, **point) -> dict[str, Any]:
            model = model_settings(config, kind, train_length=train_length, **point)
            made = {"kind": kind, "measure": measure.__name__, "model": model}
            own = {k: v(train_length) if callable(v) else v for k, v in settings.items()}
            return {**made, "state_elements": state_size(model["train"]), **own}

        options = dict(seeds=seeds, seconds=seconds, where=where)
        return sweep(f"{measure.__name__}-{name}-seed{{seed}}", measure, of, **options, **axes)

    reading = dict(times=e.times, tokens=e.tokens, chunk=chunk, width=shortest // 2)
    made = make(read, 40, plain, section.seeds, **reading)
    made += make(read, 40, ends, section.get("more_seeds", ()), **reading)
    if kind != STREAM:
        return made
    made += make(
        recall, 2, plain, section.seeds, lengths=tuple(e.recall_lengths), prompts=e.prompts
    )

    # One model under all mitigations; those that were trained otherwise, as they are.
    options = dict(at=m.train_length, tokens=m.tokens, chunk=m.train_length)
    for length, carry, tried in (
        (m.train_length, 1, state_collapse.candidates(m)),
        (m.train_length, section.carry, {CARRIED: [{}]}),
        (4 * m.train_length, 1, {LONGER: [{}]}),
    ):
        point = dict(size=size, state_dim=m.state_dim, train_length=length, carry=carry)
        of_point = lambda point=point, **other: point == other
        made += make(mitigate, 60, of_point, section.mitigated_seeds, candidates=tried, **options)
    return made


def model_settings(
    config: ConfigDict,
    kind: str,
    *,
    size: tuple[int, int],
    state_dim: int,
    train_length: int,
    carry: int,
) -> dict[str, Any]:
    """Returns the settings of a shared model, see `training.trained`."""
    section = config.get(kind, config.text)
    if kind == STREAM:
        rows = {name: section[name] for name in ("keys", "values", "window")}
    else:
        rows = {"source": kind, "least": section.least}
    keys = {
        "model.pattern": ("mamba2",),
        "model.repeats": size[0],
        "model.d_model": size[1],
        "model.position": "none",
        "model.vocab_size": 258 if kind != STREAM else rows["keys"] + rows["values"] + 1,
        "model.mixers.mamba2.state_dim": state_dim,
        "model.mixers.mamba2.head_dim": config.model.head_dim,
        "data.seq_len": train_length,
        "data.batch_size": max(1, section.step_tokens // train_length),
        "train.steps": section.steps,
        "train.log_every": max(1, section.steps // 100),
        "optimizer.learning_rate": section.learning_rate,
        "optimizer.warmup_steps": section.steps // 10,
        "optimizer.weight_decay": section.weight_decay,
    }
    if kind != STREAM:
        keys["data.sources"] = (kind,)
    if config.model.quadratic:
        keys["model.mixers.mamba2.implementation"] = "quadratic"
    return {"data": STREAM if kind == STREAM else TEXT, "rows": rows, "carry": carry, "train": keys}


def read(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict[str, Any]:
    """Reads `times` its training length with a model.

    Settings: "model"; "train_length"; "times"; "tokens" to read in all; "chunk", tokens a call;
    "width" of the buckets of positions.

    Returns:
      {"train_loss": means of tenths of the training, "loss" and "accuracy" in each bucket; after
      every training length, for every head: "first_token" (mean logarithm of the first token's
      share in the state) and, of a prompt that repeats one token, "state_mean" and
      "state_variance"; "untrained", the first of "first_token" before training}.
    """
    model = trained(workspace, settings["model"], seed)
    length, times, chunk = (settings[k] for k in ("train_length", "times", "chunk"))
    losses = [row["loss"] for row in metrics(model.folder, "train")]
    tenths = np.array_split(losses, min(10, len(losses)))

    # Test rows, from their beginning.
    batch = _rows(settings, "test", times * length)
    tokens, targets = batch["tokens"], batch["targets"]
    found = _read(model, tokens, targets, chunk)
    by_position = lambda name: state_collapse.by_position(
        found[name], batch["weights"], settings["width"]
    )
    raw = state_collapse.untrained(model.config, seed)
    first = state_collapse.read(
        model.config, raw, tokens[:, :length], targets[:, :length], chunk=chunk
    )

    # One repeated token: newlines, or blanks.
    repeated = ord("\n") if settings["kind"] != STREAM else model.config.vocab_size - 1
    prompt = np.full((1, times * length), repeated, np.int32)
    silent = _read(model, prompt, prompt, chunk)

    every = slice(length // chunk - 1, None, length // chunk)
    by_head = lambda values: values[every].mean(axis=2).reshape(times, -1)
    return {
        "train_loss": [float(np.mean(part)) for part in tenths],
        "loss": by_position("nll"),
        "accuracy": by_position("hit"),
        "first_token": by_head(found["log_decay"]),
        "untrained": first["log_decay"][-1].mean(axis=1).reshape(-1),
        **{name: by_head(silent[name]) for name in ("state_mean", "state_variance")},
    }


def recall(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict[str, float]:
    """Asks for one pair at the end of a prompt, at all depths.

    Settings: "model"; "lengths" of the prompts; "prompts", how many of each.

    Returns:
      {length as text: share of right answers}.
    """
    model, found = trained(workspace, settings["model"], seed), {}
    for length in settings["lengths"]:
        rng, options = np.random.default_rng((length, 7)), settings["model"]["rows"]
        tokens, value = recall_stream.distant_recall(rng, settings["prompts"], length, **options)
        targets = np.repeat(value[:, None], length, axis=1)
        hit = _read(model, tokens, targets, settings["lengths"][0])["hit"]
        found[str(length)] = float(hit[:, -1].mean())
    return found


def mitigate(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict[str, Any]:
    """Measures the loss within and up to four times a training length under each mitigation.

    Settings: "model"; "at", the training length of the model without mitigation; "tokens", "chunk",
    as of `read`; "candidates". Rows are those of the seed, the same for models trained otherwise.

    Returns:
      What `state_collapse.compare_mitigations` does.
    """
    model, length = trained(workspace, settings["model"], seed), settings["at"]
    return state_collapse.compare_mitigations(
        model.config,
        model.params,
        {split: _rows(settings, split, 4 * length, seed) for split in _READ},
        settings["candidates"],
        train_length=length,
        chunk=settings["chunk"],
    )


def _read(model: Trained, tokens: np.ndarray, targets: np.ndarray, chunk: int) -> dict:
    return state_collapse.read(model.config, model.params, tokens, targets, chunk=chunk)


def _rows(settings: Mapping[str, Any], split: str, length: int, *key: int) -> Batch:
    rows = make_rows(settings["model"]["data"], settings["model"]["rows"])
    return rows(split, max(1, settings["tokens"] // length), length, (*_READ[split], *key))
