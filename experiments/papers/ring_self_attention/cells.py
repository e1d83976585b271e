"""RSA's measurements: exactness, what layers send, and the memory of BERT-Base's training steps."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.measurements import sharded_transformer as transformer
from tilescan.experiments.measurements.devices import mesh_of, over_time
from tilescan.experiments.measurements.exactness import errors, values_and_gradients
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


def cells(config) -> list[Cell]:
    """Returns all measurements of the config."""
    c = config
    model = recorded(c.model, "n_layers", "d_model", "n_heads", "vocab_size")
    limits = recorded(c.largest, "gib", "tolerance", **model)
    whole_heads = lambda way, devices: transformer.divides_heads(way, model["heads"], devices)

    # With the devices grows the batch, or the length.
    def growing(grows: str, way: str, devices: int) -> dict[str, Any]:
        batch = c.weak.batch_size * (devices if grows == "batch" else 1)
        length = c.weak.seq_len if grows == "batch" else devices * c.weak.short
        return {"kind": "weak", "batch": batch, "length": length, **model}

    # Of batch and length one is searched, the other given.
    def searched(vary: str, **point: Any) -> dict[str, Any]:
        given = "seq_len" if vary == "batch" else "batch_size"
        return recorded(c.largest, given, kind="largest", **limits)

    def can_be_searched(vary: str, way: str, devices: int) -> bool:
        whole_length = vary == "length" or way == "tensor" or c.largest.seq_len % devices == 0
        return whole_length and whole_heads(way, devices)

    width = recorded(c.model, "d_model")
    sent = recorded(c.traffic, "batch_size", "seq_len", kind="traffic", heads=model["heads"])
    guess = training_settings(
        c.training,
        masked=True,
        n_heads=c.training.n_heads,
        causal=False,
        mlp="gelu",
        norm="layernorm",
        sequence_parallel="ring_self_attention",
    )
    return [
        *sweep(
            "exactness-N{devices}",
            exactness,
            recorded(c.exactness, "seq_len", "n_heads", "head_dim", kind="exactness"),
            seconds=10,
            devices=c.exactness.devices,
        ),
        *sweep("traffic-N{devices}", traffic, sent | width, seconds=12, devices=c.traffic.devices),
        *sweep(
            "weak-{grows}-{way}-N{devices}",
            memory,
            growing,
            seconds=4,
            where=lambda grows, way, devices: whole_heads(way, devices),
            grows=("batch", "length"),
            way=c.weak.strategies,
            devices=c.weak.devices,
        ),
        *sweep(
            "largest-{vary}-{way}-N{devices}",
            largest_size,
            searched,
            seconds=15,
            where=can_be_searched,
            vary=("batch", "length"),
            way=c.largest.strategies,
            devices=c.largest.devices,
        ),
        *sweep(
            "sparse-{way}-N{devices}",
            largest_size,
            recorded(c.linformer, "batch_size", "rows", kind="sparse", vary="length", **limits),
            seconds=15,
            way=("linformer", "ring_self_attention"),
            devices=c.linformer.devices,
        ),
        *sweep(
            "crossover-N{devices}-BL{tokens}",
            crossover,
            {"kind": "crossover", **width},
            devices=c.crossover.devices,
            tokens=c.crossover.tokens,
        ),
        *sweep(
            "training-{dtype}-N{parts}",
            train,
            guess,
            seconds=5 + c.training.steps / 10,
            dtype=c.training.dtypes,
            parts=(1, c.training.devices),
        ),
    ]


def exactness(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns {name: {"output", "gradients"}}: float64 differences from dense attention.

    Settings: "devices", "length" of the whole sequence, "heads", "dim".
    """
    s = settings
    mesh = mesh_of(s["devices"])
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        shape = (2, s["length"], s["heads"], s["dim"])
        arrays = [jnp.asarray(rng.standard_normal(shape)) for _ in range(4)]
        want = values_and_gradients(reference.attention)(*arrays)
        return {
            name: errors(values_and_gradients(over_time(op, mesh))(*arrays), want)
            for name, op in ATTENTION.items()
        }


def traffic(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns {name: `sharded_transformer.traffic`} of one layer, names of TRAFFIC.

    Ulysses and tensor parallelism only if there are heads for all devices.

    Settings: "devices", "batch", "length", "width", "heads".
    """
    s = settings
    return {
        name: transformer.traffic(strategy, _shape({**s, "layers": 1}, reduction), s["devices"])
        for name, (strategy, reduction) in TRAFFIC.items()
        if transformer.divides_heads(strategy, s["heads"], s["devices"])
    }


def memory(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns a device's bytes in a training step: `sharded_transformer.step_memory`.

    Settings: "way" (the strategy), "devices", "batch", "length", "layers", "width", "heads",
    "vocab_size".
    """
    return transformer.step_memory(settings["way"], _shape(settings), settings["devices"])


def largest_size(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns {"value": the largest batch or length, "bytes", "compiled": how many programs}.

    Settings: those of `memory`; "vary", "batch" or "length", of which the other is given;
    "rows" of Linformer's attention; "gib", and the "tolerance" of the value. Lengths are multiples
    of the devices where time is sharded.
    """
    s = settings
    step = 1 if s["vary"] == "batch" else 8 if s["way"] == "tensor" else s["devices"]
    value, found = transformer.largest_step(
        s["way"],
        lambda n: _shape({**s, s["vary"]: n}),
        s["devices"],
        gib=s["gib"],
        start=16 if s["vary"] == "batch" else 256,
        step=step,
        tolerance=s["tolerance"],
    )
    return {"value": value, **found}


def crossover(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns {"tensor" or "sequence": {"kept", "total"}}: bytes of an MLP alone.

    Kept between the passes: weights four times (Adam), and what the backward pass reads beside
    them, counted in the traced program. Total: as the compiler plans, gradients of the input
    included.

    Settings: "devices", "tokens" B L / H, "width".
    """
    s = settings
    H = s["width"]
    shape = Shape(1, s["tokens"] * H, 1, H, 1, blocks=("mlp",), residual=False)
    found = {}
    for name, strategy in (("tensor", "tensor"), ("sequence", "ring_self_attention")):
        of_step = (strategy, shape, s["devices"])
        found[name] = {
            "kept": 4 * transformer.weight_bytes(*of_step) + transformer.kept_bytes(*of_step),
            "total": transformer.step_memory(*of_step)["total"],
        }
    return found


def _shape(s: Mapping[str, Any], reduction: str = "all_reduce") -> Shape:
    return Shape(
        *(s[k] for k in ("batch", "length", "layers", "width", "heads")),
        vocab=s.get("vocab_size", 0),
        stored=True,
        reduction=reduction,
        rows=s.get("rows", 256),
    )
