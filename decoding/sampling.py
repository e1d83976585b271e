"""Sampling from a language model, one token after another, under one jit.

Dimensions: B batch, T prompt length, N new tokens, V vocabulary.

Prompts of different lengths stand flush right, after padding that is a segment of its own (id 0),
so that what holds for packed documents holds for them, whatever the model's mixers are.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from tilescan.decoding import arguments
from tilescan.decoding.arguments import AnyInteger, Lengths, Numbers, Prompt
from tilescan.decoding.filters import (
    Nucleus,
    check_temperature,
    check_top_k,
    check_top_p,
    filter_logits,
    filtered,
    is_distribution,
    is_traced,
)
from tilescan.models import LanguageModel
from tilescan.ops.explicit_axes import partitioned_by_compiler, replicated

__all__ = ["Generation", "filter_logits", "generate", "stream"]


class Generation(NamedTuple):
    """What was sampled.

    tokens: int32 [B, N]; after a row's end of text, the token that ended it again. lengths: how
    many of them are text, the end-of-text token included. logprobs: float32, of each token under
    the distribution it was sampled from (0 if it is greedy: it holds one token), 0 after the end.
    """

    tokens: Integer[Array, "B N"]
    lengths: Integer[Array, " B"]
    logprobs: Float[Array, "B N"]


def generate(
    model: LanguageModel,
    params: Any,
    prompt: Prompt,
    *,
    max_new_tokens: AnyInteger,
    lengths: Lengths | None = None,
    temperature: Numbers = 0.0,
    top_k: AnyInteger | None = None,
    top_p: Numbers | None = None,
    key: Array | None = None,
    eos: AnyInteger | Iterable[AnyInteger] | None = None,
) -> Generation:
    """Continues every row of `prompt`; stops early when all rows have sampled an end of text.

    Args:
      model, params: the function; `params` as `model.apply({"params": params}, ...)` takes them.
      prompt: token ids of any integer dtype; row b's prompt is its first lengths[b] ones, and
        what stands after them is never looked at.
      max_new_tokens: N.
      lengths: of the prompts, default T for all.
      temperature: one number, or one for each row; 0 takes the most probable token.
      top_k, top_p: see `filter_logits`; top_p is one number, or one for each row.
      key: a JAX random key, needed if temperature > 0. Row b's samples depend on key and b only.
      eos: the token that ends a text, or several of which each one does.

    Returns:
      What was sampled; see `Generation`. Under a jit of the caller's, a row whose scores hold NaN
      or +inf ends with tokens of -1 and logprobs of NaN, which `lengths` does not count.

    Raises:
      TypeError: a prompt, lengths, max_new_tokens, top_k or eos that are not integers, a
        temperature or top_p that are not numbers, a key that is not one.
      ValueError: for settings that make no distribution, a missing key, ids of prompt or eos
        outside the vocabulary, lengths beyond T, more tokens than the model has positions, or
        different lengths with a mask that counts from the start of the row.
      FloatingPointError: the model's scores hold NaN or +inf, so that there is nothing to sample.
    """
    run = _Run.check(model, prompt, max_new_tokens, lengths, temperature, top_k, top_p, key, eos)
    sampled = _generate(model, run.static, params, run.inputs)
    if arguments.is_known(sampled.tokens):
        refuse_unsampled(np.asarray(sampled.tokens), np.asarray(sampled.lengths))
    return sampled


def stream(
    model: LanguageModel,
    params: Any,
    prompt: Prompt,
    *,
    max_new_tokens: AnyInteger,
    lengths: Lengths | None = None,
    temperature: Numbers = 0.0,
    top_k: AnyInteger | None = None,
    top_p: Numbers | None = None,
    key: Array | None = None,
    eos: AnyInteger | Iterable[AnyInteger] | None = None,
) -> Iterator[np.ndarray]:
    """Returns an iterator over the tokens of `generate`, [B] at a time, once they are sampled.

    Arguments and errors are those of `generate`; wrong arguments raise at the call. Each step is a
    jit of its own. After its end a row gives the token that ended it again, until all have ended.
    """
    run = _Run.check(model, prompt, max_new_tokens, lengths, temperature, top_k, top_p, key, eos)
    return _stream(model, run, params)


def _stream(model, run: "_Run", params) -> Iterator[np.ndarray]:
    new = run.static.new_tokens
    carry = _start(model, run.static, params, run.inputs)
    for i in range(new):
        token = np.asarray(carry.token)
        refuse_unsampled(token[:, None], np.full(len(token), i))
        yield token
        if i + 1 == new or np.all(carry.done):
            return
        carry = _next(model, run.static, params, run.inputs, carry)


def refuse_unsampled(tokens: np.ndarray, lengths: np.ndarray) -> None:
    """Raises FloatingPointError where a token is -1, which `sample` gives without a distribution.

    Args:
      tokens: int [B, N].
      lengths: int [B], how many of them come before it.
    """
    for row in np.flatnonzero((tokens < 0).any(axis=1))[:1]:
        raise FloatingPointError(
            f"the model's scores of new token {lengths[row]} of row {row} hold NaN or inf, so that "
            "there is nothing to sample: look at the parameters (NaN, inf) and at the dtype of the "
            "computation (overflow)"
        )


class _Static(NamedTuple):
    """What is known when the program is traced."""

    new_tokens: int
    greedy: bool
    top_k: int | None
    eos: tuple[int, ...]


class _Inputs(NamedTuple):
    """What the program is given; None stands for what it does without."""

    tokens: Integer[Array, "B T"]
    segment_ids: Integer[Array, "B T"] | None
    positions: Integer[Array, "B T"] | None
    temperature: Float[Array, "..."]
    nucleus: Nucleus | None
    key: Array


class _Run(NamedTuple):
    static: _Static
    inputs: _Inputs

    @classmethod
    def check(
        cls, model, prompt, max_new_tokens, lengths, temperature, top_k, top_p, key, eos
    ) -> "_Run":
        config = model.config
        prompt, lengths = arguments.check_prompt(config, prompt, lengths)
        B, T = prompt.shape
        new = arguments.check_max_new_tokens(max_new_tokens, config, T)
        t = check_temperature(temperature, (B,))
        top_k, nucleus = check_top_k(top_k, config.vocab_size), check_top_p(top_p, (B,))
        greedy = not is_traced(t) and not np.any(t)
        key = arguments.check_key(key, temperature, greedy)
        static = _Static(new, greedy, top_k, arguments.check_eos(eos, config.vocab_size))
        return cls(
            static, _Inputs(*arguments.flush_right(config, prompt, lengths), t, nucleus, key)
        )


def sample(
    logits: Float[Array, "B V"],
    key: Array,
    rows: Integer[Array, " B"],
    greedy: bool,
    temperature: Float[Array | np.ndarray, "..."],
    top_k: int | None,
    nucleus: Nucleus | None,
) -> tuple[Integer[Array, " B"], Float[Array, " B"]]:
    """Returns (int32 tokens, float32 log-probabilities); (-1, NaN) for a row of no distribution.

    Args:
      logits: the model's.
      key: of this step; row b samples with key and rows[b].
      rows: see key.
      greedy: whether the likeliest tokens are taken, and nothing of what follows matters.
      temperature, top_k, nucleus: see `filters.filtered`.
    """
    if greedy:
        valid = is_distribution(logits)
        token = jnp.argmax(logits, axis=-1)
        logprob = jnp.zeros(token.shape, jnp.float32)
    else:
        scores = filtered(logits, temperature, top_k, nucleus)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
        token = jax.vmap(jax.random.categorical)(keys, scores)
        logprob = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]
        valid = ~jnp.isnan(logprob)
    return jnp.where(valid, token, -1).astype(jnp.int32), jnp.where(valid, logprob, jnp.nan)


def _sample(static: _Static, inputs: _Inputs, logits: Float[Array, "B V"], key: Array):
    chosen = static.greedy, inputs.temperature, static.top_k, inputs.nucleus
    return sample(logits, key, jnp.arange(len(logits)), *chosen)


class _Carry(NamedTuple):
    """Between two steps: the model's state, the token just sampled, its position, who is done."""

    state: Any
    token: Integer[Array, " B"]
    logprob: Float[Array, " B"]
    position: Integer[Array, " B"]
    done: Array
    step: Integer[Array, ""]

    def after_end(self) -> Float[Array, " B"]:
        """The log-probability of what stands after a row's end."""
        return jnp.where(self.token < 0, jnp.nan, 0.0)


def _ends(static: _Static, token: Integer[Array, " B"]) -> Array:
    """Whether a row ends here: with one of `eos`, or for want of a distribution."""
    ends = token < 0
    for end in static.eos:
        ends |= token == end
    return ends


@functools.partial(jax.jit, static_argnums=(0, 1))
@partitioned_by_compiler(replicated)
def _start(model, static, params, inputs) -> _Carry:
    """Reads the prompt and samples the first token."""
    B, T = inputs.tokens.shape
    x, state = model.apply(
        {"params": params},
        inputs.tokens,
        state=model.init_state(B, T + static.new_tokens),
        positions=inputs.positions,
        segment_ids=inputs.segment_ids,
        method="hidden",
    )
    # Only the last position is worth a row of V scores.
    logits = model.apply({"params": params}, x[:, -1:], method="logits")[:, 0]
    token, logprob = _sample(static, inputs, logits, jax.random.fold_in(inputs.key, 0))
    positions = inputs.positions
    last = jnp.full((B,), T - 1, jnp.int32) if positions is None else positions[:, -1]
    return _Carry(state, token, logprob, last + 1, _ends(static, token), jnp.int32(1))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
@partitioned_by_compiler(replicated)
def _next(model, static, params, inputs, carry) -> _Carry:
    """Reads the token sampled last and samples the next one."""
    ones = jnp.ones((len(carry.token), 1), jnp.int32)
    logits, state = model.apply(
        {"params": params},
        carry.token[:, None],
        state=carry.state,
        positions=carry.position[:, None],
        segment_ids=None if inputs.segment_ids is None else ones,
    )
    key = jax.random.fold_in(inputs.key, carry.step)
    token, logprob = _sample(static, inputs, logits[:, 0], key)
    token = jnp.where(carry.done, carry.token, token)
    logprob = jnp.where(carry.done, carry.after_end(), logprob)
    done = carry.done | _ends(static, token)
    return _Carry(state, token, logprob, carry.position + 1, done, carry.step + 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
@partitioned_by_compiler(replicated)
def _generate(model, static, params, inputs) -> Generation:
    carry = _start(model, static, params, inputs)
    B, N = len(inputs.tokens), static.new_tokens
    out = jnp.zeros((B, N), jnp.int32).at[:, 0].set(carry.token)
    logprobs = jnp.zeros((B, N)).at[:, 0].set(carry.logprob)

    def step(loop):
        carry, out, logprobs, lengths = loop
        i = carry.step
        new = _next(model, static, params, inputs, carry)
        lengths = lengths + (~carry.done & (new.token >= 0))
        return new, out.at[:, i].set(new.token), logprobs.at[:, i].set(new.logprob), lengths

    def unfinished(loop):
        return (loop[0].step < N) & ~jnp.all(loop[0].done)

    loop = (carry, out, logprobs, (carry.token >= 0).astype(jnp.int32))
    carry, out, logprobs, lengths = jax.lax.while_loop(unfinished, step, loop)
    # The steps that no row needed any more.
    left = jnp.arange(N) >= carry.step
    out = jnp.where(left, carry.token[:, None], out)
    logprobs = jnp.where(left, carry.after_end()[:, None], logprobs)
    return Generation(out, lengths, logprobs)
