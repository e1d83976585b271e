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
from tilescan.experiments.measurements.training import metrics, state_size
from tilescan.experiments.papers.stuffed_mamba.training import STREAM, TEXT, make_rows, trained

# Kinds of cells, and mitigations that need no training.
READ, RECALL, MITIGATE = "read", "recall", "mitigate"
NONE, FORGET, WINDOW, NORM, HALF_STEP = "none", "forget", "window", "norm", "half_step"
# Seeds of the rows that are read, by split; the same for all models.
_READ = {"validation": (11,), "test": (12,)}


def cells(config: ConfigDict) -> list[Cell]:
    """Returns all measurements of the config."""
    return [*_cells_of(config, STREAM), *_cells_of(config, TEXT)]


def _cells_of(config: ConfigDict, kind: str) -> list[Cell]:
    section, e = config[kind], config.evaluation
    sizes = list(zip(config.model.n_layers, config.model.d_model, strict=True))
    name = f"{kind}-L{{size[0]}}-E{{size[1]}}-N{{state_dim}}-T{{train_length}}-carry{{carry}}"
    axes = {
        "size": sizes,
        "state_dim": section.state_dims,
        "train_length": section.train_lengths,
        "carry": sorted({1, section.get("carry", 1)}),
    }

    # The model that forgets least is mitigated, and trained once more with its state carried.
    largest, shortest = max(section.state_dims), min(section.train_lengths)
    worst = {"size": max(sizes, key=math.prod), "state_dim": largest, "train_length": shortest}
    forgets_least = lambda **point: worst.items() <= point.items()
    trains = lambda **point: point["carry"] == 1 or forgets_least(**point)
    mitigated = lambda **point: point["carry"] == 1 and forgets_least(**point)

    def make(measure: Callable, seconds: float, where: Callable[..., bool], **settings) -> list:
        """Cells of one measurement; `settings` are numbers, or functions of the training length."""

        def of(train_length: int, **point) -> dict[str, Any]:
            model = model_settings(config, kind, train_length=train_length, **point)
            made = {"kind": kind, "measure": measure.__name__, "model": model}
            own = {k: v(train_length) if callable(v) else v for k, v in settings.items()}
            return {**made, "state_elements": state_size(model["train"]), **own}

        options = dict(seeds=section.seeds, seconds=seconds, where=where)
        return sweep(f"{measure.__name__}-{name}-seed{{seed}}", measure, of, **options, **axes)

    lengths, chunk = tuple(e.recall_lengths), lambda train_length: min(e.chunk, train_length)
    chosen = lambda train_length: candidates(config.mitigation, train_length)
    made = make(read, 60, trains, times=e.times, tokens=e.tokens, chunk=chunk)
    if kind == STREAM:
        made += make(recall, 5, trains, lengths=lengths, prompts=e.prompts)
        made += make(mitigate, 60, mitigated, tokens=e.tokens, chunk=chunk, candidates=chosen)
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
    section = config[kind]
    names = ("keys", "values", "window") if kind == STREAM else ("source", "least")
    rows = {name: section[name] for name in names}
    keys = {
        "model.pattern": ("mamba2",),
        "model.repeats": size[0],
        "model.d_model": size[1],
        "model.position": "none",
        "model.vocab_size": 258 if kind == TEXT else rows["keys"] + rows["values"] + 1,
        "model.mixers.mamba2.state_dim": state_dim,
        "model.mixers.mamba2.head_dim": config.model.head_dim,
        "data.seq_len": train_length,
        "data.batch_size": max(1, section.step_tokens // train_length),
        "train.steps": section.steps,
        "train.log_every": 1,
        "optimizer.learning_rate": section.learning_rate,
        "optimizer.warmup_steps": section.steps // 10,
        "optimizer.weight_decay": section.weight_decay,
    }
    if kind == TEXT:
        keys["data.sources"] = (rows["source"],)
    return {"data": kind, "rows": rows, "carry": carry, "train": keys}


def candidates(mitigation: ConfigDict, train_length: int) -> dict[str, list[dict[str, float]]]:
    """Returns {mitigation: what validation chooses from}: options of the mixer, or "bound"."""
    kept = [share ** (1 / train_length) for share in mitigation.kept_shares]
    made = {
        NONE: [{}],
        FORGET: [{"decay_scale": scale, "b_scale": mitigation.b_scale} for scale in kept],
        WINDOW: [{"state_window": max(1, train_length // k)} for k in mitigation.windows],
        NORM: [{"bound": factor} for factor in mitigation.bounds],
        HALF_STEP: [{"dt_scale": scale} for scale in mitigation.dt_scales],
    }
    return {name: found for name, found in made.items() if found}


def read(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict[str, Any]:
    """Reads `times` its training length with a model.

    Settings: "model"; "train_length"; "times"; "tokens" to read in all; "chunk", tokens a call.

    Returns:
      {"train_loss": means of tenths of the training, "width" of the buckets of positions, "loss"
      and "accuracy" in each; after every training length, for every head: "first_token" (mean
      logarithm of the first token's share in the state) and, of a prompt that repeats one token,
      "state_mean" and "state_variance"}.
    """
    model = trained(workspace, settings["model"], seed)
    length, times, chunk = (settings[k] for k in ("train_length", "times", "chunk"))
    losses = [row["loss"] for row in metrics(model.folder, "train")]
    tenths = np.array_split(losses, min(10, len(losses)))

    # Test rows, from their beginning.
    width, batch = length // 2, _rows(settings, "test", times * length)
    found = _read(model, batch["tokens"], batch["targets"], chunk)
    by_position = lambda name: state_collapse.by_position(found[name], batch["weights"], width)

    # One repeated token: newlines, or blanks.
    repeated = ord("\n") if settings["kind"] == TEXT else model.config.vocab_size - 1
    prompt = np.full((1, times * length), repeated, np.int32)
    silent = _read(model, prompt, prompt, chunk)

    every = slice(length // chunk - 1, None, length // chunk)
    by_head = lambda values: values[every].mean(axis=2).reshape(times, -1)
    return {
        "train_loss": [float(np.mean(part)) for part in tenths],
        "width": width,
        "loss": by_position("nll"),
        "accuracy": by_position("hit"),
        "first_token": by_head(found["log_decay"]),
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
        hit = _read(model, tokens, targets, min(settings["lengths"]))["hit"]
        found[str(length)] = float(hit[:, -1].mean())
    return found


def mitigate(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict[str, Any]:
    """Measures the loss within and up to four times the training length under each mitigation.

    Settings: "model"; "train_length"; "tokens", "chunk", as of `read`; "candidates".

    Returns:
      What `state_collapse.compare_mitigations` does.
    """
    model, length = trained(workspace, settings["model"], seed), settings["train_length"]
    return state_collapse.compare_mitigations(
        model.config,
        model.params,
        {split: _rows(settings, split, 4 * length) for split in _READ},
        settings["candidates"],
        train_length=length,
        chunk=settings["chunk"],
    )


def _read(model: Trained, tokens: np.ndarray, targets: np.ndarray, chunk: int) -> dict:
    return state_collapse.read(model.config, model.params, tokens, targets, chunk=chunk)


def _rows(settings: Mapping[str, Any], split: str, length: int) -> Batch:
    rows = make_rows(settings["model"]["data"], settings["model"]["rows"])
    return rows(split, max(1, settings["tokens"] // length), length, _READ[split])
