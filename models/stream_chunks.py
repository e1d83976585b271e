"""Chunks of a sequence, one after the other: what streaming of layers is made of.

On one device chunk i is a slice of time. Where the mesh in use shards time over P devices, all of
them work on every chunk: device p holds the p-th of P equal shards of each chunk, one after the
other (`layouts.Runs`). Spans then count a device's own tokens.

Dimensions: B batch, T time, P devices that share a sequence.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from tilescan.models.blocks import block_name
from tilescan.models.config import LanguageModelConfig
from tilescan.models.mixers import base_name
from tilescan.ops.mesh_axes import TIME_AXIS
from tilescan.ops.sequence_parallel.layouts import Runs

Span = tuple[Any, int]  # where a chunk begins in a device's tokens, and how many it has there
# Positions and segment ids of tokens.
Tokens = tuple[Integer[Array, "B T"], Integer[Array, "B T"] | None]

# The name of a choice among programs, of which a loop takes each once: for those who count.
IN_TURN = "chunks_in_turn"

TIME = PartitionSpec(None, TIME_AXIS)
WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Stage:
    """A block that mixes over time and those after it that do not: (name, kind) of each."""

    blocks: tuple[tuple[str, str], ...]

    @property
    def mixer(self) -> str:
        """The block that mixes over time, as `config.pattern` has it."""
        return self.blocks[0][1]

    def of(self, params: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the stage's blocks, of those of all blocks."""
        return {name: params[name] for name, _ in self.blocks}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the program is traced.

    devices: that share a sequence, 1 on one device and where time is whole.
    """

    config: LanguageModelConfig
    chunks: int
    devices: int = 1

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The blocks of the pattern, each that mixes over time with the MLPs after it."""
        stages: list[list] = []
        for i, kind in enumerate(self.config.pattern):
            if base_name(kind) != "mlp" or not stages:
                stages.append([])
            stages[-1].append((block_name(i, kind), kind))
        return tuple(Stage(tuple(blocks)) for blocks in stages)

    def spans(self, T: int) -> list[Span]:
        """Returns the chunks of a device's T tokens; the last may be shorter."""
        C = -(-T // self.chunks)
        return [(start, min(C, T - start)) for start in range(0, T, C)]

    def runs(self, spans: list[Span]) -> Runs:
        """Returns the positions of neighboring chunks, over all devices."""
        bounds = [start for start, _ in spans] + [sum(spans[-1])]
        return Runs(tuple(self.devices * n for n in bounds))

    def take(self, x: Float[Array, "B T ..."] | Integer[Array, "B T"], span: Span) -> Array:
        """Returns a chunk of x [B, T, ...], of all devices."""
        if self.devices == 1:
            return take(x, span)
        shards = jax.lax.dynamic_slice_in_dim(self._by_device(x), *span, axis=2)
        return self._as_time(shards)

    def put(
        self, x: Float[Array, "B T ..."], span: Span, chunk: Float[Array, "B C ..."]
    ) -> Float[Array, "B T ..."]:
        """Returns x with a chunk in its place."""
        if self.devices == 1:
            return put(x, span, chunk)
        chunk = self._by_device(chunk).astype(x.dtype)
        shards = jax.lax.dynamic_update_slice_in_dim(self._by_device(x), chunk, span[0], axis=2)
        return self._as_time(shards)

    def _by_device(self, x: Array) -> Array:
        """[B, T, ...] as [B, P, T / P, ...]."""
        return x.reshape(x.shape[0], self.devices, -1, *x.shape[2:])

    def _as_time(self, shards: Array) -> Array:
        """The inverse of `_by_device`, sharded over time."""
        x = shards.reshape(shards.shape[0], -1, *shards.shape[3:])
        free = PartitionSpec.UNCONSTRAINED
        spec = PartitionSpec(free, TIME_AXIS, *(free,) * (x.ndim - 2))
        return jax.lax.with_sharding_constraint(x, spec)

    def on_each_device(self, fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Returns fn of a device's own tokens, by `jax.shard_map` over the time axis alone."""
        if self.devices == 1:
            return fn
        return jax.shard_map(
            fn, in_specs=in_specs, out_specs=out_specs, axis_names={TIME_AXIS}, check_vma=False
        )


def in_turn(
    step: Callable,
    spans: list[Span],
    carry: Any,
    xs: Any = None,
    *,
    alike: bool = False,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """Scans `carry, y = step(span, carry, x)` over spans.

    It is a loop, which chooses among the spans' programs, because what is merely written in a row
    a compiler may compute at once, and may fuse sums into one that needs all of their terms. With
    `alike`, spans of one length need one program.
    """
    if not spans:
        return carry, None
    lengths = {length for _, length in spans}
    if alike and len(lengths) == 1:
        (length,) = lengths
        body = lambda carry, at: step((at[0], length), carry, at[1])
        index = jnp.asarray([start for start, _ in spans])
    else:
        branches = [functools.partial(step, span) for span in spans]

        def body(carry, at):
            with jax.named_scope(IN_TURN):
                return jax.lax.switch(at[0], branches, carry, at[1])

        index = jnp.arange(len(spans))
    return jax.lax.scan(body, carry, (index, xs), reverse=reverse)


def zeros(tree: Any) -> Any:
    """Returns zeros to add up in: at least float32."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, _wide(a)), tree)


def add(total: Any, tree: Any) -> Any:
    """Returns total + tree in at least float32; total may be None."""
    tree = jax.tree.map(lambda a: a.astype(_wide(a)), tree)
    return tree if total is None else jax.tree.map(jnp.add, total, tree)


def like(tree: Any, other: Any) -> Any:
    """Returns a tree's arrays in the dtypes of another one's."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, other)


def take(x: Float[Array, "B T ..."] | Integer[Array, "B T"], span: Span) -> Array:
    """Returns x[:, start : start + length]."""
    start, length = span
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + length, axis=1)
    return jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)


def put(
    x: Float[Array, "B T ..."], span: Span, chunk: Float[Array, "B C ..."]
) -> Float[Array, "B T ..."]:
    """Returns x with another x[:, start : start + length]."""
    return jax.lax.dynamic_update_slice_in_dim(x, chunk.astype(x.dtype), span[0], axis=1)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)
