"""A language model's layers, differentiated exactly in the memory of a chunk of the sequence.

Only the inputs of layers are kept. The backward pass of a layer goes through its output by chunks
of the sequence: it computes a chunk again, pulls the chunk's cotangent back, adds up, and forgets
(StreamBP, arXiv 2506.03077, section 3.2). In attention a chunk reads the keys and values that its
mask lets it see; they are projected once, for the whole sequence. In a recurrent mixer it starts
from the state before it, which the forward pass kept.

Devices that share a sequence (the mesh axis TIME_AXIS) do all of this together, chunk by chunk:
each holds an equal shard of every chunk (`stream_order`), which gives all of them nearly the same
work under a causal mask. What they send, besides what `config.attention_sequence_parallel` and
`config.scan_sequence_parallel` send for a whole sequence:

  - of attention with D chunks, causal: keys, values and their gradients (D + 1) / 2 times, as chunk
    i reads those of chunks 0..i; D times if all see all;
  - of recurrences: D times the states, one scan over the devices for each chunk;
  - the gradients of parameters once a layer; in blocks with a recurrent mixer, D times unless the
    compiler takes the sum out of the loop over chunks, as libtpu does.

Dimensions: B batch, T time, E embedding, G key-value heads, D head dim, R repeats of the pattern.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from tilescan.models.blocks import Block, make_mixer, make_norm
from tilescan.models.config import LanguageModelConfig
from tilescan.models.language_model import Backbone, LanguageModel
from tilescan.models.mixers import attends
from tilescan.models.positions import token_positions
from tilescan.models.stream_attention import attention_backward, attention_forward
from tilescan.models.stream_chunks import TIME, Plan, add, in_turn, like, zeros
from tilescan.ops.mesh_axes import TIME_AXIS, sequence_devices
from tilescan.ops.reverse_mode import written_vjp
from tilescan.ops.sequence_parallel import layouts


def stream_hidden(
    model: LanguageModel,
    params: Any,
    tokens: Integer[Array, "B T"] | Float[Array, "B T F"],
    *,
    chunks: int,
    positions: Integer[Array, "B T"] | None = None,
    segment_ids: Integer[Array, "B T"] | None = None,
    in_order: bool = False,
) -> Float[Array, "B T E"]:
    """Computes `model.hidden`; its backward pass holds activations of T / chunks tokens at a time.

    Values and gradients are those of the model but for rounding: sums over tokens are taken in
    another order, and gradients of parameters are added up in float32. `config.remat` does not
    matter. Where `scan_layers` is False the layers' parameters are copied into one stack.

    Args:
      model: with any blocks of `models.blocks` that read forwards.
      params: the model's parameters, unboxed.
      tokens, positions, segment_ids: as the model takes them.
      chunks: of the sequence; 1 is checkpointing of each layer. More of them need less memory
        until keys, values and the inputs of layers are all that is left, fill devices less, and
        take longer to compile: of attention each is a program of its own.
      in_order: where devices share the sequence, whether the tokens, and what belongs to them,
        stand in `stream_order` already (`in_stream_order`); the result then does as well. Otherwise
        they are in the order of `config.sequence_balance`, and so is the result, which every device
        gathers for that: right for tests, not for long sequences.

    Returns:
      The vectors that `model.logits` takes.

    Raises:
      ValueError: chunks below 1, a block that reads backwards, a sequence or a strategy of
        sharding it that can't be streamed, or what the model itself refuses.
    """
    check_streamed(model.config, chunks, sequence_devices())
    config, T = model.config, tokens.shape[1]
    order = stream_order(config, T, chunks)
    if order is not None and not in_order:
        given = {"tokens": tokens, "positions": positions, "segment_ids": segment_ids}
        given = in_stream_order(config, given, chunks)
        x = stream_hidden(model, params, **given, chunks=chunks, in_order=True)
        return _reordered(x, np.argsort(order))
    if order is not None and positions is None:
        raise ValueError("in_order=True needs positions, in the order of the tokens")
    backbone = params["backbone"]
    _, kept = _Inputs(config).apply(
        {"params": backbone},
        tokens,
        positions=positions,
        segment_ids=segment_ids,
        mutable="kept",
    )
    ((x, positions),) = kept["kept"]["inputs"]
    if config.scan_layers:
        layers = dict(backbone["layers"])
    else:
        layers = [dict(backbone[f"layers_{i}"]) for i in range(config.repeats)]
        layers = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    plan = Plan(config, chunks, sequence_devices())
    x = _layers(plan, layers, x, (positions, segment_ids))
    return make_norm(config, None).apply({"params": backbone["final_norm"]}, x)


def check_streamed(config: LanguageModelConfig, chunks: int, devices: int = 1) -> None:
    """Raises ValueError unless such a model can be streamed, by devices that share a sequence."""
    if chunks < 1:
        raise ValueError(f"chunks={chunks} must be at least 1")
    for kind in config.pattern:
        if getattr(make_mixer(config, kind), "bidirectional", False):
            raise ValueError(
                f"{kind!r} in pattern is bidirectional: its state at a token depends on "
                "later chunks; set bidirectional=False, or train it with remat='full'"
            )
    kind = config.attention_sequence_parallel
    if devices > 1 and kind == "ring_self_attention" and any(map(attends, config.pattern)):
        raise ValueError(
            f"attention_sequence_parallel={kind!r} holds rows of scores as long as the "
            "sequence, which can't be streamed; use 'ring', 'all_gather', 'ulysses' or 'usp'"
        )


def stream_order(config: LanguageModelConfig, T: int, chunks: int) -> np.ndarray | None:
    """Returns int [T]: which token of `config.sequence_balance`'s order is where in streaming's.

    In that order each device holds an equal shard of every chunk. None where the mesh in use does
    not shard time.

    Raises:
      ValueError: T that the devices can't share equally.
    """
    P = sequence_devices()
    if P == 1:
        return None
    layouts.check(T, P, config.sequence_balance)
    plan = Plan(config, chunks, P)
    positions = layouts.order(T, P, plan.runs(plan.spans(T // P)))
    return layouts.restore(T, P, config.sequence_balance)[positions]


def in_stream_order(
    config: LanguageModelConfig, batch: dict[str, Any], chunks: int
) -> dict[str, Any]:
    """Returns a batch whose arrays [B, T, ...] stand in `stream_order`, with their positions.

    Every device gathers these arrays, of integers as a rule, and takes its own shard.
    """
    B, T = batch["tokens"].shape[:2]
    order = stream_order(config, T, chunks)
    if order is None:
        return batch
    if batch.get("positions") is None:
        if config.sequence_balance != "contiguous":
            raise ValueError(
                f"sequence_balance={config.sequence_balance!r} needs positions, in the order of "
                "the tokens: see ops.sequence_parallel.layouts.order"
            )
        batch = batch | {"positions": token_positions(B, T, batch.get("segment_ids"))}
    move = lambda x: x if x is None or x.ndim < 2 else _reordered(x, order)
    return {name: move(x) for name, x in batch.items()}


def _reordered(x, order):
    """x[:, order] of an array [B, T, ...] that is sharded over time, as is the result."""
    rows = order.reshape(sequence_devices(), -1)

    def shard(x):
        x = jax.lax.all_gather(x, TIME_AXIS, axis=1, tiled=True)
        return jnp.take(x, jnp.asarray(rows)[jax.lax.axis_index(TIME_AXIS)], axis=1)

    return jax.shard_map(
        shard, in_specs=TIME, out_specs=TIME, axis_names={TIME_AXIS}, check_vma=False
    )(x)


class _Inputs(Backbone):
    """The backbone without layers: keeps what they would read."""

    def _run_layers(self, x, state, positions, segment_ids):
        self.sow("kept", "inputs", (x, positions))
        return x, None


@functools.partial(written_vjp, nondiff_argnums=(0,))
def _layers(plan, layers, x, tokens):
    """All layers: stacked parameters, x [B, T, E], (positions, segment_ids)."""
    return _layers_fwd(plan, layers, x, tokens)[0]


def _layers_fwd(plan, layers, x, tokens):
    def repeat(x, params):
        kept = []
        for stage in plan.stages:
            forward = attention_forward if attends(stage.mixer) else _recurrent_forward
            before = x
            x, states = forward(plan, stage, params, x, tokens)
            kept.append((before, states))
        return x, kept

    x, kept = jax.lax.scan(repeat, x, layers)
    return x, (layers, kept, tokens)


def _layers_bwd(plan, residuals, g):
    layers, kept, tokens = residuals

    def repeat(g, inputs):
        params, kept = inputs
        gradients = {}
        for stage, (x, states) in reversed(list(zip(plan.stages, kept, strict=True))):
            backward = attention_backward if attends(stage.mixer) else _recurrent_backward
            g, found = backward(plan, stage, params, x, states, tokens, g)
            gradients |= found
        return g, {name: gradients[name] for name in params}

    g, gradients = jax.lax.scan(repeat, g, (layers, kept), reverse=True)
    return gradients, g, None


_layers.defvjp(_layers_fwd, _layers_bwd)


# Recurrent mixers, and blocks that do not mix over time.


def _recurrent_chunk(plan, stage, span, tokens, own, x, state):
    positions, ids = (None if a is None else plan.take(a, span) for a in tokens)
    for i, (name, kind) in enumerate(stage.blocks):
        block = functools.partial(Block(plan.config, kind).apply, {"params": own[name]})
        x, after = block(x, state=None if i else state, positions=positions, segment_ids=ids)
        state = state if i else after
    return x, state


def _recurrent_forward(plan, stage, params, x, tokens):
    """The output, and the states before each chunk, [chunks, ...]."""
    own = stage.of(params)
    state = make_mixer(plan.config, stage.mixer).init_state(x.shape[0], x.shape[1])

    def step(span, carry, _):
        x, state = carry
        y, after = _recurrent_chunk(plan, stage, span, tokens, own, plan.take(x, span), state)
        return (plan.put(x, span, y), after), state

    spans = plan.spans(x.shape[1] // plan.devices)
    (x, _), states = in_turn(step, spans, (x, state), alike=True)
    return x, states


def _recurrent_backward(plan, stage, params, x, states, tokens, g):
    own, total = stage.of(params), zeros(stage.of(params))

    def step(span, carry, state):
        dx, dstate, total = carry
        real, rebuild = _floating(state)

        def chunk(own, x, real):
            y, after = _recurrent_chunk(plan, stage, span, tokens, own, x, rebuild(real))
            return y, _floating(after)[0]

        _, pull = jax.vjp(chunk, own, plan.take(x, span), real)
        found, dx_i, dstate = pull((plan.take(dx, span), dstate))
        return (plan.put(dx, span, dx_i), dstate, add(total, found)), None

    dstate = [jnp.zeros(a.shape[1:], a.dtype) for a in _floating(states)[0]]
    spans = plan.spans(x.shape[1] // plan.devices)
    carry = in_turn(step, spans, (g, dstate, total), states, alike=True, reverse=True)[0]
    return carry[0], like(carry[2], own)


def _floating(tree):
    """(the leaves that have gradients, how to put them back)"""
    leaves, structure = jax.tree.flatten(tree)
    real = [jnp.issubdtype(a.dtype, jnp.floating) for a in leaves]

    def rebuild(found):
        found = iter(found)
        return structure.unflatten(
            [next(found) if r else a for r, a in zip(real, leaves, strict=True)]
        )

    return [a for r, a in zip(real, leaves, strict=True) if r], rebuild
