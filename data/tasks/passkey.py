"""Passkey retrieval: five digits somewhere in a long text of one repeated line; which were they?

Mohtashami and Jaggi 2023 (arXiv 2305.16300), in the words of the evaluation of Stuffed Mamba (Chen
et al. 2024, arXiv 2410.07145). The key's sentence takes the place of one line.
"""

import numpy as np

from tilescan.data.batches import Batch
from tilescan.data.tasks.base import Task
from tilescan.data.tokenizers import ByteTokenizer

PREFIX = (
    "There is an important info hidden inside a lot of irrelevant text. "
    "Find it and memorize it.\n\n"
)
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
KEY_LINE = "The passkey is {key}. Remember it. {key} is the passkey.\n"
SUFFIX = "\nWhat is the pass key? The passkey is"
DIGITS = 5


def prompt(key: str, lines: int, at: int) -> str:
    """Returns the text up to the question; the answer is " " + key. For any tokenizer.

    Args:
      key: the digits.
      lines: of the text, the key's among them.
      at: number of the key's line, from 0.

    Raises:
      ValueError: `at` is not one of the lines.
    """
    if not 0 <= at < lines:
        raise ValueError(f"at={at} must lie in 0..{lines - 1}, the lines of the text")
    text = [FILLER] * lines
    text[at] = KEY_LINE.format(key=key)
    return PREFIX + "".join(text) + SUFFIX


def line_at(depth: float, lines: int) -> int:
    """Returns the key's line at a depth from 0 (first) to 1 (last), as published."""
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must lie in 0..1")
    return int(depth * (lines - 1))


def passkey(
    length: int = 1024,
    depth: float | None = None,
    random_filler: bool = False,
    answer_only: bool = True,
) -> Task:
    """Retrieves five digits from a long text of one repeated line, asked for at its end.

    Tokens are bytes (ids of the "byte" tokenizer); the five digits of the answer count.

    Args:
      length: as many lines as fit into so many bytes with prefix, question and answer; T is what
        they take up, at most `length`.
      depth: of the key, 0 to 1; None: any line.
      random_filler: the lines are random lower-case letters, new ones in every text, instead of the
        published sentence.
      answer_only: in training, too; False counts every byte there.
    """
    # How many lines fit, and what never changes.
    frame = len(PREFIX) + len(SUFFIX) + 1 + DIGITS
    key_line = len(KEY_LINE.format(key="0" * DIGITS))
    lines = 1 + (length - frame - key_line) // len(FILLER)
    if lines < 1:
        raise ValueError(f"length={length} must be at least {frame + key_line}: no line fits")
    total = frame + key_line + (lines - 1) * len(FILLER)
    fixed_at = None if depth is None else line_at(depth, lines)
    letters = lambda text: np.frombuffer(text.encode(), np.uint8)
    filler = letters(FILLER * (lines - 1))
    blank = KEY_LINE.format(key="#" * DIGITS)
    places = blank.index("#"), blank.rindex("#") - DIGITS + 1

    def sample(rng: np.random.Generator, rows: int, hard: bool) -> Batch:
        # The key's line and the others.
        repeated = lambda text: np.broadcast_to(text, (rows, len(text)))
        digits = rng.integers(ord("0"), ord("9") + 1, (rows, DIGITS), np.uint8)
        key = repeated(letters(blank)).copy()
        for place in places:
            key[:, place : place + DIGITS] = digits
        body = repeated(filler)
        if random_filler:
            body = rng.integers(ord("a"), ord("z") + 1, body.shape, np.uint8)

        # The key's line is pushed in before the line that had its number.
        at = rng.integers(0, lines, (rows, 1)) if fixed_at is None else fixed_at
        start = np.broadcast_to(at * len(FILLER), (rows, 1))
        column = np.arange(len(filler) + key_line)
        source = np.where(column < start, column, column - key_line)
        inside = (column >= start) & (column < start + key_line)
        source = np.where(inside, len(filler) + column - start, source)
        text = np.take_along_axis(np.concatenate([body, key], axis=1), source, axis=1)

        # The whole row, and which tokens count.
        question = repeated(letters(SUFFIX + " "))
        row = np.concatenate([repeated(letters(PREFIX)), text, question, digits], axis=1)
        weights = np.ones((rows, total - 1), np.float32)
        if hard or answer_only:
            weights[:, :-DIGITS] = 0
        return {
            "tokens": row[:, :-1].astype(np.int32),
            "targets": row[:, 1:].astype(np.int32),
            "weights": weights,
        }

    return Task("passkey", sample, total - 1, ByteTokenizer.vocab_size)


TASKS = {"passkey": passkey}
