"""StreamBP's memory, as the compiler plans it, and the time of its gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from tilescan.experiments.measurements import timing
from tilescan.experiments.measurements.compiled import compiled, largest_within, memory
from tilescan.experiments.papers.stream_bp import losses
from tilescan.experiments.papers.stream_bp.losses import CHECKPOINT, SFT, STREAM, make
from tilescan.models import LanguageModelConfig, abstract_params, count_params, init_params

GB = 1e9


def longest(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Searches the longest sequence whose gradient needs at most so many bytes of temporaries.

    Settings: "loss", "method", "model", "chunks", "logit_chunk" (see `losses.make`);
    "budget_gb"; "start" and "step", of the search.

    Returns:
      {"length", "tried": [[length, temporary bytes]...], "parameters" (their number)}.
    """
    s = settings
    loss = make(s["loss"], s["method"], s["model"], **losses.sizes(s))
    params = abstract_params(LanguageModelConfig(**s["model"]))

    def need(length: int) -> int:
        batch = losses.abstract_batch(s["loss"], length)
        return memory(compiled(jax.grad(loss, has_aux=True), params, batch))["temporary"]

    length, tried = largest_within(need, s["budget_gb"] * GB, s["start"], s["step"], 0.02)
    return {"length": length, "tried": sorted(tried.items()), "parameters": count_params(params)}


def times(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Times a gradient, forward pass included, by several methods in turn.

    Settings: "model", "methods", "length", "chunks", "logit_chunk", "repeats".

    Returns:
      {"parameters", method: what `timing.compare` gives}.
    """
    model, sizes = settings["model"], losses.sizes(settings)
    made = {method: make(SFT, method, model, **sizes) for method in settings["methods"]}
    return _compared(settings, seed, made)


def chunk_counts(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Measures time and memory of a streamed gradient by chunks, beside checkpointing.

    Settings: "model", "length", "counts", "logit_chunk", "repeats".

    Returns:
      {"parameters", "checkpoint" and each count as text: what `timing.compare` gives}.
    """
    model, logits = settings["model"], {"logit_chunk": settings["logit_chunk"]}
    made = {CHECKPOINT: make(SFT, CHECKPOINT, model, **logits)}
    made |= {str(n): make(SFT, STREAM, model, chunks=n, **logits) for n in settings["counts"]}
    return _compared(settings, seed, made)


def _compared(settings: Mapping[str, Any], seed: int, made: Mapping[str, Callable]) -> dict:
    """Times the gradients of losses by name, on one batch."""
    model = LanguageModelConfig(**settings["model"])
    params = init_params(model, seed)
    batch = losses.random_batch(settings["length"], model.vocab_size, seed)
    functions = {name: jax.grad(loss, has_aux=True) for name, loss in made.items()}
    found = timing.compare(functions, (params, batch), repeats=settings["repeats"])
    return {"parameters": count_params(params), **found}
