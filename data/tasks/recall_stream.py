"""A stream of key-value pairs, some of whose keys come again: recall without an end.

It is the stationary kin of passkey retrieval and MQAR: at every place the same is asked of a model,
so that a loss that grows with the position is the model's doing. For "Stuffed Mamba"
(arXiv 2410.07145), whose models are asked for a passkey at any distance.
"""

from typing import Any

import numpy as np

from tilescan.data.batches import Batch
from tilescan.data.tasks.base import Task


def recall_stream(
    length: int = 32,
    keys: int = 64,
    values: int = 16,
    repeat: float = 0.5,
    blank: float = 0.1,
    window: int = 8,
) -> Task:
    """Recalls values in pairs "key value": a key that comes again has its last value, which counts.

    Keys are tokens 0..keys-1, values keys..keys+values-1, the blank is keys + values; a blank pair
    has two of it. A new pair samples its key and its value: it may give an old key another value.
    A repeated key is that of the pair `lag` pairs ago, with log-uniform lags: up to the whole past
    in training, up to `window` pairs in evaluation, at every position alike.

    Args:
      length: T, even.
      keys, values: how many different ones.
      repeat: share of the pairs that repeat a key.
      blank: share of blank pairs.
      window: longest lag of evaluation, in pairs.

    Raises:
      ValueError: an odd length, a size below 1, or a share outside [0, 1).
    """
    if length < 2 or length % 2:
        raise ValueError(f"length={length} must be even and at least 2")
    if min(keys, values, window) < 1:
        raise ValueError(f"keys={keys}, values={values} and window={window} must be at least 1")
    if not (0 <= repeat < 1 and 0 <= blank < 1):
        raise ValueError(f"repeat={repeat} and blank={blank} must be at least 0 and below 1")

    def sample(rng: np.random.Generator, rows: int, hard: bool) -> Batch:
        row, counts = _pairs(
            rng, rows, length // 2, keys, values, repeat, blank, window if hard else length
        )
        tokens = row.reshape(rows, length).astype(np.int32)
        weights = np.stack([counts, np.zeros_like(counts)], axis=2).reshape(rows, length)
        return {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, axis=1),  # a last key's value is in the row
            "weights": weights.astype(np.float32),
        }

    return Task("recall_stream", sample, length, keys + values + 1)


def distant_recall(
    rng: np.random.Generator,
    rows: int,
    length: int,
    keys: int = 64,
    values: int = 16,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Makes prompts that end with a key that came once, at depth (i + 1/2) / rows of row i.

    Args:
      rng, keys, values, and repeat, blank and window of `options`: as in `recall_stream`; lags are
        those of evaluation.
      rows: how many prompts.
      length: of a prompt, even and at least 4: one blank token, pairs, and the key.

    Returns:
      (tokens [rows, length], the value token to be said next [rows]).
    """
    if length < 4 or length % 2:
        raise ValueError(f"length={length} must be even and at least 4")
    settings = {"repeat": 0.5, "blank": 0.1, "window": 8, **options}
    pairs = length // 2 - 1
    row, _ = _pairs(rng, rows, pairs, keys - 1, values, **settings)
    # The last key of the alphabet is kept for the question, then exchanged for a random one.
    row = np.where(row >= keys - 1, row + 1, row)
    depth = ((np.arange(rows) + 0.5) / rows * pairs).astype(int)
    value = keys + rng.integers(0, values, rows)
    row[np.arange(rows), depth] = np.stack([np.full(rows, keys - 1), value], axis=1)
    other = rng.integers(0, keys, rows)[:, None, None]
    row = np.where(row == keys - 1, -1, row)
    row = np.where(row == other, keys - 1, row)
    row = np.where(row == -1, other, row)
    blank = np.full((rows, 1), keys + values)
    tokens = np.concatenate([blank, row.reshape(rows, 2 * pairs), other[:, 0]], axis=1)
    return tokens.astype(np.int32), value.astype(np.int32)


def _pairs(
    rng: np.random.Generator,
    rows: int,
    pairs: int,
    keys: int,
    values: int,
    repeat: float,
    blank: float,
    window: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples ([rows, pairs, 2] tokens, [rows, pairs] whether the value can be known)."""
    # All chance at once, and the state of each row: last values, keys so far.
    every = np.arange(rows)
    chance, asked = rng.random((2, rows, pairs))
    fresh_key = rng.integers(0, keys, (rows, pairs))
    fresh_value = keys + rng.integers(0, values, (rows, pairs))
    value_of = np.zeros((rows, keys), int)
    past = np.zeros((rows, pairs + 1), int)  # keys so far, blanks left out
    count = np.zeros(rows, int)
    out = np.full((rows, pairs, 2), keys + values)
    known = np.zeros((rows, pairs), bool)

    # Pair after pair, all rows at once.
    for i in range(pairs):
        writes = chance[:, i] >= blank
        again = writes & (chance[:, i] < blank + repeat * (1 - blank)) & (count > 0)
        most = np.minimum(np.maximum(count, 1), window)
        lag = np.minimum(np.exp(asked[:, i] * np.log(most + 1)).astype(int), most)
        key = np.where(again, past[every, np.maximum(count - lag, 0)], fresh_key[:, i])
        value = np.where(again, value_of[every, key], fresh_value[:, i])
        value_of[every[writes], key[writes]] = value[writes]
        past[every, count] = key
        count += writes
        out[writes, i] = np.stack([key, value], axis=1)[writes]
        known[:, i] = again
    return out, known
