"""H3's measurements: two synthetic languages, multi-query recall, perplexity, time vs. length."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tilescan.configs.common import flat
from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.measurements import timing
from tilescan.experiments.measurements.training import measure_task, measure_text
from tilescan.ops import masks
from tilescan.ops.attention import attention
from tilescan.ops.long_convolution import long_convolution


def cells(config) -> list[Cell]:
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

    fixed = {k: speed[k] for k in ("batch", "channels", "head_dim", "repeats")}
    return [
        *sweep(
            "speed-T{length}",
            measure_speed,
            {"kind": "speed", **fixed},
            length=speed.lengths,
            seconds=3,
        ),
        *sweep(
            "mqar{pairs}-{model}-seed{seed}",
            measure_task,
            recall,
            seeds=mqar.seeds,
            seconds=30,
            pairs=mqar.pairs,
            model=mqar.models,
        ),
        *sweep(
            "{task}-{protocol}-{model}-seed{seed}",
            measure_task,
            language,
            seeds=languages.seeds,
            seconds=25,
            task=tuple(languages.tasks),
            protocol=languages.protocols,
            model=languages.models,
        ),
        *sweep(
            "text-{model}-seed{seed}",
            measure_text,
            language_model,
            seeds=text.seeds,
            seconds=60,
            model=text.models,
        ),
    ]


def model_keys(model: str, layers: int, width: int, heads: int) -> dict[str, Any]:
    """Returns the training keys of a model of so many layers, each a mixer and an MLP.

    A hybrid's second layer attends; it learns of positions through the state spaces. The S4D of
    table 2 has no gate.
    """
    if model == "hybrid":
        mixers = ("h3", "attention", *("h3",) * (layers - 2))
    else:
        mixers = (model,)
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


def measure_speed(settings: Mapping[str, Any], seed: int) -> dict:
    """Times one layer's mixing, forward, interleaved; what `timing.compare` returns by name.

    Settings: batch, length, channels, head_dim (attention has channels / head_dim heads), repeats.
    """
    B, T, E, D = (settings[k] for k in ("batch", "length", "channels", "head_dim"))
    x, q, gate = jax.random.normal(jax.random.key(seed), (3, B, T, E))
    kernel = jax.random.normal(jax.random.key(seed + 1), (T, E)) / T

    def fft(x, q, gate, kernel):
        n = 2 * T
        spectrum = jnp.fft.rfft(x * gate, n, axis=1) * jnp.fft.rfft(kernel, n, axis=0)[None]
        return q * jnp.fft.irfft(spectrum, n, axis=1)[:, :T]

    def fused(x, q, gate, kernel):
        return long_convolution(x, kernel, pre_gate=gate, post_gate=q)[0]

    def attend(x, q, gate, kernel):
        heads = [a.reshape(B, T, E // D, D) for a in (q, gate, x)]
        return attention(*heads, mask=masks.Causal()).reshape(x.shape)

    functions = {"long convolution": fused, "FFT of JAX": fft, "attention": attend}
    return timing.compare(functions, (x, q, gate, kernel), repeats=settings["repeats"])
