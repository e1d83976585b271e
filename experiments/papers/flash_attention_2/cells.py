"""FlashAttention-2's measurements: counts of both loops, tiles, speed of a call and of training."""

from typing import Any

from ml_collections import ConfigDict

from tilescan.configs.common import flat
from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.measurements import attention, attention_counts, static_kernels
from tilescan.experiments.measurements.training_steps import compare_attention


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
            attention.runtime_by_mask,
            shape,
            seconds=lambda head_dim, length: 12 + 40 * length / 4096,
            head_dim=speed.head_dims,
            length=speed.lengths,
        ),
        *(Cell(f"training-T{n}", compare_attention, step(n), seconds=30) for n in training.lengths),
    ]
