"""Drawing text from a language model, one token after another, under one jit.

Letters: B batch, T prompt length, N new tokens, V vocabulary.

Prompts of different lengths stand flush right behind padding that is a segment of its own (id 0),
so that what holds for packed documents holds for them, whatever the model's mixers are.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tilescan.models import LanguageModel
from tilescan.ops import masks


class Generation(NamedTuple):
    """What was drawn.

    tokens: [B, N]; behind a row's end of text, `eos` again. lengths: how many of them are text,
    the end-of-text token included. logprobs: of each token under the distribution it was drawn
    from, 0 behind the end.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    logprobs: Float[Array, "B N"]


def filter_logits(
    logits: Float[Array, "... V"],
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | Array | None = None,
) -> Float[Array, "... V"]:
    """Log-probabilities of the distribution that sampling draws from; -inf for what is left out.

    Temperature divides the logits. top_k keeps the k most probable tokens. top_p keeps the
    fewest tokens, most probable first, whose probabilities (after temperature and top_k) reach
    p (Holtzman et al. 2020, arXiv 1904.09751). Of equally probable tokens the lower id goes
    first.
    """
    logits = logits.astype(jnp.float32) / temperature
    if top_k is None and top_p is None:
        return jax.nn.log_softmax(logits, axis=-1)
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    keep = jnp.ones(ranked.shape, bool)
    if top_k is not None:
        keep = jnp.broadcast_to(jnp.arange(ranked.shape[-1]) < top_k, ranked.shape)
        ranked = jnp.where(keep, ranked, -jnp.inf)
    if top_p is not None:
        p = jax.nn.softmax(ranked, axis=-1)
        # A token stays if those before it do not reach p yet; the first one always stays.
        before = jnp.cumsum(p, axis=-1) - p
        keep &= (before < top_p).at[..., 0].set(True)
    kept = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)
    return jax.nn.log_softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)


def generate(
    model: LanguageModel,
    params: Any,
    prompt: Int[Array, "B T"],
    *,
    max_new_tokens: int,
    lengths: Int[Array, " B"] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    eos: int | None = None,
) -> Generation:
    """Continues every row of `prompt`; stops early when all rows have drawn `eos`.

    Args:
      model, params: the function; `params` as `model.apply({"params": params}, ...)` takes them.
      prompt: token ids; row b's prompt is its first lengths[b] ones.
      max_new_tokens: N.
      lengths: of the prompts, default T for all.
      temperature: 0 takes the most probable token.
      top_k, top_p: see `filter_logits`.
      key: a JAX random key, needed if temperature > 0. Row b's draws depend on key and b only.
      eos: the token that ends a text.

    Raises:
      ValueError: for settings that make no distribution, a missing key, lengths beyond T, more
        tokens than the model has positions, or different lengths with a mask that counts from
        the start of the row.
    """
    sampler = _Sampler.check(model, prompt, max_new_tokens, temperature, top_k, top_p, key)
    tokens, ids, positions = _flush_right(model, prompt, lengths)
    key = jax.random.key(0) if key is None else key
    return _generate(
        model, sampler, max_new_tokens, eos, params, tokens, ids, positions, temperature, top_p, key
    )


def stream(
    model: LanguageModel,
    params: Any,
    prompt: Int[Array, "B T"],
    *,
    max_new_tokens: int,
    lengths: Int[Array, " B"] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    eos: int | None = None,
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, [B] at a time, as soon as they are drawn (a jit for each step)."""
    sampler = _Sampler.check(model, prompt, max_new_tokens, temperature, top_k, top_p, key)
    tokens, ids, positions = _flush_right(model, prompt, lengths)
    key = jax.random.key(0) if key is None else key
    carry = _start(
        model, sampler, max_new_tokens, eos, params, tokens, ids, positions, temperature, top_p, key
    )
    packed = ids is not None
    for i in range(max_new_tokens):
        yield np.asarray(carry.token)
        if i + 1 == max_new_tokens or np.all(carry.done):
            return
        carry = _next(model, sampler, packed, eos, params, carry, temperature, top_p, key)


class _Sampler(NamedTuple):
    """What of the sampling settings is known when the program is traced."""

    greedy: bool
    top_k: int | None
    nucleus: bool

    @classmethod
    def check(cls, model, prompt, max_new_tokens, temperature, top_k, top_p, key) -> "_Sampler":
        if np.ndim(prompt) != 2 or np.shape(prompt)[1] == 0:
            raise ValueError(
                f"prompt must be [batch, time] with a token at least, got shape {np.shape(prompt)}"
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
        if top_k is not None and not 1 <= top_k <= model.config.vocab_size:
            raise ValueError(
                f"top_k={top_k} must be between 1 and vocab_size={model.config.vocab_size}"
            )
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must be in (0, 1]")
        if temperature > 0 and key is None:
            raise ValueError(f"temperature={temperature} needs key, e.g. jax.random.key(0)")
        total = np.shape(prompt)[1] + max_new_tokens
        if model.config.position == "learned" and total > model.config.max_len:
            raise ValueError(
                f"prompt and max_new_tokens are {total} tokens, but the model has positions for "
                f"max_len={model.config.max_len}"
            )
        return cls(temperature == 0, top_k, top_p is not None)

    def draw(self, logits, temperature, top_p, key) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        if self.greedy:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return token, jnp.zeros(token.shape, jnp.float32)
        scores = filter_logits(logits, temperature, self.top_k, top_p if self.nucleus else None)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(scores)))
        token = jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
        return token, jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]


class _Carry(NamedTuple):
    """Between two steps: the model's state, the token just drawn, its position, who is done."""

    state: Any
    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    position: Int[Array, " B"]
    done: Array
    step: Int[Array, ""]


def _flush_right(model: LanguageModel, prompt, lengths):
    """(tokens, segment ids, positions); no ids and positions if all prompts are equally long."""
    prompt = jnp.asarray(prompt, jnp.int32)
    B, T = prompt.shape
    if lengths is None or np.all(np.asarray(lengths) == T):
        return prompt, None, None
    lengths = np.asarray(lengths)
    if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
        raise ValueError(
            f"lengths must be [{B}] numbers between 1 and the prompt's {T}, got {lengths}"
        )
    config = model.config
    if config.sinks or not _shift_invariant(config.attention_mask):
        raise ValueError(
            "prompts of different lengths need a mask that depends on distances alone; with "
            f"{config.attention_mask!r}, sinks={config.sinks} generate row by row"
        )
    positions = np.arange(T)[None] - (T - lengths)[:, None]
    source = jnp.asarray(positions % T)
    tokens = jnp.take_along_axis(prompt, source, axis=1)
    ids = jnp.asarray(positions >= 0, jnp.int32)
    return tokens, ids, jnp.asarray(np.maximum(positions, 0), jnp.int32)


def _shift_invariant(mask: masks.Mask) -> bool:
    """Whether a mask that sees only the past depends on the distance i - j alone."""
    if isinstance(mask, masks.And | masks.Or):
        return all(_shift_invariant(part) for part in mask.masks)
    return isinstance(mask, masks.Causal | masks.SlidingWindow | masks.Full)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(model, sampler, N, eos, params, tokens, ids, positions, temperature, top_p, key):
    """Reads the prompt and draws the first token."""
    B, T = tokens.shape
    x, state = model.apply(
        {"params": params},
        tokens,
        state=model.init_state(B, T + N),
        positions=positions,
        segment_ids=ids,
        method="hidden",
    )
    # Only the last position is worth a row of V scores.
    logits = model.apply({"params": params}, x[:, -1:], method="logits")[:, 0]
    token, logprob = sampler.draw(logits, temperature, top_p, jax.random.fold_in(key, 0))
    last = jnp.full((B,), T - 1, jnp.int32) if positions is None else positions[:, -1]
    done = jnp.zeros((B,), bool) if eos is None else token == eos
    return _Carry(state, token, logprob, last + 1, done, jnp.int32(1))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5,))
def _next(model, sampler, packed, eos, params, carry, temperature, top_p, key):
    """Reads the token drawn last and draws the next one."""
    ones = jnp.ones((len(carry.token), 1), jnp.int32)
    logits, state = model.apply(
        {"params": params},
        carry.token[:, None],
        state=carry.state,
        positions=carry.position[:, None],
        segment_ids=ones if packed else None,
    )
    key = jax.random.fold_in(key, carry.step)
    token, logprob = sampler.draw(logits[:, 0], temperature, top_p, key)
    done = carry.done
    if eos is not None:
        token = jnp.where(done, eos, token)
        logprob = jnp.where(done, 0.0, logprob)
        done = done | (token == eos)
    return _Carry(state, token, logprob, carry.position + 1, done, carry.step + 1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(model, sampler, N, eos, params, tokens, ids, positions, temperature, top_p, key):
    carry = _start(model, sampler, N, eos, params, tokens, ids, positions, temperature, top_p, key)
    B = len(tokens)
    out = jnp.full((B, N), 0 if eos is None else eos, jnp.int32)
    out, logprobs = out.at[:, 0].set(carry.token), jnp.zeros((B, N)).at[:, 0].set(carry.logprob)

    def step(loop):
        carry, out, logprobs, lengths = loop
        i = carry.step
        lengths = lengths + jnp.where(carry.done, 0, 1)
        carry = _next(model, sampler, ids is not None, eos, params, carry, temperature, top_p, key)
        return carry, out.at[:, i].set(carry.token), logprobs.at[:, i].set(carry.logprob), lengths

    def unfinished(loop):
        return (loop[0].step < N) & ~jnp.all(loop[0].done)

    lengths = jnp.ones((B,), jnp.int32)
    _, out, logprobs, lengths = jax.lax.while_loop(
        unfinished, step, (carry, out, logprobs, lengths)
    )
    return Generation(out, lengths, logprobs)
