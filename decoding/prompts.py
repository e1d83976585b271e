"""Many prompts: continued in batches, their continuations in the order of the prompts."""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from tilescan.decoding.arguments import check_max_new_tokens, check_prompt, flush_right
from tilescan.decoding.chat import turn_ids
from tilescan.decoding.continuation import Continuation, Sampling
from tilescan.decoding.pieces import text_pieces
from tilescan.decoding.reader import Reader
from tilescan.decoding.writers import Writer, ends_of, prompt_ids, warn_beyond_training

# Padded lengths are multiples of it: one that is among the sizes of `reader.CHUNKS`.
_MULTIPLE = 8


class Answer(NamedTuple):
    """What follows a prompt.

    Attributes:
      prompt: as it was given.
      text: without the token that ended it.
      tokens: their ids, the end included.
      logprobs: of each token under the model's own distribution, whatever the temperature.
      seconds: from the start of its batch until its last token.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    seconds: float


def ids_of(writer: Writer, prompt: str, chat: bool, system: str | None = None) -> np.ndarray:
    """Returns the int32 ids that a model reads for a prompt.

    Args:
      writer: with a template if chat.
      prompt: a text.
      chat: whether it is a turn of a conversation instead of the beginning of a text.
      system: the conversation's first message, in place of the template's own.
    """
    if not chat:
        return prompt_ids(writer.tokenizer, prompt)
    messages = [] if system is None else [dict(role="system", content=system)]
    messages.append(dict(role="user", content=prompt))
    return turn_ids(writer, writer.template.render(messages))


def check_prompts(
    writer: Writer,
    prompts: Sequence[str],
    max_new_tokens: int,
    to_ids: Callable[[str], Integer[np.ndarray, " N"]],
) -> list[int]:
    """Returns the prompts' lengths in tokens.

    Args:
      writer: its parameters may be shapes alone.
      prompts, max_new_tokens, to_ids: as for `continue_prompts`.

    Raises:
      ValueError: a prompt that the model can't read, named by its number if there are several.
    """
    lengths = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids = to_ids(prompt)
            check_prompt(writer.model.config, ids[None], None)
            check_max_new_tokens(max_new_tokens, writer.model.config, len(ids))
        except ValueError as error:
            which = f"prompt {number}: " if len(prompts) > 1 else ""
            raise type(error)(f"{which}{error}") from error
        lengths.append(len(ids))
    return lengths


def continue_prompts(
    writer: Writer,
    prompts: Iterable[str],
    *,
    batch_size: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    to_ids: Callable[[str], Integer[np.ndarray, " N"]] | None = None,
) -> Iterator[Answer]:
    """Yields what follows each prompt, in their order, as soon as its batch is done.

    A prompt's random samples depend on its number and not on the size of the batch. What it is
    padded with to the length of the others in its batch is never looked at.

    Args:
      writer: from `load_writer`.
      prompts: texts.
      batch_size: how many are read together; the same programs serve all batches.
      max_new_tokens: at most so many for each.
      temperature, top_k, top_p, seed: see `generate_text`.
      to_ids: the ids that the model reads for a prompt; default `prompt_ids`.

    Raises:
      TypeError, ValueError: settings that make no distribution; see `generate_text`.
      ValueError: a prompt that is empty, or with new tokens longer than the model has positions
        for; and, of a batch of several, a mask that counts from the start of the row.
      FloatingPointError: the model's scores hold NaN or inf.
    """
    new, vocab_size = check_max_new_tokens(max_new_tokens), writer.model.config.vocab_size
    sampling = Sampling.check(temperature, top_k, top_p, seed, vocab_size)
    to_ids = to_ids or (lambda prompt: prompt_ids(writer.tokenizer, prompt))
    reader, first = Reader(writer.model, writer.params), 0
    for batch in itertools.batched(prompts, batch_size):
        for length in check_prompts(writer, batch, max_new_tokens, to_ids):
            warn_beyond_training(writer, length + max_new_tokens)
        ids = [to_ids(prompt) for prompt in batch]
        yield from _continue_batch(writer, reader, batch, ids, batch_size, new, sampling, first)
        first += len(batch)


def _continue_batch(
    writer, reader: Reader, prompts, ids, batch_size: int, new: int, sampling: Sampling, first: int
) -> Iterator[Answer]:
    """The answers of one batch; its last rows are empty if prompts are fewer than its size."""
    began = time.perf_counter()
    B, packed = len(ids), batch_size > 1
    tokens, segments = np.asarray(ids[0])[None], None
    if packed:
        lengths = np.asarray([len(row) for row in ids] + [1] * (batch_size - B))
        padded = np.zeros((batch_size, padded_length(lengths.max())), np.int32)
        for row, into in zip(ids, padded, strict=False):
            into[: len(row)] = row
        tokens, segments, _ = flush_right(writer.model.config, padded, lengths)
    logits, reading = reader.read(
        reader.start(len(tokens), tokens.shape[1] + new), tokens, segments
    )
    numbers = range(first, first + len(tokens))
    done = [False] * B + [True] * (len(tokens) - B)
    ends = ends_of(writer)
    steps = Continuation(
        reader, reading, logits, sampling, max_new_tokens=new, ends=ends, rows=numbers, done=done,
        packed=packed,
    )  # fmt: skip
    out: list[tuple[list[int], list[float]]] = [([], []) for _ in ids]
    seconds, running = [0.0] * B, set(range(B))
    for step in steps:
        for b in sorted(running):
            out[b][0].append(int(step.tokens[b]))
            out[b][1].append(float(step.logprobs[b]))
            seconds[b] = time.perf_counter() - began
        running -= {b for b in running if step.done[b]}
    for prompt, row, (sampled, logprobs), took in zip(prompts, ids, out, seconds, strict=True):
        text = "".join(text_pieces(writer.tokenizer, row, (t for t in sampled if t not in ends)))
        yield Answer(prompt, text, tuple(sampled), tuple(logprobs), took)


def padded_length(longest: int) -> int:
    """Returns the length that the prompts of a batch are padded to."""
    return -(-int(longest) // _MULTIPLE) * _MULTIPLE


def read_prompts(lines: Iterable[str], name: str) -> list[str]:
    """Returns the prompts of a file: one a line, as text or, of a JSONL file, as JSON.

    Args:
      lines: of the file.
      name: of the file, for errors; one that ends with .jsonl holds in each line a string or an
        object with "prompt".

    Raises:
      ValueError: no lines, an empty one, or one of a JSONL file that is neither; named by its
        number.
    """
    prompts = []
    for number, line in enumerate(lines, 1):
        prompt: Any = line.rstrip("\r\n")
        if name.endswith(".jsonl") and prompt.strip():
            try:
                prompt = json.loads(prompt)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}:{number} is not JSON: {error}") from error
            if isinstance(prompt, dict):
                prompt = prompt.get("prompt")
            if not isinstance(prompt, str):
                raise ValueError(f'{name}:{number} must be a string, or an object with "prompt"')
        if not prompt.strip():
            raise ValueError(f"{name}:{number} is empty; give each line a prompt")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{name} holds no prompts: give it one a line")
    return prompts
