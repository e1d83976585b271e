"""Measurements of attention that several papers share: time and memory against length.

Dimensions: B batch, T time, H heads, D head dim.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tilescan.experiments.measurements import timing
from tilescan.ops import masks
from tilescan.ops.attention import attention

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
DIRECTIONS = {FORWARD: "forward", FORWARD_BACKWARD: "forward + backward"}  # with their titles
STANDARD, TILED = "standard", "tiled"
VARIANTS = (STANDARD, TILED, "windowed", "block_sparse")


def variant(name: str, settings: Mapping[str, Any]) -> Callable[..., Array]:
    """Returns a function (q, k, v) -> o, all [B, T, H, D].

    Args:
      name: "standard" is `jax.nn.dot_product_attention`, which forms the T x T matrix; "tiled" is
        ours; "windowed" and "block_sparse" (flat butterfly) are ours with these masks.
      settings: "length", "causal"; "window" (keys seen by a query) and "block" where used.

    Raises:
      ValueError: an unknown name.
    """
    causal = settings.get("causal", False)
    if name == STANDARD:
        return functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    mask = _mask(name, settings)
    return functools.partial(attention, mask=mask & masks.Causal() if causal else mask)


def _mask(name: str, settings: Mapping[str, Any]) -> masks.Mask:
    length = settings["length"]
    if name == TILED:
        return masks.Full()
    if name == "windowed":
        half = settings["window"] // 2
        return masks.SlidingWindow(half, half)
    if name == "block_sparse":
        layout = masks.butterfly(-(-length // settings["block"]))
        return masks.BlockSparse(layout, settings["block"])
    raise ValueError(f"variant={name!r} is unknown; it must be one of {', '.join(VARIANTS)}")


def live_fraction(length: int, block: int) -> float:
    """Returns the fraction s of the scores that the flat butterfly keeps, as in the bound of IO."""
    return float(masks.butterfly(-(-length // block)).mean())


def in_direction(attend: Callable[..., Array], direction: str) -> Callable[..., Any]:
    """Returns `attend` as a function (q, k, v, do) -> o, or -> (o, dq, dk, dv)."""
    if direction == FORWARD:
        return lambda q, k, v, do: attend(q, k, v)

    def forward_backward(q, k, v, do):
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(do)

    return forward_backward


def inputs(settings: Mapping[str, Any], seed: int) -> tuple[Float[Array, "B T H D"], ...]:
    """Returns random (q, k, v, do) of the settings' shape and dtype."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return tuple(jax.random.normal(key, _shape(settings), settings["dtype"]) for key in keys)


def runtime(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Times the variants of one length in one direction, interleaved.

    Settings: length, direction, batch, heads, head_dim, dtype, variants, repeats, and those of
    `variant`. Returns what `timing.compare` returns, by variant.
    """
    functions = {
        name: in_direction(variant(name, settings), settings["direction"])
        for name in settings["variants"]
    }
    return timing.compare(functions, inputs(settings, seed), repeats=settings["repeats"])


def memory(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Compiles the variants of one length and reads their bytes of temporaries; nothing runs.

    Settings as for `runtime`. Returns {variant: {"temp_bytes", "compile_s"}}; a variant that the
    compiler refuses for lack of memory (TPU) has {"error": "out of memory"} instead.
    """
    like = jax.ShapeDtypeStruct(_shape(settings), jnp.dtype(settings["dtype"]))
    results = {}
    for name in settings["variants"]:
        function = in_direction(variant(name, settings), settings["direction"])
        try:
            results[name] = timing.compile_function(function, like, like, like, like)[1]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            results[name] = {"error": timing.OUT_OF_MEMORY}
    return results


def _shape(settings: Mapping[str, Any]) -> tuple[int, int, int, int]:
    return (settings["batch"], settings["length"], settings["heads"], settings["head_dim"])
