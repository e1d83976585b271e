"""StreamBP's measurements: memory, time, errors of gradients, and whole trainings."""

from typing import Any

from ml_collections import ConfigDict

from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.papers.stream_bp.memory import chunk_counts, longest, times
from tilescan.experiments.papers.stream_bp.training import parity, precision


def cells(config: ConfigDict) -> list[Cell]:
    """Returns all measurements of the config."""
    memory, trained = config.memory, config.parity
    starts = dict(zip(memory.methods, memory.starts, strict=True))
    rates = dict(zip(trained.losses, trained.learning_rates, strict=True))
    same = _settings(memory, "memory", "chunks logit_chunk budget_gb step")
    training = _settings(trained, "parity", "length batch_size steps chunks logit_chunk")
    training |= {name: trained[name] for name in ("sft_steps", "sft_learning_rate")}
    timed = _settings(config.times, "times", "methods chunks logit_chunk repeats")
    counted = _settings(config.counts, "counts", "length counts logit_chunk repeats")
    precise = _settings(config.precision, "precision", "length chunks logit_chunk")
    return [
        *sweep(  # table 3: the longest sequence of each method, for each loss
            "memory-{loss}-{method}",
            longest,
            lambda loss, method: {**same, "start": starts[method]},
            seconds=lambda loss, method: 45 if method == "stream" else 12,
            loss=memory.losses,
            method=memory.methods,
        ),
        *sweep(  # table 1: time of a gradient by length
            "times-T{length}",
            times,
            timed,
            seconds=lambda length: 15 + length / 60,
            length=config.times.lengths,
        ),
        # Figure 5: time and memory by the number of chunks.
        Cell("counts", chunk_counts, counted, seconds=120),
        *sweep(  # table 6: errors of gradients in float32 and bfloat16
            "precision-seed{seed}", precision, precise, seeds=config.precision.seeds, seconds=25
        ),
        *sweep(  # table 7: losses of trainings by plain and by streamed gradients
            "parity-{loss}-seed{seed}",
            parity,
            lambda loss: {**training, "learning_rate": rates[loss]},
            seeds=trained.seeds,
            seconds=30,
            loss=trained.losses,
        ),
    ]


def _settings(section: ConfigDict, kind: str, keys: str) -> dict[str, Any]:
    model = section.model.to_dict()
    return {"kind": kind, "model": model, **{key: section[key] for key in keys.split()}}
