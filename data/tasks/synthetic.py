"""Synthetic tasks of recall and memory: what a mixer must find again in its own past.

Sources of the formats:
  induction, associative_recall: Fu et al. 2023 (H3, arXiv 2212.14052, table 2).
  multi_query_recall: Arora et al. 2024 (Zoology, arXiv 2312.04927, appendix C).
  copying: Arjovsky et al. 2016 (arXiv 1511.06464, section 4.1), as S4 uses it.
  selective_copying: Gu and Dao 2023 (Mamba, arXiv 2312.00752, section 4.1.1).
"""

import numpy as np

from tilescan.data.batches import Batch
from tilescan.data.tasks.base import Task, language_rows


def _check(minimum: int, **values: int) -> None:
    """Raises ValueError for an option below its minimum."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")


def induction(length: int = 30, vocab_size: int = 20, answer_only: bool = False) -> Task:
    """Recalls a letter: letters with one "=>" among them, "=>" again, what followed the first one.

    Training counts every position, as published (`answer_only`: the answer alone); evaluation the
    answer. "=>" is the token vocab_size - 2; vocab_size - 1 is reserved and never occurs.
    """
    _check(3, length=length)
    _check(4, vocab_size=vocab_size)
    LETTERS = vocab_size - 2
    TRIGGER = LETTERS

    def sample(rng: np.random.Generator, rows: int, hard: bool) -> Batch:
        row = rng.integers(0, LETTERS, (rows, length + 2))
        at = rng.integers(0, length - 2, (rows, 1))
        np.put_along_axis(row, at, TRIGGER, axis=1)
        row[:, -2] = TRIGGER
        row[:, -1:] = np.take_along_axis(row, at + 1, axis=1)
        return language_rows(row, _last_or_all(row, hard or answer_only))

    return Task("induction", sample, length + 1, vocab_size)


def associative_recall(length: int = 40, vocab_size: int = 20, answer_only: bool = False) -> Task:
    """Recalls a value: key value key value ... => key, its value. Keys keep theirs through a row.

    Keys are the first half of the letters, values the second; a row has length // 2 pairs, sampled
    with replacement, and asks for one of the keys that occurred. What counts and the special tokens
    are as in `induction`.
    """
    _check(2, length=length)
    _check(4, vocab_size=vocab_size)
    LETTERS = vocab_size - 2
    KEYS, PAIRS, ASK = LETTERS // 2, length // 2, LETTERS

    def sample(rng: np.random.Generator, rows: int, hard: bool) -> Batch:
        value_of = rng.integers(KEYS, LETTERS, (rows, KEYS))
        keys = rng.integers(0, KEYS, (rows, PAIRS))
        occurs = np.zeros((rows, KEYS), bool)
        np.put_along_axis(occurs, keys, True, axis=1)
        asked = np.argmax(rng.random((rows, KEYS)) * occurs, axis=1)[:, None]
        row = np.full((rows, 2 * PAIRS + 3), ASK)
        row[:, 0 : 2 * PAIRS : 2] = keys
        row[:, 1 : 2 * PAIRS : 2] = np.take_along_axis(value_of, keys, axis=1)
        row[:, -2:-1] = asked
        row[:, -1:] = np.take_along_axis(value_of, asked, axis=1)
        return language_rows(row, _last_or_all(row, hard or answer_only))

    return Task("associative_recall", sample, 2 * PAIRS + 2, vocab_size)


def _last_or_all(row: np.ndarray, last: bool) -> np.ndarray:
    """Returns which tokens count: the last one of each row, or all."""
    return np.broadcast_to(np.arange(row.shape[1]) >= (row.shape[1] - 1 if last else 0), row.shape)


def multi_query_recall(
    length: int = 64,
    pairs: int = 8,
    vocab_size: int = 8192,
    power: float = 0.01,
    passes: int = 1,
    random_fill: bool = True,
) -> Task:
    """Recalls many values (MQAR): pairs of key and value, then each key again, asking for its own.

    The value is the target at the key's second place and is not written after it. The places are
    sampled without replacement, the place g-th after the pairs with weight g^(power - 1): recent
    keys more often. Keys are tokens 1..vocab_size // 2 - 1, values those from vocab_size // 2 on.

    Args:
      length: T, even.
      pairs: of key and value in a row, all keys and all values different.
      passes: how often the pairs are written before the questions (Arora et al. 2024, "just read
        twice").
      random_fill: fill the free places with random tokens; else with token 0.
    """
    _check(1, pairs=pairs, passes=passes)
    context = 2 * pairs * passes
    if length % 2 or length < context + 2 * pairs:
        raise ValueError(
            f"length={length} must be even and at least {context + 2 * pairs}: {pairs} pairs, "
            f"{passes} times, then room for {pairs} questions"
        )
    if vocab_size <= length or vocab_size // 2 - 1 < pairs:
        raise ValueError(
            f"vocab_size={vocab_size} must be above length={length} and at least "
            f"{2 * pairs + 2} for pairs={pairs}"
        )
    HALF = vocab_size // 2
    space = (length - context) // 2
    weights = np.arange(1, space + 1) ** (power - 1.0)

    def sample(rng: np.random.Generator, rows: int, hard: bool) -> Batch:
        keys = 1 + _choose(rng, rows, np.ones(HALF - 1), pairs)
        values = HALF + _choose(rng, rows, np.ones(vocab_size - HALF), pairs)
        both = np.stack([keys, values], axis=2).reshape(rows, 2 * pairs)
        at = context + 2 * _choose(rng, rows, weights, pairs)
        tokens = rng.integers(0, vocab_size, (rows, length)) if random_fill else 0
        tokens = np.broadcast_to(tokens, (rows, length)).astype(np.int32)
        tokens[:, :context] = np.tile(both, (1, passes))
        np.put_along_axis(tokens, at, keys, axis=1)
        targets, counts = np.zeros_like(tokens), np.zeros((rows, length), np.float32)
        np.put_along_axis(targets, at, values, axis=1)
        np.put_along_axis(counts, at, 1.0, axis=1)
        return {"tokens": tokens, "targets": targets, "weights": counts}

    return Task("multi_query_recall", sample, length, vocab_size)


def _choose(rng: np.random.Generator, rows: int, weights: np.ndarray, count: int) -> np.ndarray:
    """Samples [rows, count] different indices of `weights`, one after another by weight.

    The smallest of exponential variables over their weights come in just that order (Efraimidis
    and Spirakis 2006).
    """
    waits = rng.standard_exponential((rows, len(weights))) / weights
    if count < len(weights):
        chosen = np.argpartition(waits, count - 1, axis=1)[:, :count]
    else:
        chosen = np.broadcast_to(np.arange(count), (rows, count))
    order = np.argsort(np.take_along_axis(waits, chosen, axis=1), axis=1)
    return np.take_along_axis(chosen, order, axis=1)


def _memorize(name: str, length: int, memorize: int, vocab_size: int, scattered: bool) -> Task:
    """Makes `copying`, or `selective_copying` if the letters are scattered."""
    _check(1, memorize=memorize)
    _check(4, vocab_size=vocab_size)
    if length < memorize:
        raise ValueError(f"length={length} has no room for memorize={memorize} tokens")
    BLANK, MARKER = 0, vocab_size - 1

    def sample(rng: np.random.Generator, rows: int, hard: bool) -> Batch:
        letters = rng.integers(1, MARKER, (rows, memorize))
        at = np.broadcast_to(np.arange(memorize), (rows, memorize))
        if scattered:
            at = np.sort(_choose(rng, rows, np.ones(length), memorize), axis=1)
        tokens = np.full((rows, length + memorize), BLANK, np.int32)
        np.put_along_axis(tokens, at, letters, axis=1)
        tokens[:, length:] = MARKER
        targets = np.full_like(tokens, BLANK)
        targets[:, length:] = letters
        weights = np.zeros(tokens.shape, np.float32)
        weights[:, length:] = 1.0
        return {"tokens": tokens, "targets": targets, "weights": weights}

    return Task(name, sample, length + memorize, vocab_size)


def copying(length: int = 110, memorize: int = 10, vocab_size: int = 10) -> Task:
    """Repeats letters after blanks: at the markers that follow, the letters in order.

    Args:
      length: places before the markers: `memorize` letters and length - memorize blanks (token 0).
      memorize: letters, of 1..vocab_size-2, and markers (token vocab_size - 1).
    """
    return _memorize("copying", length, memorize, vocab_size, scattered=False)


def selective_copying(length: int = 4096, memorize: int = 16, vocab_size: int = 16) -> Task:
    """Repeats letters as in `copying`, but they lie anywhere among the blanks."""
    return _memorize("selective_copying", length, memorize, vocab_size, scattered=True)


def delay(length: int = 1024, lag: int = 256, vocab_size: int = 16) -> Task:
    """Repeats random tokens: at each place the token `lag` places before is the target."""
    _check(1, lag=lag)
    _check(2, vocab_size=vocab_size)
    if lag >= length:
        raise ValueError(f"lag={lag} must be below length={length}")

    def sample(rng: np.random.Generator, rows: int, hard: bool) -> Batch:
        tokens = rng.integers(0, vocab_size, (rows, length), dtype=np.int32)
        targets = np.zeros_like(tokens)
        targets[:, lag:] = tokens[:, :-lag]
        weights = np.zeros(tokens.shape, np.float32)
        weights[:, lag:] = 1.0
        return {"tokens": tokens, "targets": targets, "weights": weights}

    return Task("delay", sample, length, vocab_size)


TASKS = {
    "induction": induction,
    "associative_recall": associative_recall,
    "multi_query_recall": multi_query_recall,
    "copying": copying,
    "selective_copying": selective_copying,
    "delay": delay,
}
