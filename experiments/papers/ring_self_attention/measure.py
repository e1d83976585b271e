"""RSA's cells: exactness, what layers send, and the memory of training steps of BERT-Base."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.experiments.measurements import devices as cells
from tilescan.experiments.measurements import sharded_transformer as layers
from tilescan.ops import reference
from tilescan.ops.sequence_parallel import ring_attention, ring_self_attention, ulysses_attention

ATTENTION = {
    "RSA, all-reduce": functools.partial(ring_self_attention, reduction="all_reduce"),
    "RSA, reduce-scatter": ring_self_attention,
    "ring attention": ring_attention,
    "Ulysses": ulysses_attention,
}
TRAFFIC = {
    "tensor": ("tensor", "all_reduce"),
    "RSA, all-reduce": ("ring_self_attention", "all_reduce"),
    "RSA, reduce-scatter": ("ring_self_attention", "reduce_scatter"),
    "ring": ("ring", "all_reduce"),
    "ulysses": ("ulysses", "all_reduce"),
}


def exactness(settings: Mapping[str, Any], seed: int) -> dict:
    """{way: {"output", "gradients"}}: largest float64 differences from dense attention.

    Settings: "devices", "length" of the whole sequence, "heads", "dim".
    """
    s = settings
    mesh = cells.mesh_of(s["devices"])
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        shape = (2, s["length"], s["heads"], s["dim"])
        arrays = [jnp.asarray(rng.standard_normal(shape)) for _ in range(4)]
        want = _values_and_gradients(reference.attention)(*arrays)
        return {
            name: {"output": cells.difference(got[0], want[0]),
                   "gradients": cells.difference(got[1], want[1])}
            for name, op in ATTENTION.items()
            for got in [_values_and_gradients(cells.over_time(op, mesh))(*arrays)]
        }  # fmt: skip


def _values_and_gradients(op):
    def run(do, *arrays):
        o, pull = jax.vjp(op, *arrays)
        return o, pull(do)

    return jax.jit(run)


def traffic(settings: Mapping[str, Any], seed: int) -> dict:
    """{way: {"forward": counts, "both": counts}} of one compiled layer, by `cells.sent`.

    Gradients of weights are left out. Ulysses only if there are heads for all devices, and so
    tensor parallelism.

    Settings: "devices", "batch", "length", "width", "heads".
    """
    s, found = settings, {}
    for name, (way, reduction) in TRAFFIC.items():
        shape = layers.Shape(
            s["batch"], s["length"], 1, s["width"], s["heads"], stored=True, reduction=reduction
        )
        if way in ("tensor", "ulysses") and s["heads"] % s["devices"]:
            continue
        found[name] = {
            key: cells.sent(compiled(way, shape, s["devices"], what))
            for key, what in (("forward", "forward"), ("both", "inputs"))
        }
    return found


def compiled(way: str, shape: layers.Shape, count: int, what: str = "step"):
    """A program of `sequence_parallel_layers`, compiled."""
    function, arguments = layers.program(way, shape, count, what)
    return cells.compiled(function, *arguments)


def memory(settings: Mapping[str, Any], seed: int) -> dict:
    """Bytes of a device in a training step: `cells.memory` and Adam's "moments", in "total".

    Settings: "way", "devices", "batch", "length", "layers", "width", "heads", "vocab_size".
    """
    s = settings
    return step_memory(s["way"], _model(s, s["batch"], s["length"]), s["devices"])


def _model(s, batch, length, **options):
    return layers.Shape(
        batch, length, s["layers"], s["width"], s["heads"], vocab=s["vocab_size"], stored=True,
        **options,
    )  # fmt: skip


def step_memory(way: str, shape: layers.Shape, count: int) -> dict[str, int]:
    """As `memory`; the moments, twice the weights, are added to what the compiler plans."""
    found = cells.memory(compiled(way, shape, count))
    found["moments"] = 2 * layers.weight_bytes(way, shape, count)
    found["total"] += found["moments"]
    return found


def largest(settings: Mapping[str, Any], seed: int) -> dict:
    """{"value": the largest batch or length, "bytes", "compiled": how many programs}.

    Settings: those of `memory`; "vary", "batch" or "length", of which the other is given;
    "rows" of Linformer's attention; "gib", and the "tolerance" of the value. Lengths are multiples
    of the devices where time is cut.
    """
    s, tried = settings, {}
    unit = 1 if s["vary"] == "batch" else 8 if s["way"] == "tensor" else s["devices"]

    def size(n):
        batch, length = (n, s["length"]) if s["vary"] == "batch" else (s["batch"], n * unit)
        shape = _model(s, batch, length, rows=s.get("rows", 256))
        tried[n] = step_memory(s["way"], shape, s["devices"])
        return tried[n]["total"]

    start = max(1, 256 // unit) if s["vary"] == "length" else 16
    n = cells.largest(size, s["gib"] * 2**30, start, s["tolerance"])
    return {"value": n * unit, "bytes": tried.get(n, {}), "compiled": len(tried)}


def crossover(settings: Mapping[str, Any], seed: int) -> dict:
    """An MLP alone, {way: {"kept", "total"}} bytes: between the passes, and as planned in all.

    Kept: weights four times (Adam), and what the backward pass reads beside them, counted in the
    traced program. Planned: by the compiler, gradients of the input included.

    Settings: "devices", "tokens" B L / H, "width".
    """
    s = settings
    H = s["width"]
    shape = layers.Shape(1, s["tokens"] * H, 1, H, 1, blocks=("mlp",), residual=False)
    found = {}
    for name, way in (("tensor", "tensor"), ("sequence", "ring_self_attention")):
        weights = layers.weight_bytes(way, shape, s["devices"])
        found[name] = {
            "kept": 4 * weights + layers.kept_bytes(way, shape, s["devices"]),
            "total": step_memory(way, shape, s["devices"])["total"],
        }
    return found
