"""StreamBP's memory, as the compiler plans it, and the time of its gradients."""

from collections.abc import Mapping
from typing import Any

import jax

from tilescan.experiments.measurements import timing
from tilescan.experiments.measurements.compiled import compiled, largest_within, memory
from tilescan.experiments.papers.stream_bp.losses import (
    CHECKPOINT,
    SFT,
    STREAM,
    abstract_batch,
    abstract_parameters,
    make,
    parameters,
    random_batch,
)

GB = 1e9


def longest(settings: Mapping[str, Any], seed: int) -> dict:
    """Searches the longest sequence whose gradient needs at most so many bytes of temporaries.

    Settings: "loss", "method", "model", "chunks", "logit_chunk" (see `losses.make`);
    "budget_gb"; "start" and "step", of the search.

    Returns:
      {"length", "tried": [[length, temporary bytes]...], "parameters" (their number)}.
    """
    model = dict(settings["model"])
    loss = make(
        settings["loss"],
        settings["method"],
        model,
        chunks=settings["chunks"],
        logit_chunk=settings["logit_chunk"],
    )
    params = abstract_parameters(model)

    def need(length):
        batch = abstract_batch(settings["loss"], length)
        return memory(compiled(jax.grad(loss, has_aux=True), params, batch))["temporary"]

    budget = settings["budget_gb"] * GB
    length, tried = largest_within(need, budget, settings["start"], settings["step"], 0.02)
    return {
        "length": length,
        "tried": sorted(tried.items()),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }


def times(settings: Mapping[str, Any], seed: int) -> dict:
    """Times a gradient, forward pass included, by several methods in turn.

    Settings: "model", "methods", "length", "chunks", "logit_chunk", "repeats".

    Returns:
      {"parameters", method: what `timing.compare` gives}.
    """
    model = dict(settings["model"])
    options = dict(chunks=settings["chunks"], logit_chunk=settings["logit_chunk"])
    functions = {
        method: jax.grad(make(SFT, method, model, **options), has_aux=True)
        for method in settings["methods"]
    }
    return _compared(settings, seed, functions)


def chunk_counts(settings: Mapping[str, Any], seed: int) -> dict:
    """Measures time and memory of a streamed gradient by chunks, beside checkpointing.

    Settings: "model", "length", "counts", "logit_chunk", "repeats".

    Returns:
      {"parameters", "checkpoint" and each count as text: what `timing.compare` gives}.
    """
    model, logit_chunk = dict(settings["model"]), settings["logit_chunk"]
    losses = {CHECKPOINT: make(SFT, CHECKPOINT, model, chunks=1, logit_chunk=logit_chunk)}
    for chunks in settings["counts"]:
        losses[str(chunks)] = make(SFT, STREAM, model, chunks=chunks, logit_chunk=logit_chunk)
    functions = {name: jax.grad(loss, has_aux=True) for name, loss in losses.items()}
    return _compared(settings, seed, functions)


def _compared(settings, seed, functions) -> dict:
    model = dict(settings["model"])
    params = parameters(model, seed)
    batch = random_batch(settings["length"], model["vocab_size"], seed)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        **timing.compare(functions, (params, batch), repeats=settings["repeats"]),
    }
