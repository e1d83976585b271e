"""FlashAttention's measurements: traffic, exactness, memory and time of a call, training."""

from typing import Any

from ml_collections import ConfigDict

from tilescan.configs.common import flat
from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.measurements import attention, attention_counts, contexts, static_kernels
from tilescan.experiments.measurements.attention_exactness import errors
from tilescan.experiments.measurements.training import measure_text


def cells(config: ConfigDict) -> list[Cell]:
    """Returns all measurements of the config, cheap ones first."""
    return [
        *_traffic(config.io),
        *static_kernels.cells(),
        *_exactness(config.exactness),
        *_calls(config.runtime, config.memory.lengths),
        *_training(config.curves, config.context, config.documents),
    ]


def _traffic(io: ConfigDict) -> list[Cell]:
    """Returns the counts over sizes of on-chip memory, lengths and sparsity."""
    shape = {"length": io.length, "head_dim": io.head_dim}
    of_length = {"kind": "io_length", "head_dim": io.head_dim, "on_chip": io.lengths_on_chip}
    sparse = {"kind": "io_sparse", **shape, "block": io.block}
    factors = range((-(-io.length // io.block) - 1).bit_length() + 1)
    traffic, sparse_traffic = attention_counts.traffic, attention_counts.sparse_traffic
    return [
        *sweep("io-M{on_chip}", traffic, {"kind": "io", **shape}, on_chip=io.on_chip),
        *sweep("io-N{length}", traffic, of_length, length=io.lengths),
        *sweep("io-butterfly{factors}", sparse_traffic, sparse, factors=factors),
    ]


def _exactness(e: ConfigDict) -> list[Cell]:
    """Returns the errors of outputs and gradients against float64, per mask and dtype."""
    shape = {k: e[k] for k in ("length", "heads", "head_dim", "tiles", "kernel_tiles")}
    return sweep(
        lambda mask, dtype, seed: f"exactness-{mask.replace(' ', '-')}-{dtype}",
        errors,
        {"kind": "exactness", **shape},
        seconds=12,
        mask=e.masks,
        dtype=e.dtypes,
    )


def _calls(r: ConfigDict, memory_lengths: tuple[int, ...]) -> list[Cell]:
    """Returns memory and interleaved times of standard, tiled and sparse attention."""
    shape = {k: r[k] for k in ("batch", "heads", "head_dim", "dtype", "window", "block")}

    def timed(direction: str, length: int) -> dict[str, Any]:
        dense, *others = attention.VARIANTS
        fitting = [dense, *others] if length <= r.standard_up_to else others
        return {"kind": "runtime", "variants": fitting, "repeats": r.repeats, **shape}

    return [
        *sweep(
            "memory-{direction}-T{length}",
            attention.memory,
            {"kind": "memory", "variants": attention.VARIANTS, **shape},
            seconds=4,
            direction=tuple(attention.DIRECTIONS),
            length=memory_lengths,
        ),
        *sweep(
            "runtime-{direction}-T{length}",
            attention.runtime,
            timed,
            seconds=lambda direction, length: 4 + 15 * (length / 4096) ** 2,
            direction=tuple(attention.DIRECTIONS),
            length=r.lengths,
        ),
    ]


def _training(curves: ConfigDict, context: ConfigDict, documents: ConfigDict) -> list[Cell]:
    """Returns the runs with two attentions, several contexts, several lengths of documents."""
    keys = {**flat(context.train), "data.seq_len": max(context.contexts)}
    other = context.compare_position
    ends = sorted({min(context.contexts), max(context.contexts)}) if other else ()
    compared = {"kind": "context_compared", "train": {**keys, "model.position": other}}

    def classified(length: int) -> dict[str, Any]:
        task = {"task": "classification", "model.causal": False, "data.seq_len": length}
        return {"kind": "documents", "train": {**flat(documents.train), **task}}

    runs = {"seeds": context.seeds, "seconds": 30}
    return [
        *sweep(
            "curves-{attention}-seed{seed}",
            measure_text,
            {"kind": "curves", "train": flat(curves.train)},
            seeds=curves.seeds,
            seconds=30,
            attention=attention.OVER_STANDARD,
        ),
        *sweep(
            "context{context}-seed{seed}",
            contexts.run,
            {"kind": "context", "train": keys},
            context=context.contexts,
            **runs,
        ),
        *sweep(
            f"context{{context}}-{other}-seed{{seed}}", contexts.run, compared, context=ends, **runs
        ),
        *sweep(
            "documents{length}-seed{seed}",
            measure_text,
            classified,
            seeds=documents.seeds,
            seconds=lambda length: 5 + 20 * length / 256,
            length=documents.lengths,
        ),
    ]
