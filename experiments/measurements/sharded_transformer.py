"""A Transformer's training step over devices: the compiled program, its traffic and its memory.

What one device does, and the strategies, are in `sharded_layers`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tilescan.experiments.measurements.compiled import compiled, largest_within, memory
from tilescan.experiments.measurements.devices import AXIS, mesh_of, struct
from tilescan.experiments.measurements.sharded_layers import (
    STRATEGIES,
    TENSOR,
    TIME,
    Shape,
    apply_layers,
    embed,
    mean_loss,
    weights,
)
from tilescan.experiments.measurements.traffic import sent


def program(
    strategy: str, s: Shape, devices: int, what: str = "step", run: Callable | None = None
) -> tuple[Callable, tuple]:
    """Returns (function, its arguments' shapes) for so many devices, to be compiled.

    Args:
      strategy: of STRATEGIES.
      s: the shape; without a vocabulary for "forward" and "inputs".
      devices: their number.
      what: "forward" the layers' output; "inputs" that and the gradient of their input; "step"
        the loss and the gradients of all weights, and of the input if there is no vocabulary.
      run: a function (strategy, s, params, data) of one device in place of that, with its results.

    Raises:
      ValueError: an unknown strategy; heads, or time, that the devices do not divide.
    """
    check(strategy, s, devices)
    mesh = mesh_of(devices)
    time = P() if strategy == "tensor" else P(None, AXIS)
    names = weights(strategy, s)
    spec = {k: P() if axis is None else P(*[None] * axis, AXIS) for k, (_, axis) in names.items()}
    params = {name: struct(mesh, shape, *spec[name]) for name, (shape, _) in names.items()}
    if s.vocab:
        tokens = struct(mesh, (s.batch, s.length), *time, dtype="int32")
        data = {"tokens": tokens, "targets": tokens}
    else:
        data = {"x": struct(mesh, (s.batch, s.length, s.width), *time)}
    run = run or {"forward": _forward, "inputs": _inputs, "step": _step}[what]
    results = {
        "forward": time,
        "inputs": (time, time),
        "step": (P(), spec, None if s.vocab else time),
    }
    call = jax.shard_map(
        functools.partial(run, strategy, s),
        mesh=mesh,
        in_specs=(spec, dict.fromkeys(data, time)),
        out_specs=results[what],
        check_vma=False,
    )
    return call, (params, data)


def compile_program(strategy: str, s: Shape, devices: int, what: str = "step") -> Any:
    """Returns a `program`, compiled and not to be run."""
    function, arguments = program(strategy, s, devices, what)
    return compiled(function, *arguments)


def check(strategy: str, s: Shape, devices: int) -> None:
    """Raises ValueError unless so many devices can share the shape by this strategy."""
    if strategy not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise ValueError(f"strategy={strategy!r} is unknown; it must be one of {known}")
    if not divides_heads(strategy, s.heads, devices) and "attention" in s.blocks:
        raise ValueError(
            f"{strategy} gives devices whole heads: {devices} must divide heads={s.heads}"
        )
    if strategy != "tensor" and s.length % devices:
        raise ValueError(f"length={s.length} must be a multiple of the {devices} devices")


def divides_heads(strategy: str, heads: int, devices: int) -> bool:
    """Returns whether devices get as many heads each, where a strategy gives them whole heads."""
    return strategy not in (*TENSOR, "ulysses") or heads % devices == 0


def traffic(strategy: str, s: Shape, devices: int) -> dict[str, dict]:
    """Returns {"forward": counts, "both": counts}, by `traffic.sent`, of the layers.

    Of both passes, gradients of weights are left out: their sum does not depend on the length.
    """
    programs = {"forward": "forward", "both": "inputs"}
    return {
        passes: sent(compile_program(strategy, s, devices, what))
        for passes, what in programs.items()
    }


def weight_bytes(strategy: str, s: Shape, devices: int) -> int:
    """Returns the bytes of one device's float32 weights."""
    return sum(
        4 * math.prod(shape) // (1 if axis is None else devices)
        for shape, axis in weights(strategy, s).values()
    )


def step_memory(strategy: str, s: Shape, devices: int) -> dict[str, int]:
    """Returns a device's bytes in a training step: `compiled.memory`, and Adam's "moments".

    The moments, twice the weights, are added to what the compiler plans, in "total" too.
    """
    found = memory(compile_program(strategy, s, devices))
    found["moments"] = 2 * weight_bytes(strategy, s, devices)
    found["total"] += found["moments"]
    return found


def shape_of(settings: Mapping[str, Any], **options: Any) -> Shape:
    """Returns the shape that a cell's settings name.

    Args:
      settings: "length", "width", "heads"; "batch" and "layers" (1 without), "vocab_size" (none),
        Linformer's "rows".
      **options: other fields of `Shape`.
    """
    s = settings
    options["rows"] = s.get("rows", Shape.rows)
    sizes = s.get("batch", 1), s["length"], s.get("layers", 1), s["width"], s["heads"]
    return Shape(*sizes, vocab=s.get("vocab_size", 0), **options)


def largest_step(
    settings: Mapping[str, Any], vary: str, start: int, step: int, **options: Any
) -> dict[str, Any]:
    """Returns the largest size whose training step fits in the memory of the devices.

    Args:
      settings: of `shape_of` but for what varies; "way" (the strategy), "devices", "gib" of each,
        and the "tolerance" of the size.
      vary: "batch" or "length".
      start, step: of `compiled.largest_within`.
      **options: of `shape_of`.

    Returns:
      {"value": the size, "bytes": its `step_memory`, "compiled": how many programs}.
    """
    s, tried = settings, {}

    def need(n: int) -> int:
        tried[n] = step_memory(s["way"], shape_of({**s, vary: n}, **options), s["devices"])
        return tried[n]["total"]

    n, _ = largest_within(need, s["gib"] * 2**30, start, step, s["tolerance"])
    return {"value": n, "bytes": tried.get(n, {}), "compiled": len(tried)}


def kept_bytes(strategy: str, s: Shape, devices: int) -> int:
    """Returns the bytes, but for weights, that one device keeps for the backward pass."""
    kept = []

    def run(strategy, s, params, data):
        y, pull = jax.vjp(lambda p, x: apply_layers(strategy, s, p, x), params, data["x"])
        kept.extend(x for x in jax.tree.leaves(pull) if hasattr(x, "shape"))
        return y

    function, arguments = program(strategy, s, devices, "forward", run)
    jax.eval_shape(function, *arguments)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in kept)
    return size - weight_bytes(strategy, s, devices)


def _forward(strategy, s, params, data):
    return apply_layers(strategy, s, params, data["x"])


def _inputs(strategy, s, params, data):
    y, pull = jax.vjp(lambda x: apply_layers(strategy, s, params, x), data["x"])
    return y, pull(jnp.ones_like(y))[0]


def _step(strategy, s, params, data):
    """Returns (loss, gradients of the weights, gradient of x or None)."""

    def loss(params, x):
        if not s.vocab:
            return jnp.sum(apply_layers(strategy, s, params, x))
        table = params["embedding"]
        x = embed(strategy, s, table, data["tokens"])
        return mean_loss(strategy, s, table, apply_layers(strategy, s, params, x), data["targets"])

    value, (grads, dx) = jax.value_and_grad(loss, (0, 1))(params, data.get("x", 0.0))
    if strategy != "tensor":
        # Of whole weights a device has the gradient of its own tokens.
        axes = {name: axis for name, (_, axis) in weights(strategy, s).items()}
        grads = {k: g if axes[k] is not None else jax.lax.psum(g, AXIS) for k, g in grads.items()}
    if strategy in TIME or not (s.vocab or strategy == "tensor"):
        value = jax.lax.psum(value, AXIS)
    return value, grads, None if s.vocab else dx
