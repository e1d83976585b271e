"""The copying paper: what its claims say of numbers."""

import pytest

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


def record(model, seed, exact, n_max=8, halfway=0.0, **settings):
    """`halfway` is right after 100 examples, `exact` after 1000."""
    curve = [0.0, halfway, exact]
    result = {
        "examples": [0, 100, 1000],
        "validation_exact": curve,
        "validation_accuracy": curve,
        "test_exact": exact,
        "test_accuracy": exact,
        "test_loss": 1.0,
        "train_loss": 1.0,
        "params": 1000,
    }
    settings = {"kind": "copy", "model": model, "n_max": n_max, **settings}
    settings.setdefault("state_numbers", None if model.startswith("T") else int(model[-1]))
    cell = f"{settings['kind']}-{model}-{n_max}-{seed}-{settings.get('label', '')}"
    return Record("mamba_free_lunch", cell, "", settings, seed, result, 1.0, {})


def status(records, name):
    found = claims.claims(Records(records))
    return next(claim.status for claim in found if claim.name == name)


def test_fewer_examples_compares_the_fastest_mamba_with_the_slowest_transformer():
    made = [record("Transformer (rotary)", seed, 1.0, halfway=0.95) for seed in (0, 1)]
    made += [record("Mamba-2, N=4", seed, 0.1) for seed in (0, 1)]
    assert status(made, "attention copies with fewer examples") == "shown"
    fast = record("Mamba-2, N=8", 0, 1.0, halfway=0.95)
    assert status([*made, fast], "attention copies with fewer examples") == "not shown"
    slow = record("Transformer (rotary)", 2, 1.0, halfway=0.5)
    assert status([*made, slow], "attention copies with fewer examples") == "not shown"


@pytest.mark.parametrize(("large", "expected"), [(0.1, "not shown"), (0.95, "shown")])
def test_a_larger_state_must_copy_more(large, expected):
    made = [record("Mamba-2, N=4", seed, 0.1) for seed in (0, 1)]
    made += [record("Mamba-2, N=8", seed, large) for seed in (0, 1)]
    assert status(made, "a larger state copies more") == expected


def test_a_state_that_copies_all_lengths_alike_is_not_limited():
    def run(long):
        made = [record("Mamba-2, N=4", seed, 0.9, n_max=4) for seed in (0, 1)]
        return made + [record("Mamba-2, N=4", seed, long, n_max=8) for seed in (0, 1)]

    assert status(run(0.2), "a fixed state limits the length") == "shown"
    assert status(run(0.9), "a fixed state limits the length") == "not shown"


def test_dynamic_programming_claims_compare_the_right_rows():
    def run(local, far):
        made = []
        for seed in (0, 1):
            for name, shares in (
                ("Transformer (rotary)", (0.9, 0.9)),
                ("Mamba-2, N=4", (local, far)),
            ):
                options = {"kind": "dp", "steps_written": True}
                made.append(record(name, seed, shares[0], **options, local=True, label="a"))
                made.append(record(name, seed, shares[1], **options, local=False, label="b"))
        return made

    assert status(run(0.89, 0.5), "local steps") == "shown"
    assert status(run(0.85, 0.5), "local steps") == "not shown"
    assert status(run(0.9, 0.5), "steps that look far back") == "shown"
    assert status(run(0.9, 0.9), "steps that look far back") == "not shown"


def test_scales_differ_and_cells_have_names_of_their_own():
    for scale in papers.SCALES:
        config = papers.load_config("mamba_free_lunch", scale)
        if scale == "accelerator":
            assert 40 in config.copy.n_max
        cells = papers.load("mamba_free_lunch").cells(config)
        assert len({cell.id for cell in cells}) == len(cells)
