"""Cells that time a whole training step: forward, backward and update."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from tilescan.experiments.harness.groups import Group
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.measurements import timing
from tilescan.experiments.measurements.attention import STANDARD, TILED
from tilescan.experiments.measurements.training import training_config
from tilescan.training import config as config_lib
from tilescan.training import inputs, steps
from tilescan.training.optimizers import make_optimizer


def compare_attention(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Times a training step of a GPT with standard and with tiled attention, interleaved.

    Settings: "train", keys of the training config; repeats. The tokens are random.

    Returns:
      {"parameters", "standard", "tiled"}, the last two as `timing.compare` gives them.
    """
    c = config_lib.settings(training_config(settings["train"], seed))
    tiled = inputs.make_model(c)
    config = dataclasses.replace(tiled.config, attention_implementation=standard_attention)
    models = {STANDARD: tiled.clone(config=config), TILED: tiled}
    # The same step but for the model's attention, from the same state.
    tx, rate = make_optimizer(c.optimizer, c.train.steps)
    functions = {
        name: steps.make_train_step(steps.make_loss(model, c.task), tx, rate)
        for name, model in models.items()
    }
    shape = (c.data.batch_size, c.data.seq_len + 1)
    tokens = np.random.default_rng(seed).integers(256, size=shape, dtype=np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch["weights"] = np.ones_like(batch["tokens"], np.float32)
    state = jax.jit(lambda: nn.meta.unbox(steps.init_state(tiled, tx, batch, seed)))()
    arguments = (state, jax.device_put(batch))
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        **timing.compare(functions, arguments, repeats=settings["repeats"]),
    }


def standard_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    *,
    scale: float,
    **options: Any,
) -> Float[Array, "B T H D"]:
    """Returns causal attention by JAX's own op; a plain GPT sets no other option.

    Dimensions: B batch, T time, H heads, D head dim.
    """
    del options
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True)


def by_context(found: Records) -> list[Group]:
    """Returns the records, each a group by the length of its sequences."""
    ranked = sorted(found, key=_context)
    return [Group(_context(record), Records([record])) for record in ranked]


def rate(record: Record, variant: str) -> float | str | None:
    """Returns GFLOP/s as FlashAttention-2 counts those of training, or why there are none.

    The count: 6 a token and parameter, 12 x layers x hidden x N² a sequence.
    """
    train, result, length = record.settings["train"], record.result[variant], _context(record)
    scores = 12 * train["model.repeats"] * train["model.d_model"] * length**2
    flops = train["data.batch_size"] * (6.0 * length * record.result["parameters"] + scores)
    ms = result.get("median_ms")
    return result.get("error") if ms is None else flops / ms / 1e6


def _context(record: Record) -> int:
    return record.settings["train"]["data.seq_len"]
