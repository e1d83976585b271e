"""Tokens after what a `Reader` has read, for one row or a batch.

Dimensions: B batch, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from tilescan.decoding.arguments import check_eos
from tilescan.decoding.filters import (
    Nucleus,
    check_integer,
    check_temperature,
    check_top_k,
    check_top_p,
)
from tilescan.decoding.reader import Reader, Reading
from tilescan.decoding.sampling import refuse_unsampled, sample


class Sampling(NamedTuple):
    """How tokens are chosen, checked: see `decoding.sampling.generate`."""

    temperature: Float[np.ndarray, ""]
    top_k: int | None
    nucleus: Nucleus | None
    key: Array

    @classmethod
    def check(
        cls, temperature: Any, top_k: Any, top_p: Any, seed: Any, vocab_size: int | None = None
    ) -> "Sampling":
        """Returns the settings of one number each.

        Raises:
          TypeError, ValueError: see `decoding.sampling.generate`; a seed that is not an integer of
            64 bits.
        """
        t = check_temperature(temperature, (1,))
        top_k, nucleus = check_top_k(top_k, vocab_size), check_top_p(top_p, (1,))
        seed = check_integer("seed", seed)
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed={seed} must fit into 64 bits: -2**63 to 2**63 - 1")
        return cls(t, top_k, nucleus, jax.random.key(seed))

    def of_turn(self, turn: int) -> "Sampling":
        """Returns the settings with random keys of a turn's own; of turn 0, these."""
        return self._replace(key=jax.random.fold_in(self.key, turn)) if turn else self

    def static(self, ends: tuple[int, ...]) -> tuple[bool, int | None, tuple[int, ...]]:
        """Returns what a program is compiled for: whether it is greedy, top_k, and the ends."""
        return not np.any(self.temperature), self.top_k, ends

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What a program is given: temperature, nucleus and key."""
        return self.temperature, self.nucleus, self.key


class Step(NamedTuple):
    """A token of each row: the token that ended a row again after its end.

    tokens: int32 [B]. logprobs: float32 [B], under the model's own distribution, whatever the
    temperature. done: bool [B], which rows have ended, with this token or before.
    """

    tokens: Integer[np.ndarray, " B"]
    logprobs: Float[np.ndarray, " B"]
    done: np.ndarray


class Continuation:
    """An iterator over `Step`s: samples a token, reads it, samples the next one.

    It ends after `max_new_tokens` steps, or when all rows have ended. A step's tokens are read when
    the next one is asked for.

    Attributes:
      reading: the state, in which the last step's tokens are not read yet.

    Args:
      reader: of the model.
      reading, logits: what `reader.read` returned. The former is used up.
      sampling: how tokens are chosen.
      max_new_tokens: at most so many steps.
      ends: tokens that end a row.
      rows: the number that each row's random keys are made of [B]; default 0 ... B - 1.
      done: bool [B], rows that have ended before they begin; default none.
      packed: whether segment_ids were given to the reader; new tokens then are of segment 1.
    """

    def __init__(
        self,
        reader: Reader,
        reading: Reading,
        logits: Float[Array, "B V"],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        ends: Sequence[int] = (),
        rows: Sequence[int] | None = None,
        done: Sequence[bool] | None = None,
        packed: bool = False,
    ):
        self.reader, self.reading, self.sampling = reader, reading, sampling
        self.max_new_tokens, self.packed = max_new_tokens, packed
        self._ends = check_eos(ends, reader.model.config.vocab_size)
        B = len(logits)
        self._rows = jnp.arange(B) if rows is None else jnp.asarray(rows, jnp.int32)
        self._done = jnp.zeros((B,), bool) if done is None else jnp.asarray(done)
        self._token, self._logits, self._step = jnp.zeros((B,), jnp.int32), logits, 0

    def __iter__(self) -> Iterator[Step]:
        """Returns itself."""
        return self

    def __next__(self) -> Step:
        """Samples the next tokens.

        Raises:
          FloatingPointError: the model's scores hold NaN or inf.
        """
        if self._step == self.max_new_tokens or (self._step and np.all(self._done)):
            raise StopIteration
        if self._step:
            tokens = self._token[:, None]
            ids = jnp.ones_like(tokens) if self.packed else None
            self._logits, self.reading = self.reader.read(self.reading, tokens, ids)
        static, arrays = self.sampling.static(self._ends), self.sampling.arrays
        self._token, logprobs, self._done = _choose(
            static, *arrays, self._rows, self._step, self._logits, self._token, self._done
        )
        tokens = np.asarray(self._token)
        refuse_unsampled(tokens[:, None], np.full(len(tokens), self._step))
        self._step += 1
        return Step(tokens, np.asarray(logprobs), np.asarray(self._done))


def compile_ahead(vocab_size: int, batch: int, sampling: Sampling, ends: Sequence[int]) -> None:
    """Compiles what a `Continuation` calls beside the reader."""
    spec = jax.ShapeDtypeStruct
    rows = token = spec((batch,), jnp.int32)
    logits, done = spec((batch, vocab_size), jnp.float32), spec((batch,), jnp.bool_)
    static = sampling.static(check_eos(ends, vocab_size))
    _choose.lower(static, *sampling.arrays, rows, 0, logits, token, done).compile()


@functools.partial(jax.jit, static_argnums=0)
def _choose(static, temperature, nucleus, key, rows, step, logits, token, done):
    """(tokens, log-probabilities, which rows have ended) after the row's last `token`."""
    greedy, top_k, ends = static
    key = jax.random.fold_in(key, step)
    new, _ = sample(logits, key, rows, greedy, temperature, top_k, nucleus)
    new = jnp.where(done, token, new)
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    logprobs = jnp.take_along_axis(logprobs, new[:, None], axis=-1)[:, 0]
    ended = new < 0
    for end in ends:
        ended |= new == end
    return new, jnp.where(done, 0.0, logprobs), done | ended
