"""Tasks whose answer an algorithm computes: copying, and dynamic programming with written steps.

Formats: Jelassi et al. 2024 (arXiv 2402.01032) for copying; Feng et al. 2023 (arXiv 2305.15408)
for the longest increasing subsequence and arithmetic.
"""

from collections.abc import Sequence

import numpy as np

from tilescan.data.batches import Batch
from tilescan.data.tasks.base import Task, language_rows


def _positive(**values: int) -> None:
    """Raises ValueError for an option below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def copy(max_length: int = 20, alphabet: int = 26) -> Task:
    """Copies: <BOS> string <COPY> string <EOS>; lengths uniform in 1..max_length, or max_length."""
    _positive(max_length=max_length, alphabet=alphabet)
    BOS, COPY, EOS, PAD = range(alphabet, alphabet + 4)

    def sample(rng: np.random.Generator, rows: int, hard: bool) -> Batch:
        n = np.full(rows, max_length) if hard else rng.integers(1, max_length + 1, rows)
        n = n[:, None]
        letters = rng.integers(0, alphabet, (rows, max_length))
        at = np.broadcast_to(np.arange(2 * max_length + 3), (rows, 2 * max_length + 3))
        letter = lambda index: np.take_along_axis(
            letters, np.clip(index, 0, max_length - 1), axis=1
        )
        row = np.select(
            [at == 0, at <= n, at == n + 1, at <= 2 * n + 1, at == 2 * n + 2],
            [BOS, letter(at - 1), COPY, letter(at - n - 2), EOS],
            PAD,
        )
        return language_rows(row, (at > n + 1) & (at <= 2 * n + 2))

    return Task("copy", sample, 2 * max_length + 2, alphabet + 4)


def longest_increasing(values: Sequence[int]) -> list[int]:
    """Returns the length of the longest increasing subsequence that ends at each value."""
    best: list[int] = []
    for i, value in enumerate(values):
        best.append(1 + max((best[j] for j in range(i) if values[j] < value), default=0))
    return best


def lis(length: int = 20, largest: int = 150, steps: bool = True) -> Task:
    """Finds the longest increasing subsequence: values = ends of each = longest.

    With steps the length at every value is written before the answer.
    """
    _positive(length=length, largest=largest)
    if length > largest:
        raise ValueError(f"length={length} needs largest={largest} to be as large")
    BOS, EQUALS = largest + 1, largest + 2

    def sample(rng: np.random.Generator, rows: int, hard: bool) -> Batch:
        values = rng.integers(1, largest + 1, (rows, length))
        ends = np.ones((rows, length), int)
        for i in range(1, length):  # over positions; all rows at once
            before = np.where(values[:, :i] < values[:, i : i + 1], ends[:, :i], 0)
            ends[:, i] = 1 + before.max(axis=1)
        mark = lambda token: np.full((rows, 1), token)
        parts = [mark(BOS), values, mark(EQUALS)]
        asked = len(parts)
        parts += [ends, mark(EQUALS)] if steps else []
        parts.append(ends.max(axis=1, keepdims=True))
        row = np.concatenate(parts, axis=1)
        start = sum(p.shape[1] for p in parts[:asked])
        return language_rows(row, np.broadcast_to(np.arange(row.shape[1]) >= start, row.shape))

    return Task("lis", sample, 1 + length + (length + 1 if steps else 0) + 1, largest + 3)


MODULUS = 11
PLUS, MINUS, TIMES, OVER, OPEN, CLOSE, IS, START, END = range(MODULUS, MODULUS + 9)
SYMBOLS = [*map(str, range(MODULUS)), "+", "-", "*", "/", "(", ")", "=", "<", ">"]


def _apply(a: int, operator: int, b: int) -> int:
    """Computes one operation in the field of MODULUS elements."""
    if operator == PLUS:
        return (a + b) % MODULUS
    if operator == MINUS:
        return (a - b) % MODULUS
    if operator == TIMES:
        return a * b % MODULUS
    return a * pow(b, -1, MODULUS) % MODULUS


def _expand(rng: np.random.Generator, value: int) -> list[int]:
    """Samples (a operator b) with this value; divisors are not zero."""
    operator = int(rng.integers(PLUS, OVER + 1))
    if operator in (PLUS, MINUS):
        b = int(rng.integers(MODULUS))
        a = (value - b if operator == PLUS else value + b) % MODULUS
    elif operator == OVER:
        b = int(rng.integers(1, MODULUS))
        a = value * b % MODULUS
    elif value == 0:
        a, b = (int(rng.integers(MODULUS)), 0)
        a, b = (a, b) if rng.integers(2) else (b, a)
    else:
        b = int(rng.integers(1, MODULUS))
        a = value * pow(b, -1, MODULUS) % MODULUS
    return [OPEN, a, operator, b, CLOSE]


def simplify(tokens: list[int]) -> list[int]:
    """Computes the leftmost innermost bracket."""
    close = tokens.index(CLOSE)
    a, operator, b = tokens[close - 3 : close]
    return [*tokens[: close - 4], _apply(a, operator, b), *tokens[close + 1 :]]


def expression(rng: np.random.Generator, operators: int) -> list[int]:
    """Samples an expression in the field of 11 elements, grown from its value leaf by leaf."""
    tokens = [int(rng.integers(MODULUS))]
    for _ in range(operators):
        leaves = [i for i, token in enumerate(tokens) if token < MODULUS]
        at = int(rng.choice(leaves))
        tokens[at : at + 1] = _expand(rng, tokens[at])
    return tokens


def arithmetic(operators: int = 4, steps: bool = True) -> Task:
    """Evaluates < expression = ... = value >, one operator less at each "=", or the value alone."""
    _positive(operators=operators)
    lengths = [1 + 4 * n for n in range(operators, -1, -1)]
    length = 2 + sum(lengths) + operators if steps else 2 + lengths[0] + 2

    def sample(rng: np.random.Generator, rows: int, hard: bool) -> Batch:
        made = np.full((rows, length), END)
        for row in made:
            tokens = expression(rng, operators)
            written = [START, *tokens]
            for _ in range(operators):
                tokens = simplify(tokens)
                if steps or len(tokens) == 1:
                    written += [IS, *tokens]
            row[: len(written)] = written
        answers = np.cumsum(made == IS, axis=1) > 0
        answers &= ~((made == IS) & (np.cumsum(made == IS, axis=1) == 1))
        return language_rows(made, answers)

    return Task("arithmetic", sample, length - 1, len(SYMBOLS))


def lagged_fibonacci(length: int = 16, lag: int = 4, modulus: int = 11, steps: bool = True) -> Task:
    """Continues x_i = x_{i-1} + x_{i-lag} mod m: steps look at the last `lag` numbers alone.

    Row: <BOS> the first `lag` numbers = the next `length` (with steps) or the last of them.
    """
    _positive(length=length, lag=lag)
    if modulus < 2:
        raise ValueError(f"modulus={modulus} must be at least 2")
    BOS, EQUALS = modulus, modulus + 1

    def sample(rng: np.random.Generator, rows: int, hard: bool) -> Batch:
        x = np.zeros((rows, lag + length), int)
        x[:, :lag] = rng.integers(0, modulus, (rows, lag))
        for i in range(lag, lag + length):  # over positions; all rows at once
            x[:, i] = (x[:, i - 1] + x[:, i - lag]) % modulus
        mark = lambda token: np.full((rows, 1), token)
        written = x[:, lag:] if steps else x[:, -1:]
        row = np.concatenate([mark(BOS), x[:, :lag], mark(EQUALS), written], axis=1)
        return language_rows(row, np.broadcast_to(np.arange(row.shape[1]) > lag + 1, row.shape))

    return Task("lagged_fibonacci", sample, 1 + lag + (length if steps else 1), modulus + 2)


def running_sum(length: int = 64, modulus: int = 7, every: bool = True) -> Task:
    """Sums the numbers so far, mod m, at each place (`every`; else at the last).

    The sums are targets and are not read: a state of log2(m) bits solves it, step by step.
    """
    _positive(length=length)
    if modulus < 2:
        raise ValueError(f"modulus={modulus} must be at least 2")

    def sample(rng: np.random.Generator, rows: int, hard: bool) -> Batch:
        numbers = rng.integers(0, modulus, (rows, length), dtype=np.int32)
        weights = np.full(numbers.shape, float(every), np.float32)
        weights[:, -1] = 1.0
        sums = np.cumsum(numbers, axis=1, dtype=np.int32) % modulus
        return {"tokens": numbers, "targets": sums, "weights": weights}

    return Task("running_sum", sample, length, modulus)


def edit_distance(length: int = 6, alphabet: int = 8, steps: bool = True) -> Task:
    """Finds an edit distance: <BOS> a | b = those of all prefixes, a's outermost, = that of a, b.

    Insertions, deletions and substitutions cost 1. Without steps the answer alone is written. b has
    at each place a's letter or a random one.
    """
    _positive(length=length, alphabet=alphabet)
    # Letters, then numbers 0..length, then marks.
    NUMBER = alphabet
    BOS, BAR, EQUALS = range(NUMBER + length + 1, NUMBER + length + 4)

    def sample(rng: np.random.Generator, rows: int, hard: bool) -> Batch:
        a, b = rng.integers(0, alphabet, (2, rows, length))
        b = np.where(rng.random(b.shape) < 0.5, a, b)
        d = np.zeros((rows, length + 1, length + 1), int)
        d[:, 0] = np.arange(length + 1)
        d[:, :, 0] = np.arange(length + 1)
        for i in range(1, length + 1):  # over positions; all rows at once
            for j in range(1, length + 1):
                swapped = d[:, i - 1, j - 1] + (a[:, i - 1] != b[:, j - 1])
                d[:, i, j] = np.minimum(1 + np.minimum(d[:, i - 1, j], d[:, i, j - 1]), swapped)
        mark = lambda token: np.full((rows, 1), token)
        asked = [mark(BOS), a, mark(BAR), b, mark(EQUALS)]
        table = NUMBER + d[:, 1:, 1:].reshape(rows, -1)
        written = [table, mark(EQUALS), table[:, -1:]] if steps else [table[:, -1:]]
        row = np.concatenate([*asked, *written], axis=1)
        first = 2 * length + 3
        return language_rows(row, np.broadcast_to(np.arange(row.shape[1]) >= first, row.shape))

    seq_len = 2 * length + 3 + (length**2 + 1 if steps else 0)
    return Task("edit_distance", sample, seq_len, NUMBER + length + 4)


TASKS = {
    "copy": copy,
    "lis": lis,
    "arithmetic": arithmetic,
    "lagged_fibonacci": lagged_fibonacci,
    "running_sum": running_sum,
    "edit_distance": edit_distance,
}
