"""Measurements of attention that several papers share: time and memory against length.

Dimensions: B batch, T time, H heads, D head dim.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tilescan.benchmarks.attention_flops import attention_flops
from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import log_slope
from tilescan.experiments.measurements import timing
from tilescan.ops import masks
from tilescan.ops.attention import attention

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
DIRECTIONS = {FORWARD: "forward", FORWARD_BACKWARD: "forward + backward"}  # with their titles
STANDARD, TILED = "standard", "tiled"
SPARSE = "block_sparse"
VARIANTS = (STANDARD, TILED, "windowed", SPARSE)
OVER_STANDARD, OVER_SPARSE = (STANDARD, TILED), (TILED, SPARSE)  # (slow, fast)
MASKS = ("full", "causal")  # of `runtime_by_mask`
BACKWARD = "backward"  # the difference of the two directions


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
    if name == SPARSE:
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


def _shape(settings: Mapping[str, Any]) -> tuple[int, int, int, int]:
    return (settings["batch"], settings["length"], settings["heads"], settings["head_dim"])


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


def runtime_by_mask(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Times standard and tiled attention, full and causal, in both directions, interleaved.

    Settings: batch, length, heads, head_dim, dtype, repeats. Returns what `timing.compare` returns,
    by "variant mask direction", e.g. "tiled causal forward".
    """
    functions = {
        f"{name} {mask} {direction}": in_direction(
            variant(name, {**settings, "causal": mask == "causal"}), direction
        )
        for name in OVER_STANDARD
        for mask in MASKS
        for direction in DIRECTIONS
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


def outcome(group: Group, variant: str, metric: str) -> float | str | None:
    """Returns "median_ms" or "temp_bytes", OUT_OF_MEMORY, None where it was not measured."""
    result = group.first.result.get(variant, {})
    return result.get(metric, result.get("error"))


def median_ms(group: Group, variant: str) -> float | str | None:
    """Returns the time of a call in ms, or as `outcome` why there is none."""
    return outcome(group, variant, "median_ms")


def mebibytes(group: Group, variant: str) -> float | str | None:
    """Returns the temporaries of a call in MiB, or as `outcome` why there are none."""
    size = outcome(group, variant, "temp_bytes")
    return size / 2**20 if isinstance(size, int) else size


def growth(found: Records, variant: str) -> float | None:
    """Returns the power of the length in the memory of one direction, from length 1024 on."""
    groups = by(found, "length")
    groups = [g for g in groups if g.key >= 1024] or groups
    points = [(g.key, outcome(g, variant, "temp_bytes")) for g in groups]
    points = [(n, size) for n, size in points if size and isinstance(size, int)]
    return log_slope([n for n, _ in points], [size for _, size in points])


def milliseconds(record: Record, variant: str, mask: str, direction: str) -> float | None:
    """Returns a median of `runtime_by_mask`; of BACKWARD the difference of the two others."""
    one = lambda direction: record.result[f"{variant} {mask} {direction}"].get("median_ms")
    if direction != BACKWARD:
        return one(direction)
    both, forward = one(FORWARD_BACKWARD), one(FORWARD)
    return None if both is None or forward is None or both <= forward else both - forward


def flops(settings: Mapping[str, Any], direction: str, causal: bool) -> float:
    """Returns FLOPs as FlashAttention-2 counts them; see `attention_flops`."""
    batch, length, heads, head_dim = _shape(settings)
    name = {FORWARD: "fwd", BACKWARD: "bwd", FORWARD_BACKWARD: "fwd+bwd"}[direction]
    return attention_flops(batch, length, length, heads, head_dim, causal=causal, direction=name)


def rate(record: Record, variant: str, mask: str, direction: str) -> float | None:
    """Returns the achieved GFLOP/s of `runtime_by_mask` by this count."""
    ms = milliseconds(record, variant, mask, direction)
    return None if ms is None else flops(record.settings, direction, mask == "causal") / ms / 1e6


def longest(found: Records) -> list[Record]:
    """Returns the records of the greatest length, by head dim."""
    length = max(found.values("length"), default=None)
    return [g.first for g in by(found.select(length=length), "head_dim")]
