"""Reads tokens into a model's state: what generation calls between two samples.

A text of any length is read in chunks of few sizes, so that few programs are compiled, the same
ones for prompts, turns of a conversation and single tokens.

On a CPU the layers are called one by one. A scan over stacked parameters copies each layer's slice
before it multiplies by it, and copies the state. SmolLM2-135M in float32 takes, a token, on two
cores:

    slots of the state       164                2,000
    one by one               39 ms (53 CPU)     51 ms (75 CPU)
    a scan                   44 ms (78 CPU)     132 ms (196 CPU)

Elsewhere the model is one program.

Dimensions: B batch, T time, S slots of the state, E embedding, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.blocks import Repeat, init_state
from tilescan.models.language_model import ModelState
from tilescan.models.positions import token_positions

# Tokens that one program reads; a text is cut into the largest ones that fit.
CHUNKS = (512, 64, 8, 1)
# Slots of a state before its first token, at most; from there on it doubles when it is full.
_MOST_ROOM_AT_FIRST = 2048


class Reading(NamedTuple):
    """A state (of a CPU's layers: a tuple of theirs), its slots, and how many are used up."""

    state: ModelState
    room: int
    used: int


class Reader:
    """A model that reads on from a state.

    Args:
      model, params: the function; `params` as `model.apply({"params": params}, ...)` takes them,
        or their shapes (jax.ShapeDtypeStruct) for `compile_ahead` alone.
    """

    def __init__(self, model: LanguageModel, params: Any):
        self.model, self.params = model, params
        self.layers: list[Any] | None = None
        if _on_one_cpu(params):
            backbone = dict(params["backbone"])
            if model.config.scan_layers:
                stacked = backbone.pop("layers")
                take = lambda i: jax.tree.map(lambda a: _layer_of(a, i), stacked)
            else:
                take = lambda i: backbone.pop(f"layers_{i}")
            self.layers = [take(i) for i in range(model.config.repeats)]
            self.params = {**params, "backbone": backbone}

    def start(self, batch: int, tokens: int) -> Reading:
        """Returns the state before the first token; `tokens` is how many may come, about."""
        room = room_for(min(tokens, _MOST_ROOM_AT_FIRST))
        return Reading(self._fresh(batch, room), room, 0)

    def read(
        self,
        reading: Reading,
        tokens: Integer[Array | np.ndarray, "B T"],
        segment_ids: Integer[Array | np.ndarray, "B T"] | None = None,
    ) -> tuple[Float[Array, "B V"], Reading]:
        """Reads T tokens more.

        Args:
          reading: from `start` or an earlier call. It is used up: its arrays are overwritten.
          tokens: ids in [0, vocab_size); T >= 1.
          segment_ids: as `LanguageModel` takes them, at every call or at none.

        Returns:
          (float32 logits of what follows the last token, the new state).
        """
        needed = reading.used + tokens.shape[1]
        if needed > reading.room:
            reading = self._grown(reading, room_for(max(needed, 2 * reading.room)))
        state, start = reading.state, 0
        if tokens.shape[1] > 1:  # each slice of a JAX array would be a program of its own
            tokens = np.asarray(tokens)
            segment_ids = None if segment_ids is None else np.asarray(segment_ids)
        for size in chunks(tokens.shape[1]):
            part = slice(start, start + size)
            ids = None if segment_ids is None else segment_ids[:, part]
            x, state = self._advance(tokens[:, part], state, ids)
            start += size
        scores = _scores(self.model, self._method, self.params, x if size == 1 else x[:, -1:])
        return scores, Reading(state, reading.room, needed)

    def compile_ahead(self, batch: int, tokens: int, length: int, packed: bool = False) -> None:
        """Compiles what reading `length` tokens, and one more at a time, will call.

        Args:
          batch, tokens: as `start` will be given them.
          length: of the first tokens that will be read.
          packed: whether segment_ids will be given.
        """
        spec = jax.ShapeDtypeStruct
        state = jax.eval_shape(lambda: self.start(batch, tokens).state)
        for size in sorted({*chunks(length), 1}):
            ids = spec((batch, size), jnp.int32)
            segments = ids if packed else None
            if self.layers is None:
                _whole.lower(self.model, self.params, ids, state, segments).compile()
            else:
                before = (self.params, ids, state.position, state.segment, segments)
                _enter.lower(self.model, *before).compile()
                x, positions, *_ = jax.eval_shape(functools.partial(_enter, self.model), *before)
                inner = (self.layers[0], x, state.layers[0], positions, segments)
                _layer.lower(self.model.config, *inner).compile()
        config = self.model.config
        x = spec((batch, 1, config.d_model), config.dtype)
        _scores.lower(self.model, self._method, self.params, x).compile()

    @property
    def _method(self) -> str:
        """What makes scores of vectors: with the last norm, or after it."""
        return "logits" if self.layers is None else "scores"

    def _fresh(self, batch: int, room: int) -> ModelState:
        if self.layers is None:
            state = self.model.init_state(batch, room)
        else:
            one = init_state(self.model.config, batch, room)
            start = jnp.zeros((batch,), jnp.int32), jnp.full((batch,), -1, jnp.int32)
            state = ModelState(tuple(one for _ in self.layers), *start)
        # Arrays that are overwritten must not be the same ones.
        return jax.tree.map(lambda a: jnp.array(a, copy=True), state)

    def _grown(self, reading: Reading, room: int) -> Reading:
        old = reading.state
        new = self._fresh(old.position.shape[0], room)
        put = lambda old, new: jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim)
        return Reading(jax.tree.map(put, old, new), room, reading.used)

    def _advance(self, tokens, state: ModelState, ids) -> tuple[Float[Array, "B T E"], ModelState]:
        """The vectors that `_scores` takes of a chunk's tokens; the new state."""
        tokens = jnp.asarray(tokens, jnp.int32)
        ids = None if ids is None else jnp.asarray(ids, jnp.int32)
        if self.layers is None:
            return _whole(self.model, self.params, tokens, state, ids)
        before = (self.params, tokens, state.position, state.segment, ids)
        x, positions, position, segment = _enter(self.model, *before)
        new = []
        for params, layer in zip(self.layers, state.layers, strict=True):
            x, layer = _layer(self.model.config, params, x, layer, positions, ids)
            new.append(layer)
        return x, ModelState(tuple(new), position, segment)


def chunks(length: int) -> Iterator[int]:
    """Yields the sizes of the chunks that a text of `length` tokens is read in."""
    for size in CHUNKS:
        yield from (size for _ in range(length // size))
        length %= size


def room_for(tokens: int) -> int:
    """Returns a number of slots for tokens: of few sizes, each a program of its own."""
    room = 64
    while room < tokens:
        room += room // 2 if room & (room - 1) == 0 else room // 3  # 64, 96, 128, 192, 256 ...
    return room


def _on_one_cpu(params: Any) -> bool:
    """Whether all parameters are, or will be, on one CPU and none is sharded."""
    if jax.default_backend() != "cpu" or not jax.sharding.get_abstract_mesh().empty:
        return False
    arrays: Sequence[Any] = jax.tree.leaves(params)
    if any(isinstance(a, jax.core.Tracer) for a in arrays):
        return False
    devices = {d for a in arrays if isinstance(a, jax.Array) for d in a.devices()}
    return len(devices) <= 1


def _layer_of(stacked: Any, i: int) -> Any:
    """A layer's slice: on a CPU a view of the stacked array, if its address is a round number."""
    if isinstance(stacked, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype)
    return jax.device_put(np.asarray(stacked)[i])


@functools.partial(jax.jit, static_argnums=0)
def _enter(model: LanguageModel, params, tokens, position, segment, segment_ids):
    """What the first layer takes: vectors and positions; then the state of what comes next."""
    B, T = tokens.shape
    positions = token_positions(B, T, segment_ids, position, segment)
    x = model.apply({"params": params}, tokens, positions, method="embedded")
    last = jnp.zeros((B,), jnp.int32) if segment_ids is None else segment_ids[:, -1]
    return x, positions, positions[:, -1] + 1, last


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _layer(config: LanguageModelConfig, params, x, state, positions, segment_ids):
    """One repetition of the pattern of blocks."""
    return Repeat(config).apply({"params": params}, x, state, positions, segment_ids)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(model: LanguageModel, method: str, params, x) -> Float[Array, "B V"]:
    return model.apply({"params": params}, x, method=method)[:, 0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _whole(model: LanguageModel, params, tokens, state, segment_ids):
    """All layers in one program; like `_advance`."""
    inputs = dict(state=state, segment_ids=segment_ids)
    return model.apply({"params": params}, tokens, **inputs, method="hidden")
