"""A conversation with a model: turns by its checkpoint's chat template, over one kept state."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Integer

from tilescan.data.tokenizers import utf8
from tilescan.decoding.arguments import check_max_new_tokens
from tilescan.decoding.continuation import Continuation, Sampling
from tilescan.decoding.pieces import text_pieces
from tilescan.decoding.reader import Reader
from tilescan.decoding.writers import (
    GeneratedText,
    Writer,
    ends_of,
    timed,
    warn_beyond_training,
)

# Room of the state before the first turn, in tokens.
ROOM = 1024


def is_question(prompt: str) -> bool:
    """Returns whether a prompt asks something, and so wants an answer rather than more of it."""
    return prompt.rstrip().endswith("?")


def turn_ids(writer: Writer, text: str) -> Integer[np.ndarray, " N"]:
    """Returns the ids of a rendered template, which itself holds the token that begins a text."""
    tokenizer = writer.tokenizer
    encode = getattr(tokenizer, "encode_part", tokenizer.encode)
    return np.asarray(encode(text, allow_special=True), np.int32)


class Conversation:
    """Turns with a model, which reads only what is new of each.

    The tokens it has read are those of the first turn's rendered template, the answer as it was
    sampled, what the second turn's template adds, and so on. Where a template changes what it gave
    for earlier turns (some trim answers), the conversation is read anew.

    Attributes:
      messages: of all turns, as templates take them.
      read_ids: the tokens that the state holds.

    Args:
      writer: from `load_writer`, with a template.
      system: the first message, in place of the template's own.
      temperature, top_k, top_p, seed: see `generate_text`.

    Raises:
      ValueError: the checkpoint has no chat template.
      TypeError, ValueError: see `generate_text`.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        system: str | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ):
        require_template(writer)
        self.writer, self.ends = writer, ends_of(writer)
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append(dict(role="system", content=system))
        self.read_ids: list[int] = []
        vocab_size = writer.model.config.vocab_size
        self._sampling = Sampling.check(temperature, top_k, top_p, seed, vocab_size)
        self._seed, self._turn = seed, 0
        self._reader = Reader(writer.model, writer.params)
        self._reading: Any = None
        self._text = ""  # of the template for what is read, and for `_unread`
        self._unread: list[int] = []

    def reply(
        self,
        message: str,
        *,
        max_new_tokens: int = 256,
        write: Callable[[str], Any] | None = None,
    ) -> GeneratedText:
        """Answers a message.

        Args:
          message: of the user.
          max_new_tokens: at most so many; an answer that they cut goes on in the next turn's text.
          write: is called with each new piece of the answer.

        Raises:
          ValueError: an empty message, more tokens than the model has positions for.
          CheckpointError: the template fails.
          FloatingPointError: the model's scores hold NaN or inf.
        """
        utf8(message, "message")
        if not message.strip():
            raise ValueError("message is empty; give it a word at least")
        began = time.perf_counter()
        asked = [*self.messages, dict(role="user", content=message)]
        rendered = self.writer.template.render(asked)
        # What is new: all, or what follows the text that has been read or sampled.
        known = self._reading is not None and rendered.startswith(self._text)
        kept, reading = (self.read_ids, self._reading) if known else ([], None)
        self._reading = None  # until the turn ends: an interrupted one is read anew
        new = turn_ids(self.writer, rendered[len(self._text) :] if known else rendered)
        new = [*(self._unread if known else ()), *new.tolist()]
        config, total = self.writer.model.config, len(kept) + len(new)
        limit = check_max_new_tokens(max_new_tokens, config, total)
        warn_beyond_training(self.writer, total + limit)

        if reading is None:
            reading = self._reader.start(1, max(ROOM, total))
        logits, reading = self._reader.read(reading, np.asarray([new], np.int32))
        # The answer, by random keys of its own.
        sampling = self._sampling.of_turn(self._turn)
        steps = Continuation(
            self._reader, reading, logits, sampling, max_new_tokens=limit, ends=self.ends
        )
        sampled: list[int] = []

        def tokens():
            for step in steps:
                sampled.append(int(step.tokens[0]))
                if sampled[-1] not in self.ends:
                    yield sampled[-1]

        pieces = text_pieces(self.writer.tokenizer, [*kept, *new], tokens())
        answer = timed(pieces, began, limit, write)
        # Of the sampled tokens the last is not read; one that ends a turn is the template's to say.
        self._unread = [token for token in sampled[-1:] if token not in self.ends]
        self.read_ids = [*kept, *new, *sampled[:-1]]
        self.messages = [*asked, dict(role="assistant", content=answer.text)]
        self._text, self._reading = rendered + answer.text, steps.reading
        self._turn += 1
        return answer


def require_template(writer: Writer) -> None:
    """Raises ValueError for a writer without a chat template."""
    if writer.template is None:
        raise ValueError(
            "the checkpoint has no chat template (tokenizer_config.json, chat_template.jinja or "
            "GGUF's tokenizer.chat_template): it can continue a text, but not chat"
        )
