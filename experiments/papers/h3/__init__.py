"""Hungry Hungry Hippos (H3): the measurements.

Fu, Dao, Saab, Thomas, Rudra, Re: Hungry Hungry Hippos: Towards Language Modeling with State Space
Models. ICLR 2023, arXiv 2212.14052.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tilescan.experiments.harness.runner import Cell, Paper
from tilescan.experiments.measurements import tasks as task_cells
from tilescan.experiments.measurements import timing
from tilescan.experiments.measurements import training as text_cells
from tilescan.experiments.papers.h3 import tables as h3_tables
from tilescan.ops import masks
from tilescan.ops.attention import attention
from tilescan.ops.long_convolution import long_convolution

# One layer's blocks; a hybrid has one layer of attention, the second.
MIXERS = {"attention": "attention", "s4d": "s4d", "h3": "h3"}
# The S4D of table 2 has no gate behind it.
S4D_OPTIONS = {"model.mixers.s4d.output": "linear"}


def cells(config) -> list[Cell]:
    """All measurements of the config."""
    return [
        *speed_cells(config),
        *mqar_cells(config),
        *language_cells(config),
        *text_cells_of(config),
    ]


def model_keys(model: str, layers: int, section) -> dict[str, Any]:
    """Training keys of a model of so many layers, each a mixer and an MLP.

    Raises:
      ValueError: an unknown model.
    """
    if model == "hybrid":
        mixers = ["h3"] * layers
        mixers[1] = "attention"
    elif model in MIXERS:
        mixers = [MIXERS[model]] * layers
    else:
        raise ValueError(f"model={model!r} is unknown; known: {', '.join([*MIXERS, 'hybrid'])}")
    same = len(set(mixers)) == 1
    pattern = tuple(block for mixer in mixers[: 1 if same else layers] for block in (mixer, "mlp"))
    return {
        "model.pattern": pattern,
        "model.repeats": layers if same else 1,
        "model.d_model": section.d_model,
        "model.n_heads": section.n_heads,
        "model.mlp": "gelu",
        "model.norm": "layernorm",
        # A hybrid's attention learns of positions through the state spaces.
        "model.position": "rope" if model == "attention" else "none",
        **(S4D_OPTIONS if model == "s4d" else {}),
    }


def language_cells(config) -> list[Cell]:
    """Table 2: the two synthetic languages, a fixed set of examples."""
    c = config.languages
    steps = c.epochs * (c.train_examples // c.batch_size)
    tasks = {
        "induction": {"length": c.induction_length, "vocab_size": c.induction_vocab},
        "associative_recall": {"length": c.recall_length, "vocab_size": c.recall_vocab},
    }
    made = []
    for task, options in tasks.items():
        for protocol in c.protocols:
            for model in c.models:
                settings = {
                    "kind": "language",
                    "model": model,
                    "protocol": protocol,
                    "task": task,
                    "options": {**options, "answer_only": protocol == "answer"},
                    "train_examples": c.train_examples,
                    "train": {**model_keys(model, 2, c), **_training(c, steps)},
                }
                for seed in c.seeds:
                    cell_id = f"{task}-{protocol}-{model}-seed{seed}"
                    made.append(Cell(cell_id, task_cells.run, settings, seed=seed, seconds=25))
    return made


def mqar_cells(config) -> list[Cell]:
    """Multi-query associative recall over numbers of pairs."""
    c = config.mqar
    made = []
    for pairs in c.pairs:
        for model in c.models:
            settings = {
                "kind": "mqar",
                "model": model,
                "pairs": pairs,
                "task": "multi_query_recall",
                "options": {"length": c.length, "pairs": pairs, "vocab_size": c.vocab_size},
                "train": {**model_keys(model, 2, c), **_training(c, c.steps)},
            }
            for seed in c.seeds:
                cell_id = f"mqar{pairs}-{model}-seed{seed}"
                made.append(Cell(cell_id, task_cells.run, settings, seed=seed, seconds=30))
    return made


def text_cells_of(config) -> list[Cell]:
    """Table 3: perplexity on held-out documents."""
    c = config.text
    made = []
    for model in c.models:
        keys = {
            **model_keys(model, c.layers, c),
            "data.sources": tuple(c.sources),
            "data.tokenizer": c.tokenizer,
            "data.fractions": tuple(c.fractions),
            "data.seq_len": c.seq_len,
            **_training(c, c.steps),
        }
        settings = {"kind": "text", "model": model, "train": keys}
        for seed in c.seeds:
            cell_id = f"text-{model}-seed{seed}"
            made.append(Cell(cell_id, text_cells.run, settings, seed=seed, seconds=60))
    return made


def speed_cells(config) -> list[Cell]:
    """Time against length: this project's long convolution, JAX's FFT, attention."""
    c = config.speed
    base = {k: c[k] for k in ("batch", "channels", "head_dim", "repeats")}
    return [
        Cell(f"speed-T{n}", speed, {"kind": "speed", "length": n, **base}, seconds=3)
        for n in c.lengths
    ]


def _training(section, steps: int) -> dict:
    return {
        "data.batch_size": section.batch_size,
        "train.steps": steps,
        "train.log_every": steps,
        "train.eval_every": max(1, steps // 10),
        "train.eval_batches": section.eval_batches,
        "optimizer.learning_rate": section.learning_rate,
        "optimizer.warmup_steps": steps // 10,
        "optimizer.b2": 0.999,
    }


def speed(settings: Mapping[str, Any], seed: int, folder) -> dict:
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


PAPER = Paper(
    name="h3",
    title="Hungry Hungry Hippos: towards language modeling with state space models "
    "(arXiv 2212.14052)",
    summary="Two state spaces and two gates let a layer recall and compare tokens; with one layer "
    "of attention kept, it models text as well as a Transformer.",
    cells=cells,
    tables=h3_tables.tables,
    claims=h3_tables.claims,
    figures=h3_tables.figures,
)
