"""ListOps, against an independent reader and an independent, recursive generator."""

import itertools
import random
import statistics

import numpy as np
import pytest

from tilescan.data import tasks
from tilescan.data.tasks import listops

SMALL = listops.Rules(max_depth=5, max_args=4, min_length=10, max_length=60)


def read(symbols):
    """A tree of (operator, arguments) and digits out of a list of symbols, which is consumed."""
    symbol = symbols.pop(0)
    if symbol.isdigit():
        return int(symbol)
    arguments = []
    while symbols[0] != "]":
        arguments.append(read(symbols))
    symbols.pop(0)
    return symbol, arguments


def value(tree):
    if isinstance(tree, int):
        return tree
    operator, arguments = tree
    values = [value(argument) for argument in arguments]
    return {
        "[MIN": min(values),
        "[MAX": max(values),
        "[MED": int(statistics.median(values)),
        "[SM": sum(values) % 10,
    }[operator]


def depth(tree):
    return 1 if isinstance(tree, int) else 1 + max(depth(argument) for argument in tree[1])


def nodes(tree):
    yield tree
    if not isinstance(tree, int):
        for argument in tree[1]:
            yield from nodes(argument)


@pytest.mark.parametrize(("rules", "count"), [(SMALL, 400), (listops.Rules(), 40)])
def test_values_and_shapes_of_trees(rules, count):
    trees, seen = [], set()
    for tokens, answer in itertools.islice(listops.examples(1, rules), count):
        symbols = [listops.SYMBOLS[token] for token in tokens]
        assert rules.min_length < len(symbols) < rules.max_length
        tree = read(symbols)
        assert not symbols and value(tree) == answer == listops.evaluate(tokens)
        assert depth(tree) <= rules.max_depth
        trees.append(tree)
        seen.add(tokens.tobytes())
    assert len(seen) == count
    every = [node for tree in trees for node in nodes(tree)]
    operators = [node for node in every if not isinstance(node, int)]
    assert {len(arguments) for _, arguments in operators} == set(range(2, rules.max_args + 1))
    assert {node for node in every if isinstance(node, int)} == set(range(10))
    assert {operator for operator, _ in operators} == {"[MIN", "[MAX", "[MED", "[SM"}


def recursive_tree(rng, level, rules):
    """(tree, tokens), drawn node by node as the published rules say."""
    if level == rules.max_depth or rng.random() > 0.25:
        return rng.randrange(10), 1
    parts = [recursive_tree(rng, level + 1, rules) for _ in range(rng.randint(2, rules.max_args))]
    operator = rng.choice(["[MIN", "[MAX", "[MED", "[SM"])
    return (operator, [tree for tree, _ in parts]), 2 + sum(size for _, size in parts)


def test_the_distribution_is_that_of_drawing_node_by_node():
    rng, count = random.Random(0), 3000

    def recursive():
        while True:
            tree, size = recursive_tree(rng, 1, SMALL)
            if SMALL.min_length < size < SMALL.max_length:
                yield tree, size

    slow = list(itertools.islice(recursive(), count))
    fast = list(itertools.islice(listops.examples(5, SMALL), count))
    fast = [(read([listops.SYMBOLS[t] for t in tokens]), len(tokens)) for tokens, _ in fast]

    def figures(trees):
        sizes = np.asarray([size for _, size in trees])
        answers = np.bincount([value(tree) for tree, _ in trees], minlength=10) / count
        depths = np.asarray([depth(tree) for tree, _ in trees])
        quantiles = np.quantile(sizes, [0.1, 0.5, 0.9])
        return sizes.mean(), depths.mean(), answers, quantiles

    (size, deep, answers, quantiles), other = figures(fast), figures(slow)
    assert size == pytest.approx(other[0], abs=1.2)  # four standard errors
    assert deep == pytest.approx(other[1], abs=0.05)
    np.testing.assert_allclose(answers, other[2], atol=0.035)
    np.testing.assert_allclose(quantiles, other[3], atol=3)


def test_the_evaluator_refuses_what_is_no_list():
    one, two = listops.ZERO + 1, listops.ZERO + 2
    assert listops.evaluate([listops.MED, one, two, listops.CLOSE]) == 1
    assert listops.evaluate([listops.SM, *[listops.ZERO + 9] * 3, listops.CLOSE]) == 7
    for wrong in ([listops.MIN, one], [listops.CLOSE], [one, two], [listops.MIN, listops.CLOSE]):
        with pytest.raises(ValueError, match="list"):
            listops.evaluate(wrong)


def test_the_task_pads_and_keeps_its_splits_apart():
    options = dict(examples=(50, 20, 20), min_length=10, max_length=60, max_depth=5)
    task = tasks.get("listops", **options)
    datasets = task.datasets(batch_size=10, seed=0)
    rows = {}
    for split in tasks.SPLITS:
        steps = datasets[split].steps or 5
        rows[split] = set()
        for step in range(steps):
            batch = datasets[split].batch(step)
            assert batch["tokens"].shape == batch["segment_ids"].shape == (10, 60)
            for tokens, real, label in zip(
                batch["tokens"], batch["segment_ids"], batch["labels"], strict=True
            ):
                length = real.sum()
                assert real[:length].all() and not tokens[length:].any()
                assert listops.evaluate(tokens[:length]) == label
                rows[split].add(tokens.tobytes())
    assert [len(rows[split]) for split in tasks.SPLITS] == [50, 20, 20]
    assert len(set.union(*rows.values())) == 90
    other = tasks.get("listops", data_seed=1, **options).datasets(batch_size=10, seed=0)
    assert not rows["test"] & {row.tobytes() for row in other["test"].batch(0)["tokens"]}


def test_rules_that_keep_nothing_are_refused():
    with pytest.raises(ValueError, match="max_depth and max_args must be at least 2"):
        tasks.get("listops", max_args=1)
    with pytest.raises(ValueError, match="min_length must be"):
        tasks.get("listops", min_length=60, max_length=61)
    with pytest.raises(ValueError, match="three numbers of at least 1"):
        tasks.get("listops", examples=(10, 10))
    never = tasks.get("listops", max_depth=2, max_args=3, min_length=100, max_length=200)
    with pytest.raises(ValueError, match="hardly any tree"):
        never.datasets(batch_size=1, seed=0)
