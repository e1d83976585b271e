"""FlashAttention-2's table 1 on one device: time of the whole training step of a GPT."""

import functools
from collections.abc import Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import linen as nn

from tilescan.experiments.harness.cells import Cell
from tilescan.experiments.harness.claims import Claim, judge
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.tables import MEASURED, PUBLISHED, Column, Table, format_value
from tilescan.experiments.measurements import timing
from tilescan.experiments.measurements import training as measurements
from tilescan.models import attention as attention_module
from tilescan.training import config as config_lib
from tilescan.training import inputs, steps
from tilescan.training.optimizers import make_optimizer

# Table 1: TFLOP/s of each of 8 A100s in training, by model and context: without FlashAttention,
# with it, with FlashAttention-2.
PUBLISHED_TRAINING = {
    "GPT3-1.3B, 2k": (142, 189, 196),
    "GPT3-1.3B, 8k": (72, 170, 220),
    "GPT3-2.7B, 2k": (149, 189, 205),
    "GPT3-2.7B, 8k": (80, 175, 225),
}
LEAST_GAIN = 1.2  # of tiled over standard attention at the longest context


def cells(config) -> list[Cell]:
    """A training step at each context, at a fixed number of tokens."""
    t = config.training
    return [
        Cell(
            f"training-T{length}",
            step_times,
            {
                "kind": "training",
                "repeats": t.repeats,
                "train": {
                    "model.d_model": t.d_model,
                    "model.repeats": t.layers,
                    "model.n_heads": t.n_heads,
                    "precision.compute_dtype": t.dtype,
                    "data.tokenizer": t.tokenizer,
                    "data.seq_len": length,
                    "data.batch_size": max(1, t.tokens // length),
                },
            },
            seconds=30,
        )
        for length in t.lengths
    ]


def step_times(settings: Mapping[str, Any], seed: int) -> dict:
    """Times forward, backward and update of a GPT with standard and with tiled attention.

    Settings: "train", keys of the training config; repeats. The tokens are random.

    Returns:
      {"parameters", "standard", "tiled"}, the last two as `timing.compare` gives them.
    """
    c = config_lib.settings(measurements.training_config(settings["train"], seed))
    model = inputs.make_model(c)
    tx, rate = make_optimizer(c.optimizer, c.train.steps)
    step = steps.make_train_step(steps.make_loss(model, c.task), tx, rate)
    shape = (c.data.batch_size, c.data.seq_len + 1)
    tokens = np.random.default_rng(seed).integers(256, size=shape, dtype=np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch["weights"] = np.ones_like(batch["tokens"], np.float32)
    state = jax.jit(lambda: nn.meta.unbox(steps.init_state(model, tx, batch, seed)))()

    def standard(state, batch):
        with mock.patch.object(attention_module, "attention", _standard):
            return step(state, batch)

    functions = {"standard": standard, "tiled": lambda state, batch: step(state, batch)}
    arguments = (state, jax.device_put(batch))
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        **timing.compare(functions, arguments, repeats=settings["repeats"]),
    }


def _standard(q, k, v, *, scale, **options):
    """Causal attention by the whole matrix of scores; a plain GPT sets no other option."""
    del options
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True)


def flops(record: Record) -> float:
    """The paper's count: 6 a token and parameter, 12 x layers x hidden x N² a sequence."""
    train = record.settings["train"]
    length, rows = train["data.seq_len"], train["data.batch_size"]
    scores = 12 * train["model.repeats"] * train["model.d_model"] * length**2
    return rows * (6.0 * length * record.result["parameters"] + scores)


def _measured(records: Records) -> list[Record]:
    found = records.select(kind="training")
    return sorted(found, key=lambda r: r.settings["train"]["data.seq_len"])


def _length(record: Record) -> int:
    return record.settings["train"]["data.seq_len"]


def table(records: Records) -> Table:
    """Table 1: published rows, then measured ones."""
    rows, about = [], ""
    for record in _measured(records):
        train, r = record.settings["train"], record.result
        about = f"{train['model.repeats']} layers of width {train['model.d_model']}"
        rate = functools.partial(_rate, record)
        rows.append([
            f"{r['parameters'] / 1e6:.1f}M parameters, {_length(record)}", *[None] * 4,
            rate("standard"), rate("tiled"), timing.speed_up(r["standard"], r["tiled"]),
        ])  # fmt: skip
    if rows:
        published = [[n, *x, x[2] / x[0], *[None] * 3] for n, x in PUBLISHED_TRAINING.items()]
        rows = published + rows
    names = ("without FlashAttention", "FlashAttention", "FlashAttention-2")
    return Table(
        "training",
        "Table 1: speed of training GPTs",
        [
            Column("model, context"),
            *(Column(name, PUBLISHED, "TFLOP/s") for name in names),
            Column("FlashAttention-2 / without", PUBLISHED),
            Column("standard attention", MEASURED, "GFLOP/s"),
            Column("tiled attention", MEASURED, "GFLOP/s"),
            Column("tiled / standard", MEASURED),
        ],
        rows,
        note=f"Published: each of 8 A100s. Measured: one device, {about}, forward, backward and "
        "update. Operations by the paper's formula, 6 a token and parameter and 12 x layers x "
        "hidden x N² a sequence, not halved for the causal mask. Ratio of median times ± its "
        "standard deviation over rounds.",
    )


def _rate(record: Record, kind: str) -> float | str | None:
    result = record.result[kind]
    ms = result.get("median_ms")
    return result.get("error") if ms is None else flops(record) / ms / 1e6


def claims(records: Records) -> list[Claim]:
    """Faster training, and the published speed."""
    found = _measured(records)
    gains = [timing.speed_up(r.result["standard"], r.result["tiled"]) for r in found]
    holds, evidence = None, ""
    if len(found) > 1 and None not in gains:
        holds = gains[-1].mean >= LEAST_GAIN and gains[-1].mean > gains[0].mean
        listed = (
            f"{format_value(gain)} at {_length(r)}" for r, gain in zip(found, gains, strict=True)
        )
        evidence = ", ".join(listed)
    return [
        judge(
            "faster training",
            "Training is faster than without FlashAttention, the more the longer the context "
            "(Table 1, 1.3B parameters: 1.4 times at 2k, 3.1 times at 8k).",
            f"time of a training step: standard / tiled >= {LEAST_GAIN} at the longest context and "
            "larger than at the shortest",
            holds,
            evidence,
        ),
        judge(
            "end to end",
            "Training GPT-style models reaches 225 TFLOP/s per A100 (Table 1).",
            "6 operations per token and parameter and 12 x layers x hidden x N², per second",
            None,
            "not run",
            needs="8 GPUs",
        ),
    ]
