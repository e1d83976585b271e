"""Text that grows with every token: what each one adds, in whole characters.

A token is not a piece of text by itself. A character may take several tokens; and many decoders
treat the first token differently: Llama 2's drops the space before a word.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

# What a decoder gives for bytes that are not a character, or not yet.
_UNFINISHED = "\ufffd"
# How many tokens are decoded again with each new one, at most, and how many before them.
_WINDOW, _CONTEXT = 256, 64


@runtime_checkable
class Decoder(Protocol):
    """What gives the text of tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, special ones included."""


@runtime_checkable
class Codec(Decoder, Protocol):
    """What generation needs of a tokenizer: those of `data.tokenizers` and of folders are such.

    Its end_ids, eos_id and bos_id are used if it has them.
    """

    def encode(self, text: str, *, allow_special: bool = False) -> Integer[np.ndarray, " N"]:
        """Returns the ids of a text's tokens."""


def text_pieces(
    tokenizer: Decoder, prompt: Sequence[int] | Integer[np.ndarray, " N"], tokens: Iterable[Any]
) -> Iterator[str]:
    """Yields what each token adds to the text of the prompt and the tokens before it.

    Args:
      tokenizer: what gives the text of tokens.
      prompt: the tokens that come first, whose text is not given again.
      tokens: those that follow, one after another: integers of any kind.

    Yields:
      One piece per token, "" as long as a character is not whole; at the end, as one piece more,
      an unfinished character if there is one. Together they are the text that follows the prompt's.
    """
    before, new = [int(t) for t in prompt[-_CONTEXT:]], []
    settled, written, head = 0, "", None
    for token in tokens:
        new.append(int(token))
        text, head = _following(tokenizer, before, new, head)
        if not text.startswith(written):
            # Bytes that are not a character can change how a decoder reads those before them, whose
            # text is out: go on after it.
            before, new = (before + new[:settled])[-_CONTEXT:], new[settled:]
            settled, written = 0, ""
            text, head = _following(tokenizer, before, new, None)
        if text.endswith(_UNFINISHED):
            yield ""
            continue
        yield text[len(written) :]
        settled, written = len(new), text
        if settled >= _WINDOW:
            before, new, settled, written, head = new[-_CONTEXT:], [], 0, "", None
    if len(new) > settled:
        yield _following(tokenizer, before, new, head)[0][len(written) :]


def _following(
    tokenizer: Decoder, before: list[int], new: list[int], head: tuple[str, int] | None
) -> tuple[str, tuple[str, int] | None]:
    """(the text of `new` after `before`, its head).

    The head is what the place changes at the start of the text: characters to add (a space that
    the decoder takes from what it holds for the first token), and how many to drop (a mark of what
    goes on with a word). None: it has not shown yet.
    """
    text = tokenizer.decode(new)
    if head is None and before and not text.endswith(_UNFINISHED):
        context, both = tokenizer.decode(before), tokenizer.decode(before + new)
        there = both[len(context) :] if both.startswith(context) else text
        if there.endswith(text) and there:
            head = there[: len(there) - len(text)], 0
        elif there and text.endswith(there):
            head = "", len(text) - len(there)
        elif text:
            head = "", 0
    add, drop = head or ("", 0)
    return add + text[drop:], head
