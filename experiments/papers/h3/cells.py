"""H3's measurements: two synthetic languages, multi-query recall, perplexity, time vs. length."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from tilescan.configs.common import flat
from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.measurements.long_convolutions import compare_convolutions
from tilescan.experiments.measurements.training import measure_task, measure_text


def cells(config: ConfigDict) -> list[Cell]:
    """Returns all measurements of the config."""
    languages, mqar, text, speed = config.languages, config.mqar, config.text, config.speed

    def language(task: str, protocol: str, model: str) -> dict[str, Any]:
        return {
            "kind": "language",
            "options": {**languages.tasks[task].to_dict(), "answer_only": protocol == "answer"},
            "train_examples": languages.train_examples,
            "train": {**model_keys(model, 2, languages.d_model, 1), **flat(languages.train)},
        }

    def recall(pairs: int, model: str) -> dict[str, Any]:
        return {
            "kind": "mqar",
            "task": "multi_query_recall",
            "options": {"length": mqar.length, "pairs": pairs, "vocab_size": mqar.vocab_size},
            "train": {**model_keys(model, 2, mqar.d_model, 1), **flat(mqar.train)},
        }

    def language_model(model: str) -> dict[str, Any]:
        keys = model_keys(model, text.layers, text.d_model, text.n_heads)
        return {"kind": "text", "train": {**keys, **flat(text.train)}}

    def trained(part: ConfigDict, seconds: float, **axes: Sequence[Any]) -> dict[str, Any]:
        return {"seeds": part.seeds, "seconds": seconds, **axes, "model": part.models}

    fixed = {k: v for k, v in speed.items() if k != "lengths"} | {"kind": "speed"}
    both = {"task": tuple(languages.tasks), "protocol": languages.protocols}
    of_language = trained(languages, 25, **both)
    name = "-{model}-seed{seed}"
    return [
        *sweep("speed-T{length}", compare_convolutions, fixed, length=speed.lengths, seconds=3),
        *sweep("mqar{pairs}" + name, measure_task, recall, **trained(mqar, 30, pairs=mqar.pairs)),
        *sweep("{task}-{protocol}" + name, measure_task, language, **of_language),
        *sweep("text" + name, measure_text, language_model, **trained(text, 60)),
    ]


def model_keys(model: str, layers: int, width: int, heads: int) -> dict[str, Any]:
    """Returns the training keys of a model of so many layers, each a mixer and an MLP.

    A hybrid's second layer attends; it learns of positions through the state spaces. The S4D of
    table 2 has no gate.
    """
    hybrid = ("h3", "attention", *("h3",) * (layers - 2))
    mixers = hybrid if model == "hybrid" else (model,)
    return {
        "model.pattern": tuple(block for mixer in mixers for block in (mixer, "mlp")),
        "model.repeats": layers // len(mixers),
        "model.d_model": width,
        "model.n_heads": heads,
        "model.mlp": "gelu",
        "model.norm": "layernorm",
        "model.position": "rope" if model == "attention" else "none",
        **({"model.mixers.s4d.output": "linear"} if model == "s4d" else {}),
    }
