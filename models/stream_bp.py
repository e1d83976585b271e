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
        until keys, values and the inputs of layers are all that is left, and fill devices less.

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
        """Where chunks begin and end; the last may be shorter."""
        C = -(-T // self.chunks)
        return [(start, min(start + C, T)) for start in range(0, T, C)]


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
    positions, ids = tokens
    own = _of_stage(stage, params)
    k, v = _keys_values(plan.config, stage.mixer, own[stage.blocks[0][0]], x, positions)

    def step(span, out):
        seen = _seen(plan.config, stage.mixer, span, x.shape[1])
        arrays = (_cut(x, span), _cut(k, seen), _cut(v, seen))
        return _put(out, span, _attend(plan.config, stage, span, seen, tokens, own, *arrays))

    return _one_after_another(step, plan.spans(x.shape[1]), jnp.zeros_like(x)), ()


def _attention_backward(plan, stage, params, x, states, tokens, g):
    del states
    config, T = plan.config, x.shape[1]
    name, kind = stage.blocks[0]
    own, total = _of_stage(stage, params), _zeros(_of_stage(stage, params))
    project = functools.partial(_keys_values, config, kind)
    k, v = project(own[name], x, tokens[0])
    dk, dv = _zeros((k, v))

    def step(span, carry):
        dx, total, dk, dv = carry
        seen = _seen(config, kind, span, T)
        chunk = functools.partial(_attend, config, stage, span, seen, tokens)
        _, pull = jax.vjp(chunk, own, _cut(x, span), _cut(k, seen), _cut(v, seen))
        found, dx_i, dk_i, dv_i = pull(_cut(dx, span))
        dk, dv = (_add_at(a, seen, b) for a, b in ((dk, dk_i), (dv, dv_i)))
        return _put(dx, span, dx_i), _add(total, found), dk, dv

    # g is overwritten chunk by chunk.
    dx, total, dk, dv = _one_after_another(step, plan.spans(T), (g, total, dk, dv), reverse=True)

    def through_projections(span, carry):
        dx, total = carry
        chunk = lambda p, x: project(p, x, _cut(tokens[0], span))
        made, pull = jax.vjp(chunk, own[name], _cut(x, span))
        found, dx_i = pull(_like((_cut(dk, span), _cut(dv, span)), made))
        return _put(dx, span, _cut(dx, span) + dx_i), total | {name: _add(total[name], found)}

    # Only now are the gradients of all keys and values complete.
    dx, total = _one_after_another(through_projections, plan.spans(T), (dx, total))
    return dx, _like(total, own)


def _keys_values(config, kind, params, x, positions):
    """Keys and values [B, T, G, D] of a block's input, as `models.attention` makes them."""
    mixer, params, h = _normed(config, kind, params, x)
    k = _project(mixer, "key", mixer.n_kv_heads, params, h)
    return _placed(mixer, "key_norm", params, k, positions), _project(
        mixer, "value", mixer.n_kv_heads, params, h
    )


def _attend(config, stage, span, seen, tokens, own, x, k, v):
    """A chunk of the stage's output, of the same chunk of its input and the keys that it sees."""
    (name, kind), *rest = stage.blocks
    positions, ids = (None if a is None else _cut(a, span) for a in tokens)
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
    """First and end of the keys that a chunk of queries needs; all, if the mask can't tell.

    Masks that count from the first key on need the keys from there.
    """
    mask = make_mixer(config, kind).mask
    band = mask.band()
    if band is not None:
        first, last = (int(n) for n in band.key_bounds(span[0], span[1] - 1, T))
        counts_from_start = band.prefix > 0 or band.limit is not None
        # At least one key, which the mask may hide.
        return (0 if counts_from_start else first), max(last, first) + 1
    return 0, span[1] if isinstance(mask, masks.Lambda) else T


# Recurrent mixers, and blocks that do not mix over time.


def _recurrent_chunk(config, stage, span, tokens, own, x, state):
    positions, ids = (None if a is None else _cut(a, span) for a in tokens)
    for i, (name, kind) in enumerate(stage.blocks):
        block = functools.partial(Block(config, kind).apply, {"params": own[name]})
        y, s = block(x, state=None if i else state, positions=positions, segment_ids=ids)
        x, state = y, state if i else s
    return x, state


def _recurrent_forward(plan, stage, params, x, tokens):
    """The output, and the states before each chunk but the first."""
    own, states, parts = _of_stage(stage, params), [], []
    state = make_mixer(plan.config, stage.mixer).init_state(x.shape[0], x.shape[1])
    for span in plan.spans(x.shape[1]):
        if parts:
            states.append(state)
        x_i, state = _after(parts[-1:], (_cut(x, span), state))
        part, state = _recurrent_chunk(plan.config, stage, span, tokens, own, x_i, state)
        parts.append(part)
    return jnp.concatenate(parts, axis=1), states


def _recurrent_backward(plan, stage, params, x, states, tokens, g):
    own, total = _of_stage(stage, params), _zeros(_of_stage(stage, params))
    first = make_mixer(plan.config, stage.mixer).init_state(x.shape[0], x.shape[1])
    states, spans = [first, *states], plan.spans(x.shape[1])
    dx, dstate = g, None
    for span, state in reversed(list(zip(spans, states, strict=True))):
        (x_i, state), dx, total, dstate = _after((), ((_cut(x, span), state), dx, total, dstate))
        real, rebuild = _floating(state)

        def chunk(own, x, real, span=span, rebuild=rebuild):
            y, state = _recurrent_chunk(plan.config, stage, span, tokens, own, x, rebuild(real))
            return y, _floating(state)[0]

        (_, after), pull = jax.vjp(chunk, own, x_i, real)
        dstate = [jnp.zeros_like(a) for a in after] if dstate is None else dstate
        found, dx_i, dstate = pull((_cut(dx, span), dstate))
        total, dx = _add(total, found), _put(dx, span, dx_i)
    return dx, _like(total, own)


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


# Sums and slices.


def _of_stage(stage, params):
    return {name: params[name] for name, _ in stage.blocks}


def _zeros(tree):
    """Zeros to add up in: at least float32."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, "float32")), tree)


def _add(total, tree):
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, tree)


def _like(tree, like):
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


def _cut(x, span):
    return jax.lax.slice_in_dim(x, *span, axis=1)


def _put(x, span, part):
    return jax.lax.dynamic_update_slice_in_dim(x, part, span[0], axis=1)


def _add_at(x, span, part):
    return _put(x, span, _cut(x, span) + part.astype(x.dtype))


def _one_after_another(step, spans, carry, reverse=False):
    """carry = step(span, carry) for each span.

    A loop that chooses a branch, since a compiler may compute what is merely written in a row at
    once, and may fuse the sums into one that needs all their terms.
    """
    if len(spans) == 1:
        return step(spans[0], carry)
    branches = [functools.partial(step, span) for span in spans]
    body = lambda carry, i: (jax.lax.switch(i, branches, carry), None)
    return jax.lax.scan(body, carry, jnp.arange(len(spans)), reverse=reverse)[0]


def _after(previous, arrays):
    """`arrays`, to be used only when `previous` and all of them are there."""
    return jax.lax.optimization_barrier((arrays, list(previous)))[0]
