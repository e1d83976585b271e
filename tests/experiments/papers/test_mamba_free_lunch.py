"""The copying paper: what its claims say of numbers."""

import collections

import pytest

from tilescan.data import tasks
from tilescan.experiments.harness import registry as papers
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.measurements import training as measurements
from tilescan.experiments.papers.mamba_free_lunch import claims


def test_state_size_counts_every_layer():
    keys = {
        "model.pattern": ("mamba2",),
        "model.repeats": 3,
        "model.d_model": 16,
        "model.mixers.mamba2.state_dim": 4,
        "model.mixers.mamba2.head_dim": 8,
    }
    conv = 3 * (32 + 2 * 4)  # the last 3 inputs of x, B and C
    assert measurements.state_size(keys) == 3 * (32 * 4 + conv)


def record(model, seed, exact, n_max=8, halfway=0.0, params=1000, accuracy=None, **settings):
    """`halfway` is right after 100 examples, `exact` after 1000; six validations of letters."""
    curve = [0.0, halfway, *[exact] * 5]
    result = {
        "examples": [0, 100, 200, 400, 600, 800, 1000],
        "validation_exact": curve,
        "validation_accuracy": accuracy or curve,
        "test_exact": exact,
        "test_accuracy": exact,
        "test_loss": 1.0,
        "train_loss": 1.0,
        "params": params,
    }
    train = {"train.steps": 100, "data.batch_size": 10, "optimizer.decay_steps": 10}
    settings = {"kind": "copy", "model": model, "n_max": n_max, "train": train, **settings}
    settings.setdefault("state_numbers", None if model.startswith("T") else int(model[-1]))
    cell = f"{settings['kind']}-{model}-{n_max}-{seed}-{settings.get('label', '')}"
    return Record("mamba_free_lunch", cell, "", settings, seed, result, 1.0, {})


def claim(records, name):
    return next(c for c in claims.claims(Records(records)) if c.name == name)


def status(records, name):
    return claim(records, name).status


def test_fewer_examples_compares_the_fastest_mamba_with_the_slowest_transformer():
    name = "attention copies with fewer examples"
    made = [record("Transformer (rotary)", seed, 1.0, halfway=0.95) for seed in (0, 1)]
    made += [record("Mamba-2, N=4", seed, 0.1) for seed in (0, 1)]
    assert status(made, name) == "shown"
    assert "N=4 > 10.0" in claim(made, name).evidence
    fast = record("Mamba-2, N=8", 0, 1.0, halfway=0.95)
    assert status([*made, fast], name) == "not shown"
    late = [record("Transformer (rotary)", 2, 1.0), record("Mamba-2, N=8", 0, 0.1)]
    assert status([*made, late[1]], name) == "shown"
    assert "Transformer's 200 at 8" in claim([*made, *late], name).evidence
    never = record("Transformer (rotary)", 2, 0.5)
    assert status([*made, never], name) == "not shown"


def test_fewer_examples_is_judged_where_the_smallest_state_fails():
    made = [record("Transformer (rotary)", seed, 1.0, halfway=0.95) for seed in (0, 1)]
    made += [record("Mamba-2, N=4", seed, 0.95) for seed in (0, 1)]
    assert status(made, "attention copies with fewer examples") == "not shown"


@pytest.mark.parametrize(
    ("large", "params", "expected"),
    [(0.1, 1000, "not shown"), (0.95, 1040, "shown"), (0.95, 1100, "not shown")],
)
def test_a_larger_state_must_copy_more_with_as_many_parameters(large, params, expected):
    made = [record("Mamba-2, N=4", seed, 0.1) for seed in (0, 1)]
    made += [record("Mamba-2, N=8", seed, large, params=params) for seed in (0, 1)]
    assert status(made, "a larger state copies more") == expected


def test_a_state_that_copies_all_lengths_alike_is_not_limited():
    def run(long, accuracy=None):
        made = [record("Mamba-2, N=4", seed, 0.9, n_max=4) for seed in (0, 1)]
        return made + [
            record("Mamba-2, N=4", seed, long, n_max=8, accuracy=accuracy) for seed in (0, 1)
        ]

    name = "a fixed state limits the length"
    assert status(run(0.2), name) == "shown"
    assert status(run(0.9), name) == "not shown"
    rising = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert status(run(0.2, rising), name) == "needs scale: accelerator"
    assert "gain 15.0 points" in claim(run(0.2, rising), name).evidence
    assert status(run(0.9, rising), name) == "not shown"


@pytest.mark.parametrize(
    ("transformer", "local", "far", "parity", "ahead"),
    [
        (0.95, 0.94, 0.5, "shown", "shown"),
        (0.95, 0.92, 0.95, "not shown", "not shown"),
        (0.80, 1.00, 0.5, "not shown", "not shown"),
    ],
)
def test_dynamic_programming_is_judged_where_the_transformer_solves_it(
    transformer, local, far, parity, ahead
):
    options, made = {"kind": "dp", "steps_written": True}, []
    for seed in (0, 1, 2):
        for name, shares in (
            ("Transformer (rotary)", (transformer, transformer)),
            ("Mamba-2, N=4", (local, far)),
        ):
            made.append(record(name, seed, shares[0], **options, local=True, label="a"))
            made.append(record(name, seed, shares[1], **options, local=False, label="b"))
    assert status(made, "local steps") == parity
    assert status(made, "steps that look far back") == ahead


def test_states_that_are_compared_have_as_many_parameters_and_all_trainings_three_seeds():
    found = papers.load("mamba_free_lunch").cells(papers.load_config("mamba_free_lunch", "cpu"))
    trained = [cell for cell in found if cell.settings["kind"] in ("copy", "dp")]
    seeds = collections.defaultdict(set)
    for cell in trained:
        s = cell.settings
        seeds[s["kind"], s["model"], s.get("n_max"), s.get("task")].add(cell.seed)
    assert all(len(of_model) >= 3 for of_model in seeds.values())
    sizes = set()
    for cell in trained:
        if cell.settings["kind"] == "copy" and cell.settings["model"].startswith("Mamba-2"):
            keys = tasks.get("copy", **cell.settings["options"]).config_keys
            config = measurements.training_config({**keys, **cell.settings["train"]}, 0)
            sizes.add((cell.settings["model"], measurements.parameters(config)))
    assert len(sizes) == 2
    small, large = sorted(n for _, n in sizes)
    assert large <= (1 + claims.ALIKE) * small


def test_scales_differ_and_cells_have_names_of_their_own():
    for scale in papers.SCALES:
        config = papers.load_config("mamba_free_lunch", scale)
        if scale == "accelerator":
            assert 40 in config.copy.n_max
        cells = papers.load("mamba_free_lunch").cells(config)
        assert len({cell.id for cell in cells}) == len(cells)
