"""H3's measurements: two synthetic languages, multi-query recall, perplexity, time vs. length."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from tilescan.configs.common import flat
from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.measurements.long_convolutions import compare_convolutions
from tilescan.experiments.measurements.training import measure_task, measure_text
from tilescan.training.optimizers import state_space_groups


def cells(config: ConfigDict) -> list[Cell]:
    """Returns all measurements of the config."""
    languages, mqar, text, speed = config.languages, config.mqar, config.text, config.speed

    def language(task: str, model: str) -> dict[str, Any]:
        options = languages.tasks[task].to_dict()
        keys = model_keys(model, 2, languages.d_model, 1, position=languages.position)
        return {
            "kind": "language",
            "options": options,
            "protocol": "answer" if options["answer_only"] else "all",
            "train_examples": languages.train_examples,
            "train": {**keys, **optimized(model, languages.train)},
        }

    def recall(pairs: int, model: str) -> dict[str, Any]:
        return {
            "kind": "mqar",
            "task": "multi_query_recall",
            "options": {"length": mqar.length, "pairs": pairs, "vocab_size": mqar.vocab_size},
            "train": {**model_keys(model, 2, mqar.d_model, 1), **optimized(model, mqar.train)},
        }

    def language_model(model: str, rate: float) -> dict[str, Any]:
        keys = model_keys(model, text.layers, text.d_model, text.n_heads)
        schedule = text.train.copy_and_resolve_references()
        schedule.optimizer.learning_rate = rate
        return {"kind": "text", "train": {**keys, **optimized(model, schedule)}}

    def trial(model: str, rate: float) -> dict[str, Any]:
        return {**language_model(model, rate), "kind": "final"}

    def trained(part: ConfigDict, seconds: float, **axes: Sequence[Any]) -> dict[str, Any]:
        return {"seeds": part.seeds, "seconds": seconds, **axes, "model": part.models}

    fixed = {k: v for k, v in speed.items() if k != "lengths"} | {"kind": "speed"}
    of_language = trained(languages, 130, task=tuple(languages.tasks))
    chosen = lambda model: language_model(model, text.learning_rates[model])
    pairs = [(model, rate) for model in text.models for rate in text.trials.rates.get(model, ())]
    trials = dict(seeds=text.trials.seeds, where=lambda model, rate: (model, rate) in pairs)
    trials |= {"model": text.models, "rate": sorted({rate for _, rate in pairs})}
    name = "-{model}-seed{seed}"
    return [
        *sweep("speed-T{length}", compare_convolutions, fixed, length=speed.lengths, seconds=3),
        *sweep("{task}" + name, measure_task, language, **of_language),
        *sweep("mqar{pairs}" + name, measure_task, recall, **trained(mqar, 200, pairs=mqar.pairs)),
        *sweep("final-{model}-{rate:g}-seed{seed}", measure_text, trial, seconds=200, **trials),
        *sweep("text" + name, measure_text, chosen, **trained(text, 200)),
    ]


def optimized(model: str, train: ConfigDict) -> dict[str, Any]:
    """Returns the training keys of a section, with state spaces in groups of their own."""
    mixer = {"hybrid": "h3"}.get(model, model)
    if mixer == "attention":
        return flat(train)
    fixed = {"pattern": r"(^|/)(scale|bias)$", "lr_multiplier": 1.0, "weight_decay": 0.0}
    groups = state_space_groups(mixer, train.optimizer.learning_rate)
    return {**flat(train), "optimizer.groups": (fixed, *groups)}


def model_keys(
    model: str, layers: int, width: int, heads: int, position: str = "rope"
) -> dict[str, Any]:
    """Returns the training keys of a model of so many layers, each a mixer and an MLP.

    Attention alone has positions, of that kind.

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
        "model.position": position if model == "attention" else "none",
        **({"model.mixers.s4d.output": "linear"} if model == "s4d" else {}),
    }
