"""Ulysses' measurements: attention of every kind, what layers send, longest sequences, training."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.measurements import sharded_transformer as transformer
from tilescan.experiments.measurements.devices import AXIS, devices
from tilescan.experiments.measurements.exactness import errors_over_devices
from tilescan.experiments.measurements.sharded_training import train, training_settings
from tilescan.experiments.measurements.words import recorded
from tilescan.ops import masks
from tilescan.ops.attention import attention
from tilescan.ops.sequence_parallel import ulysses_attention
from tilescan.ops.ssd import ssd

BLOCK = 16


def cells(config: ConfigDict) -> list[Cell]:
    """Returns all measurements of the config."""
    c = config
    # Every length on some devices, and lengths that grow with the devices.
    points = [(n, length) for length in c.traffic.seq_lens for n in c.traffic.devices]
    points += [(n, n * c.traffic.weak_seq_len) for n in c.traffic.weak_devices]
    # Float32 shows by the first number of devices how rounding grows, which float64 hides.
    float64, fewest = c.training.dtypes[0], c.training.devices[0]
    trained = lambda dtype, parts: dtype == float64 or parts in (1, fewest)

    # Settings that all points of a sweep share, and the axes.
    exact = recorded(c.exactness, "seq_len", "n_heads", "head_dim", kind="exactness")
    layer = recorded(c.traffic, "d_model", "n_heads", "strategies", kind="traffic")
    gpt = recorded(c.memory, "n_layers", "d_model", "n_heads", "vocab_size", "unit")
    fits = recorded(c.memory, "gib", "tolerance", kind="longest", **gpt)
    model = {"n_heads": c.training.n_heads, "sequence_parallel": "ulysses"}
    same = training_settings(c.training, **model)
    each = {"seconds": 5 + c.training.steps / 10, "seeds": c.training.seeds}
    kinds = {"attention": c.exactness.kinds, "devices": c.exactness.devices}
    sizes = {"devices": sorted({n for n, _ in points}), "length": sorted({x for _, x in points})}
    listed = lambda devices, length: (devices, length) in points
    ways = {"way": c.memory.strategies, "devices": c.memory.devices}
    runs = {"dtype": c.training.dtypes, "parts": (1, *c.training.devices)}
    return [
        *sweep("exactness-{attention}-P{devices}", exactness, exact, seconds=4, **kinds),
        *sweep("traffic-P{devices}-N{length}", traffic, layer, seconds=10, where=listed, **sizes),
        *sweep("longest-{way}-P{devices}", longest, fits, seconds=25, **ways),
        *sweep("training-{dtype}-P{parts}-seed{seed}", train, same, where=trained, **each, **runs),
    ]


def exactness(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns {"output", "gradients"}: float32 differences from one device.

    Settings: "devices", "attention" (a key of KINDS, or "ssd"), "length" of the whole sequence,
    "heads", "dim".

    Raises:
      ValueError: an unknown kind.
    """
    s = settings
    devices(s["devices"])  # before the first array is made
    if s["attention"] not in (*KINDS, "ssd"):
        raise ValueError(f"attention={s['attention']!r} is unknown; known: {', '.join(KINDS)}, ssd")
    make = _ssd if s["attention"] == "ssd" else _attention
    alone, sharded, arrays = make(s, np.random.default_rng(seed))
    found = errors_over_devices({"ulysses": sharded}, alone, arrays, s["devices"], "float32")
    return found["ulysses"]


def _sparse(s: Mapping[str, Any]) -> masks.Mask:
    """Returns blocks: local ones and the first of every four, as in the paper's sparse model."""
    n = s["length"] // BLOCK
    i, j = np.indices((n, n))
    return masks.BlockSparse((i - j < 2) | (j % 4 == 0), BLOCK) & masks.Causal()


KINDS = {
    "full": lambda s: masks.Full(),
    "causal": lambda s: masks.Causal(),
    "gqa": lambda s: masks.Causal(),
    "alibi": lambda s: masks.Causal(),
    "window": lambda s: masks.SlidingWindow(s["length"] // 4),
    "sparse": _sparse,
}


def _attention(s: Mapping[str, Any], rng: np.random.Generator) -> tuple[Callable, Callable, list]:
    """Returns (op of one device, op of its shards, arrays: the cotangent, q, k, v)."""
    kind, T, H, D = s["attention"], s["length"], s["heads"], s["dim"]
    G = max(1, H // 4) if kind == "gqa" else H
    options = {"mask": KINDS[kind](s), "bias": None}
    if kind == "alibi":  # -slope (i - j), of which softmax sees slope j alone
        slopes = 2.0 ** (-8 * np.arange(1, H + 1) / H)
        bias = (slopes[:, None] * np.arange(T))[None, :, None]
        options["bias"] = jnp.asarray(bias, jnp.float32)
    arrays = [rng.standard_normal((2, T, heads, D)) for heads in (H, H, G, G)]
    ops = (functools.partial(op, **options) for op in (attention, ulysses_attention))
    return *ops, arrays


def _ssd(s: Mapping[str, Any], rng: np.random.Generator) -> tuple[Callable, Callable, list]:
    """Returns the same for `ops.ssd`: any op that mixes no heads fits between all-to-alls."""
    T, H, D = s["length"], s["heads"], s["dim"]
    A = jnp.asarray(-np.exp(rng.standard_normal(H)), jnp.float32)

    def sharded(x, dt, B, C):
        n = H // jax.lax.axis_size(AXIS)
        to_heads = lambda a: jax.lax.all_to_all(a, AXIS, 2, 1, tiled=True)
        whole = lambda a: jax.lax.all_gather(a, AXIS, axis=1, tiled=True)
        own = jax.lax.dynamic_slice_in_dim(A, jax.lax.axis_index(AXIS) * n, n)
        y, _ = ssd(to_heads(x), to_heads(dt), own, whole(B), whole(C))
        return jax.lax.all_to_all(y, AXIS, 1, 2, tiled=True)

    shapes = (2, T, H, D), (2, T, H, D), (2, T, H), (2, T, 1, D), (2, T, 1, D)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    arrays[2] = 0.1 * np.exp(arrays[2])
    return lambda x, dt, B, C: ssd(x, dt, A, B, C)[0], sharded, arrays


def traffic(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns {strategy: `sharded_transformer.traffic`} of one layer.

    Settings: "devices", "length", "width", "heads", "ways" (strategies of sharded_layers).
    """
    s = settings
    shape = transformer.shape_of(s, stored=True)
    return {way: transformer.traffic(way, shape, s["devices"]) for way in s["ways"]}


def longest(settings: Mapping[str, Any], seed: int) -> dict:
    """Returns the longest sequence whose training step fits: {"length", "bytes", "compiled"}.

    Settings: see `sharded_transformer.largest_step`; "unit" (lengths are multiples of so many
    tokens a device).
    """
    step = settings["unit"] * settings["devices"]
    options = step_options(settings)
    found = transformer.largest_step(settings, "length", 16 * step, step, **options)
    return {"length": found.pop("value"), **found}


def step_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how the Transformer of `longest` is computed, as fields of its `Shape`.

    Layers are computed again in the backward pass, logits exist for "unit" tokens at once. Ulysses
    shards weights, gradients and Adam's moments over all devices (ZeRO-3); Megatron by its nature.
    """
    chunk = settings["unit"]
    return {"causal": True, "remat": True, "sharded_weights": True, "head_chunk": chunk}
