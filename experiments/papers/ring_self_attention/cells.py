"""RSA's measurements: exactness, what layers send, and the memory of BERT-Base's training steps."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.measurements import sharded_transformer as transformer
from tilescan.experiments.measurements.exactness import errors_over_devices
from tilescan.experiments.measurements.sharded_layers import Shape
from tilescan.experiments.measurements.sharded_training import train, training_settings
from tilescan.experiments.measurements.words import recorded
from tilescan.ops import reference
from tilescan.ops.sequence_parallel import ring_attention, ring_self_attention, ulysses_attention

ATTENTION = {
    "rsa_all_reduce": functools.partial(ring_self_attention, reduction="all_reduce"),
    "rsa_reduce_scatter": ring_self_attention,
    "ulysses": ulysses_attention,
    "ring": ring_attention,
}
# {name in records of traffic: (strategy, reduction)}
TRAFFIC = {
    "tensor": ("tensor", "all_reduce"),
    "rsa_all_reduce": ("ring_self_attention", "all_reduce"),
    "rsa_reduce_scatter": ("ring_self_attention", "reduce_scatter"),
    "ring": ("ring", "all_reduce"),
    "ulysses": ("ulysses", "all_reduce"),
}
VARY = ("batch", "length")


def cells(config: ConfigDict) -> list[Cell]:
    """Returns all measurements of the config."""
    c = config
    model = recorded(c.model, "n_layers", "d_model", "n_heads", "vocab_size")
    limits = recorded(c.largest, "gib", "tolerance", **model)
    width = recorded(c.model, "d_model")
    bert = {"n_heads": c.training.n_heads, "causal": False, "mlp": "gelu", "norm": "layernorm"}

    # With the devices grows the batch, or the length.
    def growing(grows: str, way: str, devices: int) -> dict[str, Any]:
        batch = c.weak.batch_size * (devices if grows == "batch" else 1)
        length = c.weak.seq_len if grows == "batch" else devices * c.weak.short
        return {"kind": "weak", "batch": batch, "length": length, **model}

    # Of batch and length one is searched, the other given.
    def searched(vary: str, **point: Any) -> dict[str, Any]:
        given = "seq_len" if vary == "batch" else "batch_size"
        return recorded(c.largest, given, kind="largest", **limits)

    def whole_heads(way: str, devices: int, **point: Any) -> bool:
        return transformer.divides_heads(way, model["heads"], devices)

    def can_be_searched(vary: str, way: str, devices: int) -> bool:
        whole_length = vary == "length" or way == "tensor" or c.largest.seq_len % devices == 0
        return whole_length and whole_heads(way, devices)

    # Settings that all points of a sweep share, and the axes of those with several.
    exact = recorded(c.exactness, "seq_len", "n_heads", "head_dim", kind="exactness")
    sent = recorded(c.traffic, "batch_size", "seq_len", kind="traffic", heads=model["heads"])
    sparse = recorded(c.linformer, "batch_size", "rows", kind="sparse", vary="length", **limits)
    guess = training_settings(
        c.training, masked=True, sequence_parallel="ring_self_attention", **bert
    )
    weak = {"grows": VARY, "way": c.weak.strategies, "devices": c.weak.devices}
    largest = {"vary": VARY, "way": c.largest.strategies, "devices": c.largest.devices}
    linformer = {"way": ("linformer", "ring_self_attention"), "devices": c.linformer.devices}
    crossed = {"devices": c.crossover.devices, "tokens": c.crossover.tokens}
    trained = {"dtype": c.training.dtypes, "parts": (1, c.training.devices)}
    each = {"seconds": 5 + c.training.steps / 10, "seeds": c.training.seeds}
    return [
        *sweep("exactness-N{devices}", exactness, exact, seconds=10, devices=c.exactness.devices),
        *sweep("traffic-N{devices}", traffic, sent | width, seconds=12, devices=c.traffic.devices),
        *sweep(
            "weak-{grows}-{way}-N{devices}", memory, growing, seconds=4, where=whole_heads, **weak
        ),
        *sweep(
            "largest-{vary}-{way}-N{devices}",
            largest_size,
            searched,
            seconds=15,
            where=can_be_searched,
            **largest,
        ),
        *sweep("sparse-{way}-N{devices}", largest_size, sparse, seconds=15, **linformer),
        *sweep(
            "crossover-N{devices}-BL{tokens}", crossover, {"kind": "crossover", **width}, **crossed
        ),
        *sweep("training-{dtype}-N{parts}-seed{seed}", train, guess, **each, **trained),
    ]


def exactness(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns {name: {"output", "gradients"}}: float64 differences from dense attention.

    Settings: "devices", "length" of the whole sequence, "heads", "dim".
    """
    s, rng = settings, np.random.default_rng(seed)
    arrays = [rng.standard_normal((2, s["length"], s["heads"], s["dim"])) for _ in range(4)]
    return errors_over_devices(ATTENTION, reference.attention, arrays, s["devices"], "float64")


def traffic(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns {name: `sharded_transformer.traffic`} of one layer, names of TRAFFIC.

    Ulysses and tensor parallelism only if there are heads for all devices.

    Settings: "devices", "batch", "length", "width", "heads".
    """
    s = settings
    shape = functools.partial(transformer.shape_of, s, stored=True)
    return {
        name: transformer.traffic(strategy, shape(reduction=reduction), s["devices"])
        for name, (strategy, reduction) in TRAFFIC.items()
        if transformer.divides_heads(strategy, s["heads"], s["devices"])
    }


def memory(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns a device's bytes in a training step: `sharded_transformer.step_memory`.

    Settings: "way" (the strategy), "devices", "batch", "length", "layers", "width", "heads",
    "vocab_size".
    """
    shape = transformer.shape_of(settings, stored=True)
    return transformer.step_memory(settings["way"], shape, settings["devices"])


def largest_size(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns `sharded_transformer.largest_step` of a batch or a length ("vary").

    Lengths are multiples of the devices where time is sharded.
    """
    s = settings
    step = 1 if s["vary"] == "batch" else 8 if s["way"] == "tensor" else s["devices"]
    start = 16 if s["vary"] == "batch" else 256
    return transformer.largest_step(s, s["vary"], start, step, stored=True)


def crossover(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns {"tensor" or "sequence": {"kept", "total"}}: bytes of an MLP alone.

    Kept between the passes: weights four times (Adam), and what the backward pass reads beside
    them, counted in the traced program. Total: as the compiler plans, gradients of the input
    included.

    Settings: "devices", "tokens" B L / H, "width".
    """
    H, found = settings["width"], {}
    shape = Shape(1, settings["tokens"] * H, 1, H, 1, blocks=("mlp",), residual=False)
    for name, strategy in (("tensor", "tensor"), ("sequence", "ring_self_attention")):
        step = (strategy, shape, settings["devices"])
        kept = 4 * transformer.weight_bytes(*step) + transformer.kept_bytes(*step)
        found[name] = {"kept": kept, "total": transformer.step_memory(*step)["total"]}
    return found
