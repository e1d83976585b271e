"""Ulysses' cells: attention of every kind against one device, what layers send, longest texts."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.experiments.measurements import devices as cells
from tilescan.experiments.measurements import sharded_transformer as layers
from tilescan.ops import masks
from tilescan.ops.attention import attention
from tilescan.ops.sequence_parallel import ulysses_attention
from tilescan.ops.ssd import ssd

BLOCK = 16


def exactness(settings: Mapping[str, Any], seed: int) -> dict:
    """{"output", "gradients"}: largest differences from one device, float32.

    Settings: "devices", "attention" (a key of KINDS, or "ssd"), "length" of the whole sequence,
    "heads", "dim".

    Raises:
      ValueError: an unknown kind.
    """
    s = settings
    cells.devices(s["devices"])  # before the first array is made
    if s["attention"] not in (*KINDS, "ssd"):
        raise ValueError(f"attention={s['attention']!r} is unknown; known: {', '.join(KINDS)}, ssd")
    make = _ssd if s["attention"] == "ssd" else _attention
    whole, cut, arrays = make(s, np.random.default_rng(seed))
    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]
    (o, gradients), (want, want_gradients) = (
        _values_and_gradients(op)(*arrays) for op in (cut, whole)
    )
    return {
        "output": cells.difference(o, want),
        "gradients": cells.difference(gradients, want_gradients),
    }


def _values_and_gradients(op):
    def run(do, *arrays):
        o, pull = jax.vjp(op, *arrays)
        return o, pull(do)

    return jax.jit(run)


def _sparse(s):
    """Blocks: local ones and the first of each stretch of four, as in the paper's sparse model."""
    n = s["length"] // BLOCK
    i, j = np.indices((n, n))
    layout = (i - j < 2) | (j % 4 == 0)
    return masks.BlockSparse(layout, BLOCK) & masks.Causal()


KINDS = {
    "full": lambda s: masks.Full(),
    "causal": lambda s: masks.Causal(),
    "gqa": lambda s: masks.Causal(),
    "alibi": lambda s: masks.Causal(),
    "window": lambda s: masks.SlidingWindow(s["length"] // 4),
    "sparse": _sparse,
}


def _attention(s, rng):
    """(op of one device, op over devices, arrays: the cotangent, q, k, v)."""
    kind, T, H, D = s["attention"], s["length"], s["heads"], s["dim"]
    G = max(1, H // 4) if kind == "gqa" else H
    bias = None
    if kind == "alibi":  # -slope (i - j), of which softmax sees slope j alone
        slopes = 2.0 ** (-8 * np.arange(1, H + 1) / H)
        bias = jnp.asarray((slopes[:, None] * np.arange(T))[None, :, None], jnp.float32)
    options = dict(mask=KINDS[kind](s), bias=bias)
    cut = cells.over_time(
        functools.partial(ulysses_attention, **options), cells.mesh_of(s["devices"])
    )
    arrays = [rng.standard_normal((2, T, heads, D)) for heads in (H, H, G, G)]
    return functools.partial(attention, **options), cut, arrays


def _ssd(s, rng):
    """The same for `ops.ssd`: any op between two all-to-alls that knows nothing between heads."""
    T, H, D = s["length"], s["heads"], s["dim"]
    A = jnp.asarray(-np.exp(rng.standard_normal(H)), jnp.float32)

    def cut(x, dt, B, C):
        n = H // jax.lax.axis_size(cells.AXIS)
        to_heads = lambda a: jax.lax.all_to_all(a, cells.AXIS, 2, 1, tiled=True)
        whole = lambda a: jax.lax.all_gather(a, cells.AXIS, axis=1, tiled=True)
        own = jax.lax.dynamic_slice_in_dim(A, jax.lax.axis_index(cells.AXIS) * n, n)
        y, _ = ssd(to_heads(x), to_heads(dt), own, whole(B), whole(C))
        return jax.lax.all_to_all(y, cells.AXIS, 1, 2, tiled=True)

    shapes = (2, T, H, D), (2, T, H, D), (2, T, H), (2, T, 1, D), (2, T, 1, D)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    arrays[2] = 0.1 * np.exp(arrays[2])
    op = lambda x, dt, B, C: ssd(x, dt, A, B, C)[0]
    return op, cells.over_time(cut, cells.mesh_of(s["devices"])), arrays


def traffic(settings: Mapping[str, Any], seed: int) -> dict:
    """{way: {"forward": counts, "both": counts}} of one compiled layer, by `cells.sent`.

    Of "both" passes, gradients of weights are left out: their sum does not depend on the length.

    Settings: "devices", "length", "width", "heads", "ways" (of sequence_parallel_layers).
    """
    s = settings
    shape = layers.Shape(1, s["length"], 1, s["width"], s["heads"], stored=True)
    count = lambda way, what: cells.sent(
        cells.compiled(*_flat(layers.program(way, shape, s["devices"], what)))
    )
    return {
        way: {"forward": count(way, "forward"), "both": count(way, "inputs")} for way in s["ways"]
    }


def _flat(program):
    function, arguments = program
    return function, *arguments


def longest(settings: Mapping[str, Any], seed: int) -> dict:
    """The longest text whose training step fits: {"length", "bytes": its parts, "compiled"}.

    Layers are computed again in the backward pass, logits exist for "unit" tokens at once. Ulysses
    cuts weights, gradients and Adam's moments over all devices (ZeRO-3); Megatron by its nature.
    The two moments, like weights in size, are added to what the compiler plans.

    Settings: "devices", "way", "layers", "width", "heads", "vocab_size", "unit" (lengths are
    multiples of so many tokens a device), "gib", "tolerance" of the length.
    """
    s, tried = settings, {}

    def size(n):
        tried[n] = step_memory(s, n * s["unit"] * s["devices"])
        return tried[n]["total"]

    n = cells.largest(size, s["gib"] * 2**30, start=16, tolerance=s["tolerance"])
    return {
        "length": n * s["unit"] * s["devices"],
        "bytes": tried.get(n, {}),
        "compiled": len(tried),
    }


def step_memory(s: Mapping[str, Any], length: int) -> dict[str, int]:
    """Bytes of a device in a training step, Adam's moments ("moments") included."""
    shape = layers.Shape(
        1, length, s["layers"], s["width"], s["heads"], vocab=s["vocab_size"], causal=True,
        remat=True, sharded_weights=True, head_chunk=s["unit"],
    )  # fmt: skip
    found = cells.memory(cells.compiled(*_flat(layers.program(s["way"], shape, s["devices"]))))
    found["moments"] = 2 * layers.weight_bytes(s["way"], shape, s["devices"])
    found["total"] += found["moments"]
    return found
