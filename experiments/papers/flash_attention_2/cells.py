"""FlashAttention-2's measurements: counts of both loops, tiles, speed of a call and of training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from tilescan.configs.common import flat
from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.measurements import attention, attention_counts, static_kernels, timing
from tilescan.experiments.measurements.attention import DIRECTIONS, STANDARD, TILED
from tilescan.experiments.measurements.training import training_config
from tilescan.training import config as config_lib
from tilescan.training import inputs, steps
from tilescan.training.optimizers import make_optimizer

VARIANTS = (STANDARD, TILED)
MASKS = ("full", "causal")


def cells(config: ConfigDict) -> list[Cell]:
    """Returns all measurements of the config."""
    counts, speed, training = config.counts, config.speed, config.training

    def shape(head_dim: int, length: int) -> dict[str, Any]:
        heads, batch = speed.hidden // head_dim, max(1, speed.tokens // length)
        fixed = {k: speed[k] for k in ("dtype", "repeats")}
        return {"kind": "speed", "heads": heads, "batch": batch, **fixed}

    def step(length: int) -> dict[str, Any]:
        rows = {"data.seq_len": length, "data.batch_size": max(1, training.tokens // length)}
        train = {**flat(training.train), **rows}
        return {"kind": "training", "repeats": training.repeats, "train": train}

    return [
        *sweep(
            lambda causal, length, seed: f"counts-{'causal' if causal else 'full'}-T{length}",
            attention_counts.loops,
            {"kind": "counts", **{k: counts[k] for k in ("head_dim", "block_q", "block_k")}},
            seconds=2,
            causal=(False, True),
            length=counts.lengths,
        ),
        *sweep(
            "tiles-{side}",
            attention_counts.causal_tiles,
            {"kind": "tiles", "block": counts.block_q},
            side=counts.tiles_a_side,
        ),
        *static_kernels.cells(),
        *sweep(
            "speed-d{head_dim}-T{length}",
            measure_speed,
            shape,
            seconds=lambda head_dim, length: 12 + 40 * length / 4096,
            head_dim=speed.head_dims,
            length=speed.lengths,
        ),
        *(Cell(f"training-T{n}", measure_step, step(n), seconds=30) for n in training.lengths),
    ]


def measure_speed(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Times standard and tiled attention, full and causal, forward and with backward, interleaved.

    Settings: batch, length, heads, head_dim, dtype, repeats. Returns what `timing.compare` returns,
    by "variant mask direction", e.g. "tiled causal forward".
    """
    functions = {
        f"{name} {mask} {direction}": attention.in_direction(
            attention.variant(name, {**settings, "causal": mask == "causal"}), direction
        )
        for name in VARIANTS
        for mask in MASKS
        for direction in DIRECTIONS
    }
    arguments = attention.inputs(settings, seed)
    return timing.compare(functions, arguments, repeats=settings["repeats"])


def measure_step(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Times forward, backward and update of a GPT with standard and with tiled attention.

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
