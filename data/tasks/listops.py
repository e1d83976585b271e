"""ListOps of the Long Range Arena: nested lists of MIN, MAX, MED and SM (sum mod 10) to evaluate.

Nangia and Bowman 2018 (arXiv 1804.06028); Tay et al. 2021 (arXiv 2011.04006), whose generator's
rules are these: a node above the greatest depth is an operator with probability 1/4, else a digit;
operators and digits are uniform, an operator has 2 to 10 arguments; the median of an even number is
the mean of the middle two, rounded down. Trees are kept if they have more than 500 and fewer than
2000 tokens, each once; 96,000 are for training, 2,000 for validation, 2,000 for test. The published
generator has no seed, so that its files are one sample of many and these are another.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from tilescan.data.batches import Batch
from tilescan.data.tasks.base import SPLITS, FixedTask, padded_rows

SYMBOLS = ["<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]"]
PAD, ZERO, MIN, MAX, MED, SM, CLOSE = 0, 1, 11, 12, 13, 14, 15
OPERATOR_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Rules:
    """What trees there are; the defaults are the Long Range Arena's."""

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500  # excluded, as is max_length
    max_length: int = 2000

    def __post_init__(self):
        if self.max_depth < 2 or self.max_args < 2:
            raise ValueError(f"max_depth and max_args must be at least 2: {self}")
        if not 0 <= self.min_length < self.max_length - 1:
            raise ValueError(f"min_length must be 0 or more and below max_length - 1: {self}")


@dataclasses.dataclass
class _Level:
    """Nodes of one depth, of many trees; the children of a node stand together, in its order.

    Attributes:
      token: ZERO + digit, or the operator.
      parent: index in the level above.
      tree: number of the tree.
    """

    token: np.ndarray
    parent: np.ndarray
    tree: np.ndarray

    @property
    def operator(self) -> np.ndarray:
        return self.token >= MIN


def _grow(rng: np.random.Generator, trees: int, rules: Rules) -> tuple[list[_Level], np.ndarray]:
    """Samples (levels, lengths [trees]) of random trees whose root is an operator.

    A tree that is too long already does not grow on.
    """
    roots = np.arange(trees)
    levels = [_Level(rng.integers(MIN, CLOSE, trees), np.zeros(trees, int), roots)]
    lengths = np.full(trees, 2)
    for depth in range(2, rules.max_depth + 1):
        above = levels[-1]
        growing = np.flatnonzero(above.operator & (lengths[above.tree] < rules.max_length))
        count = rng.integers(2, rules.max_args + 1, len(growing))
        parent = np.repeat(growing, count)
        token = ZERO + rng.integers(0, 10, len(parent))
        if depth < rules.max_depth:
            operator = rng.random(len(parent)) <= OPERATOR_SHARE
            token[operator] = rng.integers(MIN, CLOSE, operator.sum())
        levels.append(_Level(token, parent, above.tree[parent]))
        lengths += np.bincount(levels[-1].tree, weights=1 + (token >= MIN), minlength=trees).astype(
            int
        )
    return levels, lengths


def _select(levels: list[_Level], kept: np.ndarray) -> list[_Level]:
    """Returns the nodes of the trees for which `kept` is true, trees numbered anew."""
    number, chosen, new_index = np.cumsum(kept) - 1, [], np.zeros(0, int)
    for level in levels:
        mask = kept[level.tree]
        parent = level.parent[mask]
        if chosen:
            parent = new_index[parent]
        chosen.append(_Level(level.token[mask], parent, number[level.tree[mask]]))
        new_index = np.cumsum(mask) - 1
    return chosen


def _first_children(above: _Level, below: _Level) -> tuple[np.ndarray, np.ndarray]:
    """Returns (index of each operator's first child, how many children it has)."""
    count = np.bincount(below.parent, minlength=len(above.token))[above.operator]
    return np.cumsum(count) - count, count


def _values(levels: list[_Level]) -> np.ndarray:
    """Computes the value of each tree, from the leaves up."""
    value = levels[-1].token - ZERO
    for above, below in zip(levels[-2::-1], levels[:0:-1], strict=True):
        first, count = _first_children(above, below)
        result = above.token - ZERO
        if len(first):
            ordered = value[np.lexsort((value, below.parent))]
            middle = ordered[first + (count - 1) // 2] + ordered[first + count // 2]
            candidates = {
                MIN: ordered[first],
                MAX: ordered[first + count - 1],
                MED: middle // 2,
                SM: np.add.reduceat(value, first) % 10,
            }
            token = above.token[above.operator]
            result[above.operator] = np.select(
                [token == k for k in candidates], candidates.values()
            )
        value = result
    return value


def _written(levels: list[_Level], trees: int) -> list[np.ndarray]:
    """Writes each tree as tokens, operator first and "]" last."""
    # Tokens of each subtree, from the leaves up.
    sizes = [np.ones(len(levels[-1].token), int)]
    for above, below in zip(levels[-2::-1], levels[:0:-1], strict=True):
        inside = np.bincount(below.parent, weights=sizes[0], minlength=len(above.token)).astype(int)
        sizes.insert(0, np.where(above.operator, 2 + inside, 1))

    # Where each subtree starts, from the roots down.
    ends = np.cumsum(sizes[0])
    text = np.zeros(sizes[0].sum(), np.uint8)
    start = ends - sizes[0]
    for depth, (level, size) in enumerate(zip(levels, sizes, strict=True)):
        if depth:
            # After the parent's own token and the siblings before.
            before = np.cumsum(size) - size
            first, count = _first_children(levels[depth - 1], level)
            start = start[level.parent] + 1 + before - np.repeat(before[first], count)
        text[start] = level.token
        text[(start + size - 1)[level.operator]] = CLOSE
    return np.split(text, ends[:-1]) if trees else []


def examples(seed: int, rules: Rules | None = None) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (tokens uint8 [n], value) of different trees without end; the same ones for a seed."""
    rules = rules or Rules()
    seen: set[bytes] = set()
    block = 0
    while True:
        levels, lengths = _grow(np.random.default_rng((seed, block)), 2000, rules)
        kept = (lengths > rules.min_length) & (lengths < rules.max_length)
        levels = _select(levels, kept)
        written = _written(levels, int(kept.sum()))
        for tokens, value in zip(written, _values(levels).tolist(), strict=True):
            key = tokens.tobytes()
            if key not in seen:
                seen.add(key)
                yield tokens, value
        block += 1
        if block > 20 and len(seen) < block:
            raise ValueError(f"hardly any tree has a length that is kept: {rules}")


@functools.lru_cache(maxsize=2)
def _splits(seed: int, rules: Rules, counts: tuple[int, ...]) -> dict[str, Batch]:
    """Makes the examples of the three splits, so many each."""
    print(f"making {sum(counts)} lists of ListOps", file=sys.stderr, flush=True)
    stream = examples(seed, rules)
    splits = {}
    for split, count in zip(SPLITS, counts, strict=True):
        tokens, labels = np.empty(count, object), np.empty(count, np.uint8)
        for i in range(count):
            tokens[i], labels[i] = next(stream)
        splits[split] = {"tokens": tokens, "labels": labels}
    return splits


def listops(
    examples: Sequence[int] = (96_000, 2_000, 2_000),
    max_depth: int = 10,
    max_args: int = 10,
    min_length: int = 500,
    max_length: int = 2000,
    data_seed: int = 0,
) -> FixedTask:
    """Evaluates nested MIN, MAX, MED and SM of digits: ten classes, the values; T = max_length.

    Made at first use, a few thousand a second, and kept in memory.

    Args:
      examples: how many for training, validation and test.
      max_depth, max_args, min_length, max_length: see `Rules`.
      data_seed: which trees; not the training seed, so that seeds compare.
    """
    rules = Rules(max_depth, max_args, min_length, max_length)
    counts = tuple(int(count) for count in examples)
    if len(counts) != 3 or min(counts) < 1:
        raise ValueError(f"examples={examples} must be three numbers of at least 1")

    def present(arrays: Batch) -> Batch:
        rows = padded_rows(arrays["tokens"], max_length, PAD)
        return {**rows, "labels": arrays["labels"].astype(np.int32)}

    load = functools.partial(_splits, data_seed, rules, counts)
    return FixedTask("listops", load, present, max_length, len(SYMBOLS), 10)


def evaluate(tokens: Sequence[int] | np.ndarray) -> int:
    """Computes the value of a written tree, with a stack.

    Raises:
      ValueError: it is not a tree.
    """
    stack: list[list[int]] = [[]]
    for token in tokens:
        if ZERO <= token < MIN:
            stack[-1].append(int(token) - ZERO)
        elif MIN <= token < CLOSE:
            stack.append([int(token)])
        elif token == CLOSE and len(stack) > 1 and len(stack[-1]) > 1:
            operator, *values = stack.pop()
            stack[-1].append(_apply(operator, values))
        else:
            raise ValueError(f"token {token} has no place there: the list is not well formed")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError("the tokens are not one whole list")
    return stack[0][0]


def _apply(operator: int, values: list[int]) -> int:
    """Computes one operator of its arguments."""
    if operator == MIN:
        return min(values)
    if operator == MAX:
        return max(values)
    if operator == MED:
        return int(np.median(values))
    return sum(values) % 10


TASKS = {"listops": listops}
