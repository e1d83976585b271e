"""From text to text: a published checkpoint, its tokenizer and sampling, in one call."""

import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from tilescan.data.tokenizers import utf8
from tilescan.decoding.arguments import check_max_new_tokens, check_prompt
from tilescan.decoding.continuation import Continuation, Sampling
from tilescan.decoding.pieces import text_pieces
from tilescan.decoding.reader import Reader
from tilescan.decoding.writers import (
    PRETRAINED,
    GeneratedText,
    Writer,
    compile_ahead,
    ends_of,
    load_writer,
    prompt_ids,
    timed,
    warn_beyond_training,
)

__all__ = ["PRETRAINED", "GeneratedText", "Writer", "generate_text", "load_writer", "stream_text"]


def stream_text(
    writer: Writer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[str]:
    """Yields pieces of the continuation, one per token, "" while a character is not whole yet.

    Together they are what follows the prompt's text; see `decoding.pieces`. The token that ends the
    text is none of it. The tokens are those of `decoding.sampling.stream` with
    key=jax.random.key(seed).

    Raises:
      TypeError, ValueError, FloatingPointError: see `generate_text`.
    """
    config = writer.model.config
    ids = prompt_ids(writer.tokenizer, prompt)
    check_prompt(config, ids[None], None)
    new = check_max_new_tokens(max_new_tokens, config, len(ids))
    sampling = Sampling.check(temperature, top_k, top_p, seed, config.vocab_size)
    reader, ends = Reader(writer.model, writer.params), ends_of(writer)
    logits, reading = reader.read(reader.start(1, len(ids) + new), ids[None])
    steps = Continuation(reader, reading, logits, sampling, max_new_tokens=new, ends=ends)
    tokens = (int(step.tokens[0]) for step in steps)
    yield from text_pieces(writer.tokenizer, ids, (token for token in tokens if token not in ends))


def generate_text(
    path_or_source: str | pathlib.Path | Writer | Callable[[], Writer],
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    write: Callable[[str], Any] | None = None,
) -> GeneratedText:
    """Continues a text, as `tilescan generate` does.

    Args:
      path_or_source: see `load_writer`; or what it returned, or a function that returns such.
      prompt: the text to continue; special tokens such as "<|im_start|>" are read as such, and
        the token that begins a text is added where the tokenizer's file says so.
      max_new_tokens: at most so many; fewer if the model ends the text.
      temperature, top_k, top_p: see `decoding.sampling`; temperature 0 is greedy.
      seed: of the random samples.
      write: is called with each new piece of text, e.g. functools.partial(print, end="").

    Raises:
      TypeError, ValueError: see `load_writer` and `decoding.sampling.generate`; a prompt that is
        empty or no Unicode text.
      FloatingPointError: the model's scores hold NaN or inf.
    """
    # What is wrong in itself is said before a model is loaded.
    utf8(prompt, "prompt")
    new = check_max_new_tokens(max_new_tokens)
    sampling = Sampling.check(temperature, top_k, top_p, seed)

    def prepare(writer: Writer) -> Callable[[], None]:
        length = len(prompt_ids(writer.tokenizer, prompt))
        check_max_new_tokens(new, writer.model.config, length)
        return functools.partial(compile_ahead, writer, length, length + new, sampling)

    writer = path_or_source
    if not isinstance(writer, Writer):
        writer = writer() if callable(writer) else load_writer(writer, prepare=prepare)
    warn_beyond_training(writer, len(prompt_ids(writer.tokenizer, prompt)) + max_new_tokens)
    settings = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    began = time.perf_counter()
    pieces = stream_text(writer, prompt, max_new_tokens=max_new_tokens, **settings)
    return timed(pieces, began, max_new_tokens, write)
