"""Attention stages of a streamed language model: a block of attention, and those after it.

The keys and values of all chunks are projected once; a chunk of queries then reads those that its
mask lets it see. Where devices share the sequence a stage is one `jax.shard_map`. All in it is
local but for two things: keys, values and their gradients travel chunk by chunk, as
`config.attention_sequence_parallel` says, and the gradients of parameters are summed over the
devices, once, after the last chunk.

Dimensions: B batch, T time of a device, E embedding, G key-value heads, D head dim.
"""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from tilescan.models import positions as positions_lib
from tilescan.models.attention import sees_only_past
from tilescan.models.blocks import Block, make_mixer, make_norm
from tilescan.models.layers import RMSNorm, linear
from tilescan.models.stream_chunks import (
    TIME,
    WHOLE,
    Plan,
    Stage,
    Tokens,
    add,
    in_turn,
    like,
    put,
    take,
)
from tilescan.ops import masks
from tilescan.ops.attention import attention
from tilescan.ops.mask_placed import Range, visible
from tilescan.ops.mesh_axes import TIME_AXIS
from tilescan.ops.partitioned import partitioned
from tilescan.ops.sequence_parallel import ATTENTION, layouts


def attention_forward(
    plan: Plan, stage: Stage, params: Any, x: Float[Array, "B T E"], tokens: Tokens
) -> tuple[Float[Array, "B T E"], tuple[()]]:
    """Computes a stage's output, and no states.

    Args:
      plan: how the sequence is divided.
      stage: an attention block and those after it.
      params: of all blocks of a repeat, by their names.
      x: the stage's input.
      tokens: positions and segment ids.
    """

    def run(own, x, tokens):
        k, v = _keys_values(plan.config, stage.mixer, own[stage.blocks[0][0]], x, tokens[0])

        def step(span, x, _):
            # A chunk reads no other chunk of x, so the output may take its place.
            y = _attend(plan, stage, span, tokens, own, take(x, span), k, v)
            return put(x, span, y), None

        return in_turn(step, plan.spans(x.shape[1]), x)[0]

    specs = WHOLE, TIME, TIME
    return plan.on_each_device(run, specs, TIME)(stage.of(params), x, tokens), ()


def attention_backward(
    plan: Plan,
    stage: Stage,
    params: Any,
    x: Float[Array, "B T E"],
    states: tuple[()],
    tokens: Tokens,
    g: Float[Array, "B T E"],
) -> tuple[Float[Array, "B T E"], dict[str, Any]]:
    """Computes the cotangent of x and the gradients of the stage's parameters.

    Args:
      plan, stage, params, x, tokens: as of `attention_forward`.
      states: none.
      g: the output's cotangent.
    """
    del states
    specs = WHOLE, TIME, TIME, TIME
    run = functools.partial(_backward, plan, stage)
    run = plan.on_each_device(run, specs, (TIME, WHOLE))
    return run(stage.of(params), x, tokens, g)


def _backward(plan, stage, own, x, tokens, g):
    name, kind = stage.blocks[0]
    project = functools.partial(_keys_values, plan.config, kind)
    k, v = project(own[name], x, tokens[0])

    def step(span, carry, _):
        dx, total = carry
        chunk = functools.partial(_attend, plan, stage, span, tokens)
        _, pull = jax.vjp(chunk, own, take(x, span), k, v)
        found, dx_i, dk, dv = pull(take(dx, span))
        return (put(dx, span, dx_i), add(total, (found, dk, dv))), None

    # Sums begin with the last chunk's. What it was given, g, makes room for dx.
    *spans, last = plan.spans(x.shape[1])
    first = step(last, (g, None), None)[0]
    dx, (total, dk, dv) = in_turn(step, spans, first, reverse=True)[0]
    dk, dv = like((dk, dv), (k, v))

    def through_projections(span, carry, _):
        dx, total = carry
        chunk = lambda p, x: project(p, x, take(tokens[0], span))
        _, pull = jax.vjp(chunk, own[name], take(x, span))
        found, dx_i = pull((take(dk, span), take(dv, span)))
        return (put(dx, span, take(dx, span) + dx_i), add(total, found)), None

    # Only now are the gradients of all keys and values complete.
    carry = (dx, total[name])
    dx, of_mixer = in_turn(through_projections, plan.spans(x.shape[1]), carry, alike=True)[0]
    total = total | {name: of_mixer}
    if plan.devices > 1:
        total = jax.lax.psum(total, TIME_AXIS)
    return dx, like(total, own)


def _keys_values(config, kind, params, x, positions):
    """Keys and values [B, T, G, D] of a block's input, as `models.attention` makes them."""
    mixer, params, h = _normed(config, kind, params, x)
    k = _project(mixer, "key", mixer.n_kv_heads, params, h)
    return _placed(mixer, "key_norm", params, k, positions), _project(
        mixer, "value", mixer.n_kv_heads, params, h
    )


def _attend(plan, stage, span, tokens, own, x, k, v):
    """A chunk of the stage's output, from that chunk of its input and all keys and values."""
    config = plan.config
    (name, kind), *rest = stage.blocks
    positions, ids = (None if a is None else take(a, span) for a in tokens)
    mixer, params, h = _normed(config, kind, own[name], x)
    q = _project(mixer, "query", mixer.n_heads, params, h)
    q = _placed(mixer, "query_norm", params, q, positions)
    mix = _attend_whole if plan.devices == 1 else _attend_shared
    o = mix(plan, mixer, span, q, k, v, (ids, tokens[1]))
    out = linear(
        x.shape[-1],
        ("heads", "head_dim", "embed"),
        inputs=2,
        use_bias=mixer.use_bias,
        dtype=mixer.dtype,
        param_dtype=mixer.param_dtype,
    )
    y = out.apply({"params": params["out"]}, o)
    if config.post_norm:
        y = make_norm(config, None).apply({"params": own[name]["post_norm"]}, y)
    x = x + y
    for name, kind in rest:
        x, _ = Block(config, kind).apply({"params": own[name]}, x)
    return x


def _attend_whole(plan, mixer, span, q, k, v, ids):
    """Attention of a chunk's queries where all keys are at hand."""
    del plan
    seen = _seen(mixer.sees, span, k.shape[1])
    k, v = take(k, seen), take(v, seen)
    mask, offset = mixer.sees, span[0] - seen[0]
    if ids[0] is not None:
        mask = mask & masks.Segments(ids[0], take(ids[1], seen))
    return partitioned(
        attention, q, k, v, mask=mask, bias=_bias(mixer, q.shape[1], k.shape[1], offset),
        q_offset=offset, **_options(mixer),
    )  # fmt: skip


def _attend_shared(plan, mixer, span, q, k, v, ids):
    """The same of a device's shard of a chunk, and of all keys, with the devices' help.

    Devices exchange the keys of those chunks that any of the chunk's queries may see.
    """
    # The chunks of keys that the chunk of queries needs, of this device and by their positions.
    P, T = plan.devices, q.shape[1]
    seen = _seen_chunks(plan, mixer.sees, span, k.shape[1])
    queries, keys = plan.runs([span]), plan.runs(seen)
    seen = seen[0][0], sum(n for _, n in seen)
    k, v = take(k, seen), take(v, seen)
    mask = mixer.sees
    if ids[0] is not None:
        mask = mask & masks.Segments(ids[0], take(ids[1], seen))
    offset = P * (span[0] - seen[0]) + T * jax.lax.axis_index(TIME_AXIS)
    bias = _bias(mixer, T, P * k.shape[1], offset)
    if bias is not None:
        bias = bias[..., layouts.order(P * k.shape[1], P, keys) - layouts.first(keys)]
    strategy = functools.partial(
        ATTENTION[mixer.sequence_parallel],
        axis_name=TIME_AXIS,
        balance=(queries, keys),
    )
    # Time is sharded already: rows and heads are left to shard, and offsets are in the order.
    op = lambda *arrays, q_offset, **options: strategy(*arrays, **options)
    return partitioned(op, q, k, v, mask=mask, bias=bias, **_options(mixer))


def _options(mixer):
    return dict(scale=mixer.scale, logit_cap=mixer.logit_cap, implementation=mixer.implementation)


def _bias(mixer, T, S, offset):
    if mixer.position != "alibi":
        return None
    return positions_lib.alibi_bias(mixer.n_heads, T, S, offset, causal=sees_only_past(mixer.sees))


def _normed(config, kind, params, x):
    """(the mixer, for its attributes; its parameters; its input)"""
    h = make_norm(config, None).apply({"params": params["norm"]}, x)
    return make_mixer(config, kind), params["mixer"], h


def _project(mixer, name, heads, params, h):
    made = linear(
        (heads, mixer.head_dim),
        ("embed", "heads", "head_dim"),
        use_bias=mixer.use_bias,
        dtype=mixer.dtype,
        param_dtype=mixer.param_dtype,
    )
    return made.apply({"params": params[name]}, h)


def _placed(mixer, norm, params, x, positions):
    """Queries or keys, normed and turned."""
    if mixer.qk_norm:
        made = RMSNorm(eps=mixer.norm_eps, dtype=mixer.dtype, param_dtype=mixer.param_dtype)
        x = made.apply({"params": params[norm]}, x)
    if mixer.position.startswith("rope"):
        x = positions_lib.apply_rope(
            x,
            positions,
            theta=mixer.rope_theta,
            interleaved=mixer.position == "rope_interleaved",
            scaling=mixer.rope_scaling,
        )
    return x


def _seen(mask, span, T) -> tuple[int, int]:
    """The keys that a chunk of queries needs, as (start, length); all if it saves little.

    A slice is a copy, and the op looks at no tile that its mask empties. Masks that count from the
    first key on need the keys from there.
    """
    start, length = span
    first, end = 0, T
    band = mask.band()
    if band is not None:
        lowest, highest = (int(n) for n in band.key_bounds(start, start + length - 1, T))
        if band.prefix == 0 and band.limit is None:
            first = min(lowest, T - 1)
        end = max(highest, first) + 1  # at least one key, which the mask may hide
    elif isinstance(mask, masks.Lambda):
        end = start + length
    return (first, end - first) if end - first <= T // 2 else (0, T)


def _seen_chunks(plan, mask, span, T) -> list[tuple[int, int]]:
    """The chunks, from the first to the last, with keys that a chunk of queries may see."""
    spans = plan.spans(T)
    runs = [plan.runs([s]).bounds for s in (span, *spans)]
    queries, *keys = (Range(start, 1, end - start) for start, end in runs)
    found = np.flatnonzero(visible(mask, [queries], keys)[0])
    return spans[found[0] : found[-1] + 1] if len(found) else [span]
