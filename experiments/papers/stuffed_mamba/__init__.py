"""Stuffed Mamba: the measurements.

Chen, Zhang, Hu, Han, Liu, Sun: Stuffed Mamba: State Collapse and State Capacity of RNN-Based
Long-Context Modeling. 2024, arXiv 2410.07145.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from tilescan.data.tasks import recall_stream
from tilescan.experiments.harness.cells import Cell, Paper
from tilescan.experiments.measurements import state_collapse
from tilescan.experiments.measurements.training import state_size
from tilescan.experiments.papers.stuffed_mamba import claims as stuffed_mamba_claims
from tilescan.experiments.papers.stuffed_mamba import tables as stuffed_mamba_tables
from tilescan.experiments.papers.stuffed_mamba import training as stuffed_training
from tilescan.experiments.papers.stuffed_mamba.training import STREAM, TEXT

NONE = stuffed_mamba_tables.NONE
# Seeds of the rows that are read, by split; the same for all models.
_READ = {"validation": (11,), "test": (12,)}


def cells(config) -> list[Cell]:
    """All measurements of the config, a seed after the other."""
    c, t = config.stream, config.text
    sizes = list(zip(config.model.layers, config.model.d_model, strict=True))
    largest = (max(sizes, key=lambda size: size[0] * size[1]), max(c.state_dims))
    by_seed = {seed: [] for seed in sorted({*c.seeds, *t.seeds})}
    for seed in c.seeds:
        for size, state_dim, length in itertools.product(sizes, c.state_dims, c.train_lengths):
            worst = (size, state_dim) == largest and length == min(c.train_lengths)
            common = (config, STREAM, size, state_dim, length, seed)
            by_seed[seed].append(_cell(*common, mitigate=worst))
            if worst and c.carry > 1:
                by_seed[seed].append(_cell(*common, carry=c.carry))
    for seed in t.seeds:
        for size, state_dim, length in itertools.product(sizes, t.state_dims, t.train_lengths):
            by_seed[seed].append(_cell(config, TEXT, size, state_dim, length, seed))
    return [cell for made in by_seed.values() for cell in made]


def _cell(config, kind, size, state_dim, length, seed, *, carry=1, mitigate=False) -> Cell:
    (layers, d_model), e = size, config.evaluation
    section = config.stream if kind == STREAM else config.text
    if kind == STREAM:
        options = {name: section[name] for name in ("keys", "values", "window")}
        vocab_size = options["keys"] + options["values"] + 1
    else:
        options = {name: section[name] for name in ("source", "least")}
        vocab_size = 258
    keys = {
        "model.pattern": ("mamba2",),
        "model.repeats": layers,
        "model.d_model": d_model,
        "model.position": "none",
        "model.vocab_size": vocab_size,
        "model.mixers.mamba2.state_dim": state_dim,
        "model.mixers.mamba2.head_dim": config.model.head_dim,
        "data.seq_len": length,
        "data.batch_size": max(1, section.step_tokens // length),
        "train.steps": section.steps,
        "optimizer.learning_rate": section.learning_rate,
        "optimizer.warmup_steps": section.steps // 10,
        "optimizer.weight_decay": section.weight_decay,
    }
    chunk = min(e.chunk, length)
    settings = {
        "kind": kind,
        "layers": layers,
        "d_model": d_model,
        "state_dim": state_dim,
        "state_elements": state_size(keys),
        "train_length": length,
        "carry": carry,
        "row_options": options,
        "train": keys,
        "read": {
            "times": e.times,
            "tokens": e.tokens,
            "chunk": chunk,
            "recall_lengths": tuple(e.recall_lengths) if kind == STREAM else (),
            "prompts": e.prompts,
        },
        "mitigations": _mitigations(config, length) if mitigate else {},
    }
    name = f"{kind}-L{layers}-E{d_model}-N{state_dim}-T{length}" + (
        f"-carry{carry}" if carry > 1 else ""
    )
    return Cell(f"{name}-seed{seed}", measure, settings, seed=seed, seconds=40 + state_dim / 4)


def _mitigations(config, length: int) -> dict[str, list[dict]]:
    """{name: the candidates, of which validation chooses}: options of the mixer, or "bound"."""
    m = config.mitigation
    slower = [
        {"decay_scale": share ** (1 / length), "b_scale": m.b_scale} for share in m.kept_shares
    ]
    ways = {
        NONE: [{}],
        stuffed_mamba_tables.FORGET: slower,
        stuffed_mamba_tables.WINDOW: [{"state_window": max(1, length // k)} for k in m.windows],
        stuffed_mamba_tables.NORM: [{"bound": factor} for factor in m.bounds],
        stuffed_mamba_tables.HALF_STEP: [{"dt_scale": scale} for scale in m.dt_scales],
    }
    return {name: candidates for name, candidates in ways.items() if candidates}


def measure(settings: Mapping[str, Any], seed: int) -> dict:
    """Trains a model and reads `times` its training length with it.

    Returns:
      "train_loss" (tenths of the training), "width" of the buckets of positions, "loss" and
      "accuracy" in each; behind every stretch of the training length, for every head: "first_token"
      (mean logarithm of the first token's share in the state) and, of a prompt that repeats one
      token, "state_mean" and "state_variance"; "recall", {length: share of right answers};
      "mitigations", see `mitigate`.
    """
    e, length = settings["read"], settings["train_length"]
    rows = stuffed_training.make_rows(settings["kind"], settings["row_options"])
    config, params, losses = stuffed_training.train(
        settings["train"], rows, seed, carry=settings["carry"]
    )
    longest, chunk = e["times"] * length, e["chunk"]
    batch = rows("test", max(1, e["tokens"] // longest), longest, _READ["test"])
    found = state_collapse.read(config, params, batch["tokens"], batch["targets"], chunk=chunk)
    width = length // 2
    position = {
        "loss": state_collapse.by_position(found["nll"], batch["weights"], width),
        "accuracy": state_collapse.by_position(found["hit"], batch["weights"], width),
    }
    every = slice(length // chunk - 1, None, length // chunk)
    repeated = ord("\n") if settings["kind"] == TEXT else config.vocab_size - 1
    prompt = np.full((1, longest), repeated, np.int32)
    silent = state_collapse.read(config, params, prompt, prompt, chunk=chunk)
    by_head = lambda values: values[every].mean(axis=2).reshape(e["times"], -1)
    result = {
        "train_loss": losses,
        "width": width,
        **position,
        "first_token": by_head(found["log_decay"]),
        "state_mean": by_head(silent["state_mean"]),
        "state_variance": by_head(silent["state_variance"]),
        "recall": _recall(config, params, settings),
    }
    if settings["mitigations"]:
        result["mitigations"] = mitigate(config, params, rows, settings)
    return result


def _recall(config, params, settings) -> dict[str, float]:
    """{length of the prompt: share of right answers}, the pair asked for at all depths."""
    e, options, found = settings["read"], settings["row_options"], {}
    for length in e["recall_lengths"]:
        rng = np.random.default_rng((length, 7))
        tokens, value = recall_stream.distant_recall(rng, e["prompts"], length, **options)
        targets = np.repeat(value[:, None], length, axis=1)
        chunk = min(e["recall_lengths"])
        hit = state_collapse.read(config, params, tokens, targets, chunk=chunk)["hit"]
        found[str(length)] = float(hit[:, -1].mean())
    return found


def mitigate(config, params, rows, settings) -> dict[str, dict]:
    """The loss within and behind the training length T under each mitigation.

    Returns:
      {name: {"chosen": the candidate with the smallest loss behind T on validation rows, and of
      test rows "within": the mean loss in (T/2, T], "behind": that in (7T/2, 4T]}}.
    """
    length, e = settings["train_length"], settings["read"]
    count = max(1, e["tokens"] // (4 * length))
    batches = {split: rows(split, count, 4 * length, key) for split, key in _READ.items()}

    def losses(split, bound=None, **options):
        changed, batch, limit = state_collapse.with_mixer(config, **options), batches[split], None
        if bound is not None:
            limit = bound * norms
        found = state_collapse.read(
            changed, params, batch["tokens"], batch["targets"], chunk=e["chunk"], limit=limit
        )
        return state_collapse.by_position(found["nll"], batch["weights"], length // 2), found

    # Norms of the states at the end of the training length, a bound for longer texts.
    mixer = config.mixers["mamba2"]
    size = mixer.get("head_dim", 64) * mixer.get("state_dim", 128)
    plain = losses("validation")[1]
    norms = state_collapse.state_norms(plain, size)[length // e["chunk"] - 1].mean(axis=1)

    result = {}
    for name, candidates in settings["mitigations"].items():
        scores = [losses("validation", **candidate)[0][-1] for candidate in candidates]
        chosen = candidates[int(np.argmin(scores))]
        tested, _ = losses("test", **chosen)
        result[name] = {"chosen": dict(chosen), "within": tested[1], "behind": tested[-1]}
    return result


PAPER = Paper(
    name="stuffed_mamba",
    title="Stuffed Mamba: state collapse and state capacity of RNNs on long contexts "
    "(arXiv 2410.07145)",
    summary="A Mamba-2 trained on texts too short to fill its state never learns to forget, and "
    "breaks on longer ones; larger states need longer texts; forgetting can be forced afterwards.",
    cells=cells,
    tables=stuffed_mamba_tables.tables,
    claims=stuffed_mamba_claims.claims,
    figures=stuffed_mamba_tables.figures,
    family="state space models",
)
