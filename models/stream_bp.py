"""A language model's layers, differentiated exactly in the memory of a part of the sequence.

Only the inputs of layers are kept. The backward pass of a layer goes through its output by chunks
of the sequence: it computes a chunk again, pulls the chunk's cotangent back, adds up, and forgets
(StreamBP, arXiv 2506.03077, section 3.2). In attention a chunk reads the keys and values that its
mask lets it see; they are projected once, for the whole sequence. In a recurrent mixer it starts
from the state before it, which the forward pass kept.

Letters: B batch, T time, E embedding, G key-value heads, D head dim, R repeats of the pattern.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models import positions as positions_lib
from models.attention import sees_only_past
from models.blocks import Block, block_name, make_mixer, make_norm
from models.config import LanguageModelConfig
from models.language_model import Backbone, LanguageModel
from models.layers import RMSNorm, linear
from ops import masks
from ops.attention import attention
from ops.partitioned import partitioned

ATTENTION = ("attention", "local_attention")


def stream_hidden(
    model: LanguageModel,
    params: Any,
    tokens: Int[Array, "B T"] | Float[Array, "B T F"],
    *,
    chunks: int,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T E"]:
    """`model.hidden`, whose backward pass needs the activations of T / chunks tokens at a time.

    Values and gradients are those of the model but for rounding: sums over tokens are taken in
    another order, and gradients of parameters are added up in float32. `config.remat` does not
    matter. Where `scan_layers` is False the layers' parameters are copied into one stack.

    Args:
      model: with any blocks of `models.blocks` that read forwards.
      params: the model's parameters, unboxed.
      tokens, positions, segment_ids: as the model takes them.
      chunks: parts of the sequence; 1 is checkpointing of each layer. More parts need less memory
        until keys, values and the inputs of layers are all that is left, fill devices less, and
        take longer to compile: of attention each is a program of its own.

    Returns:
      The vectors that `model.logits` takes.

    Raises:
      ValueError: chunks below 1, a block that reads backwards, or what the model itself refuses.
    """
    if chunks < 1:
        raise ValueError(f"chunks={chunks} must be at least 1")
    config = model.config
    for stage in _stages(config):
        if getattr(make_mixer(config, stage.mixer), "bidirectional", False):
            raise ValueError(
                f"{stage.mixer!r} in pattern is bidirectional: its state at a token depends on "
                "later chunks; set bidirectional=False, or train it with remat='full'"
            )
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
    plan = _Plan(config, chunks, _stages(config))
    x = _layers(plan, layers, x, (positions, segment_ids))
    return make_norm(config, None).apply({"params": backbone["final_norm"]}, x)


class _Inputs(Backbone):
    """The backbone without layers: keeps what they would read."""

    def _run_layers(self, x, state, positions, segment_ids):
        self.sow("kept", "inputs", (x, positions))
        return x, None


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A block that mixes over time and those behind it that do not: (name, kind) of each."""

    blocks: tuple[tuple[str, str], ...]

    @property
    def mixer(self) -> str:
        return self.blocks[0][1]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known when the program is traced."""

    config: LanguageModelConfig
    chunks: int
    stages: tuple[_Stage, ...]

    def spans(self, T: int) -> list[tuple[int, int]]:
        """Where chunks begin and how long they are; the last may be shorter."""
        C = -(-T // self.chunks)
        return [(start, min(C, T - start)) for start in range(0, T, C)]


def _stages(config: LanguageModelConfig) -> tuple[_Stage, ...]:
    stages: list[list] = []
    for i, kind in enumerate(config.pattern):
        if kind != "mlp" or not stages:
            stages.append([])
        stages[-1].append((block_name(i, kind), kind))
    return tuple(_Stage(tuple(blocks)) for blocks in stages)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layers(plan, layers, x, tokens):
    """All layers: stacked parameters, x [B, T, E], (positions, segment_ids)."""
    return _layers_fwd(plan, layers, x, tokens)[0]


def _layers_fwd(plan, layers, x, tokens):
    def repeat(x, params):
        kept = []
        for stage in plan.stages:
            forward = _attention_forward if stage.mixer in ATTENTION else _recurrent_forward
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
            backward = _attention_backward if stage.mixer in ATTENTION else _recurrent_backward
            g, found = backward(plan, stage, params, x, states, tokens, g)
            gradients |= found
        return g, {name: gradients[name] for name in params}

    g, gradients = jax.lax.scan(repeat, g, (layers, kept), reverse=True)
    return gradients, g, None


_layers.defvjp(_layers_fwd, _layers_bwd)


# Attention.


def _attention_forward(plan, stage, params, x, tokens):
    own = _of_stage(stage, params)
    k, v = _keys_values(plan.config, stage.mixer, own[stage.blocks[0][0]], x, tokens[0])

    def step(span, x, _):
        # A chunk reads no other chunk of x, so the output may take its place.
        y = _attend(plan.config, stage, span, tokens, own, _cut(x, span), k, v)
        return _put(x, span, y), None

    return _in_turn(step, plan.spans(x.shape[1]), x)[0], ()


def _attention_backward(plan, stage, params, x, states, tokens, g):
    del states
    config, own = plan.config, _of_stage(stage, params)
    name, kind = stage.blocks[0]
    project = functools.partial(_keys_values, config, kind)
    k, v = project(own[name], x, tokens[0])

    def step(span, carry, _):
        dx, total = carry
        chunk = functools.partial(_attend, config, stage, span, tokens)
        _, pull = jax.vjp(chunk, own, _cut(x, span), k, v)
        found, dx_i, dk, dv = pull(_cut(dx, span))
        return (_put(dx, span, dx_i), _add(total, (found, dk, dv))), None

    # Sums begin with the last chunk's. What it was given, g, makes room for dx.
    *spans, last = plan.spans(x.shape[1])
    first = step(last, (g, None), None)[0]
    dx, (total, dk, dv) = _in_turn(step, spans, first, reverse=True)[0]
    dk, dv = _like((dk, dv), (k, v))

    def through_projections(span, carry, _):
        dx, total = carry
        chunk = lambda p, x: project(p, x, _cut(tokens[0], span))
        _, pull = jax.vjp(chunk, own[name], _cut(x, span))
        found, dx_i = pull((_cut(dk, span), _cut(dv, span)))
        return (_put(dx, span, _cut(dx, span) + dx_i), _add(total, found)), None

    # Only now are the gradients of all keys and values complete.
    carry = (dx, total[name])
    dx, of_mixer = _in_turn(through_projections, plan.spans(x.shape[1]), carry, alike=True)[0]
    return dx, _like(total | {name: of_mixer}, own)


def _keys_values(config, kind, params, x, positions):
    """Keys and values [B, T, G, D] of a block's input, as `models.attention` makes them."""
    mixer, params, h = _normed(config, kind, params, x)
    k = _project(mixer, "key", mixer.n_kv_heads, params, h)
    return _placed(mixer, "key_norm", params, k, positions), _project(
        mixer, "value", mixer.n_kv_heads, params, h
    )


def _attend(config, stage, span, tokens, own, x, k, v):
    """A chunk of the stage's output, from that chunk of its input and all keys and values."""
    (name, kind), *rest = stage.blocks
    positions, ids = (None if a is None else _cut(a, span) for a in tokens)
    seen = _seen(config, kind, span, k.shape[1])
    k, v = _cut(k, seen), _cut(v, seen)
    mixer, params, h = _normed(config, kind, own[name], x)
    q = _project(mixer, "query", mixer.n_heads, params, h)
    q = _placed(mixer, "query_norm", params, q, positions)
    mask, offset = mixer.mask, span[0] - seen[0]
    if ids is not None:
        mask = mask & masks.Segments(ids, _cut(tokens[1], seen))
    options = dict(scale=mixer.scale, logit_cap=mixer.logit_cap)
    if mixer.position == "alibi":
        options["bias"] = positions_lib.alibi_bias(
            mixer.n_heads, q.shape[1], k.shape[1], offset, causal=sees_only_past(mixer.mask)
        )
    o = partitioned(
        attention, q, k, v, mask=mask, q_offset=offset, implementation=mixer.implementation,
        **options,
    )  # fmt: skip
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


def _seen(config, kind, span, T) -> tuple[int, int]:
    """The keys that a chunk of queries needs, as (start, length); all if it saves little.

    A slice is a copy, and the op looks at no tile that its mask empties. Masks that count from the
    first key on need the keys from there.
    """
    start, length = span
    mask, first, end = make_mixer(config, kind).mask, 0, T
    band = mask.band()
    if band is not None:
        lowest, highest = (int(n) for n in band.key_bounds(start, start + length - 1, T))
        if band.prefix == 0 and band.limit is None:
            first = min(lowest, T - 1)
        end = max(highest, first) + 1  # at least one key, which the mask may hide
    elif isinstance(mask, masks.Lambda):
        end = start + length
    return (first, end - first) if end - first <= T // 2 else (0, T)


# Recurrent mixers, and blocks that do not mix over time.


def _recurrent_chunk(config, stage, span, tokens, own, x, state):
    positions, ids = (None if a is None else _cut(a, span) for a in tokens)
    for i, (name, kind) in enumerate(stage.blocks):
        block = functools.partial(Block(config, kind).apply, {"params": own[name]})
        x, after = block(x, state=None if i else state, positions=positions, segment_ids=ids)
        state = state if i else after
    return x, state


def _recurrent_forward(plan, stage, params, x, tokens):
    """The output, and the states before each chunk, [chunks, ...]."""
    own = _of_stage(stage, params)
    state = make_mixer(plan.config, stage.mixer).init_state(x.shape[0], x.shape[1])

    def step(span, carry, _):
        x, state = carry
        y, after = _recurrent_chunk(plan.config, stage, span, tokens, own, _cut(x, span), state)
        return (_put(x, span, y), after), state

    (x, _), states = _in_turn(step, plan.spans(x.shape[1]), (x, state), alike=True)
    return x, states


def _recurrent_backward(plan, stage, params, x, states, tokens, g):
    own, total = _of_stage(stage, params), _zeros(_of_stage(stage, params))

    def step(span, carry, state):
        dx, dstate, total = carry
        real, rebuild = _floating(state)

        def chunk(own, x, real):
            y, after = _recurrent_chunk(plan.config, stage, span, tokens, own, x, rebuild(real))
            return y, _floating(after)[0]

        _, pull = jax.vjp(chunk, own, _cut(x, span), real)
        found, dx_i, dstate = pull((_cut(dx, span), dstate))
        return (_put(dx, span, dx_i), dstate, _add(total, found)), None

    dstate = [jnp.zeros(a.shape[1:], a.dtype) for a in _floating(states)[0]]
    spans = plan.spans(x.shape[1])
    carry = _in_turn(step, spans, (g, dstate, total), states, alike=True, reverse=True)[0]
    return carry[0], _like(carry[2], own)


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


# Loops, sums and slices.


def _in_turn(step, spans, carry, xs=None, *, alike=False, reverse=False):
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
        body = lambda carry, at: jax.lax.switch(at[0], branches, carry, at[1])
        index = jnp.arange(len(spans))
    return jax.lax.scan(body, carry, (index, xs), reverse=reverse)


def _of_stage(stage, params):
    return {name: params[name] for name, _ in stage.blocks}


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _zeros(tree):
    """Zeros to add up in: at least float32."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, _wide(a)), tree)


def _add(total, tree):
    """total + tree in at least float32; total may be None."""
    tree = jax.tree.map(lambda a: a.astype(_wide(a)), tree)
    return tree if total is None else jax.tree.map(jnp.add, total, tree)


def _like(tree, like):
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


def _cut(x, span):
    """x[:, start : start + length]"""
    start, length = span
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + length, axis=1)
    return jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)


def _put(x, span, part):
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), span[0], axis=1)
