"""Tasks with computed answers, against verifiers that compute them another way."""

import bisect
import fractions
import functools

import numpy as np
import pytest

from tilescan.data import tasks
from tilescan.data.tasks import algorithms


def written(task, count=40, hard=False):
    """Rows [count, 1+T] of a task and which of their tokens are asked for."""
    batch = task.rows("train", count, (7,), hard=hard)
    rows = np.concatenate([batch["tokens"][:, :1], batch["targets"]], axis=1)
    asked = np.concatenate([np.zeros((count, 1)), batch["weights"]], axis=1) > 0
    return rows, asked


def test_copy_repeats_its_string_and_asks_for_the_repetition_and_its_end():
    rows, asked = written(tasks.get("copy", max_length=6, alphabet=26))
    seen = set()
    for row, ask in zip(rows.tolist(), asked, strict=True):
        n = row.index(27) - 1
        string = row[1 : n + 1]
        assert row[: 2 * n + 3] == [26, *string, 27, *string, 28]
        assert set(row[2 * n + 3 :]) <= {29}
        assert np.flatnonzero(ask).tolist() == list(range(n + 2, 2 * n + 3))
        seen.add(n)
    assert seen == set(range(1, 7))
    rows, _ = written(tasks.get("copy", max_length=6), hard=True)
    assert (rows[:, 7] == 27).all()


def patience(values):
    """Length of the longest increasing subsequence by patience sorting."""
    piles = []
    for value in values:
        at = bisect.bisect_left(piles, value)
        piles[at : at + 1] = [value]
    return len(piles)


@pytest.mark.parametrize("steps", [True, False])
def test_lis_is_what_patience_sorting_finds(steps):
    n, largest = 9, 20
    rows, asked = written(tasks.get("lis", length=n, largest=largest, steps=steps))
    for row, ask in zip(rows.tolist(), asked, strict=True):
        values = row[1 : n + 1]
        assert row[0] == largest + 1 and row[n + 1] == largest + 2
        assert row[-1] == patience(values)
        assert np.flatnonzero(ask)[0] == n + 2 and ask[n + 2 :].all()
        if steps:
            ends = row[n + 2 : 2 * n + 2]
            assert ends == algorithms.longest_increasing(values)
            assert max(ends) == row[-1]
            assert [max(ends[: i + 1]) for i in range(n)] == [
                patience(values[: i + 1]) for i in range(n)
            ]


def in_field(value: fractions.Fraction) -> int:
    return value.numerator * pow(value.denominator, -1, 11) % 11


def evaluate(text: str) -> int:
    """An expression by Python's own parser, on fractions; their denominators are never 0 mod 11.

    A bracket may be 0 mod 11 as a divisor's numerator only through its own value, so every bracket
    is reduced to a number of the field first.
    """
    while "(" in text:
        close = text.index(")")
        start = text.rindex("(", 0, close)
        inner = text[start + 1 : close]
        operator = next(c for c in inner if c in "+-*/")
        a, b = (fractions.Fraction(part) for part in inner.split(operator))
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[operator]
        text = f"{text[:start]}{in_field(value)}{text[close + 1 :]}"
    return int(text)


@pytest.mark.parametrize("steps", [True, False])
def test_arithmetic_steps_keep_the_value_of_the_expression(steps):
    rows, asked = written(tasks.get("arithmetic", operators=3, steps=steps), count=60)
    values = set()
    for row, ask in zip(rows, asked, strict=True):
        text = "".join(algorithms.SYMBOLS[token] for token in row)
        assert text[0] == "<" and text.rstrip(">") + ">" == text
        parts = text[1:].rstrip(">").split("=")
        assert len(parts) == (4 if steps else 2)
        value = evaluate(parts[0])
        assert all(evaluate(part) == value for part in parts)
        counts = [sum(c in "+-*/" for c in part) for part in parts]
        assert counts == ([3, 2, 1, 0] if steps else [3, 0])
        first = int(np.flatnonzero(row == algorithms.IS)[0])
        assert np.flatnonzero(ask).tolist() == list(range(first + 1, len(row)))
        values.add(value)
    assert len(values) > 5
    operators = set(rows[(rows >= algorithms.PLUS) & (rows <= algorithms.OVER)].tolist())
    assert operators == {algorithms.PLUS, algorithms.MINUS, algorithms.TIMES, algorithms.OVER}


def test_lagged_fibonacci_follows_its_recurrence():
    lag, n = 3, 7
    for steps in (True, False):
        task = tasks.get("lagged_fibonacci", length=n, lag=lag, modulus=11, steps=steps)
        rows, asked = written(task)
        for row, ask in zip(rows.tolist(), asked, strict=True):
            x = row[1 : lag + 1]
            for _ in range(n):
                x.append((x[-1] + x[-lag]) % 11)
            assert row == [11, *x[:lag], 12, *(x[lag:] if steps else x[-1:])]
            assert np.flatnonzero(ask).tolist() == list(range(lag + 2, len(row)))


@pytest.mark.parametrize("every", [True, False])
def test_running_sum_is_the_sum_so_far(every):
    batch = tasks.get("running_sum", length=9, modulus=7, every=every).rows("train", 40, (7,), True)
    for numbers, sums, weights in zip(*batch.values(), strict=True):
        assert [sum(numbers[: i + 1].tolist()) % 7 for i in range(9)] == sums.tolist()
        assert weights.tolist() == ([1] * 9 if every else [0] * 8 + [1])


@functools.cache
def distance(a, b):
    """Levenshtein's distance by its recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0])
    )


@pytest.mark.parametrize("steps", [True, False])
def test_edit_distances_of_all_prefixes(steps):
    n, letters = 4, 5
    task = tasks.get("edit_distance", length=n, alphabet=letters, steps=steps)
    rows, asked = written(task)
    answers = set()
    for row, ask in zip(rows.tolist(), asked, strict=True):
        a, b = tuple(row[1 : n + 1]), tuple(row[n + 2 : 2 * n + 2])
        assert max(a + b) < letters and row[2 * n + 2] == letters + n + 3
        assert row[-1] - letters == distance(a, b)
        assert np.flatnonzero(ask).tolist() == list(range(2 * n + 3, len(row)))
        if steps:
            table = [distance(a[:i], b[:j]) for i in range(1, n + 1) for j in range(1, n + 1)]
            assert [token - letters for token in row[2 * n + 3 : -2]] == table
        answers.add(row[-1])
    assert len(answers) > 2
