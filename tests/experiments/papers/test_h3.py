"""H3's experiments: the models that its cells build, and what its claims say of numbers."""

import pathlib

import pytest

from tilescan.configs.common import SCALES
from tilescan.experiments.harness import records
from tilescan.experiments.harness import registry as papers
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.papers.h3 import cells, claims


def record(kind, model, seed=0, **fields):
    result = {
        "test_accuracy": fields.pop("accuracy", 0.5),
        "test_perplexity": fields.pop("ppl", 9.0),
        "examples": [10, 20, 30],
        "validation_accuracy": fields.pop("curve", [0.1, 0.4, 0.4]),
    }
    train = {"train.steps": 30, "data.batch_size": 1}
    settings = {"kind": kind, "model": model, "train": train, **fields}
    cell = "-".join(map(str, (kind, model, seed, *fields.values())))
    return Record("h3", cell, "", settings, seed, result, 1.0, {})


def status(records, name):
    found = claims.claims(Records(records))
    return next(claim.status for claim in found if claim.name == name)


def languages(model, induction, recall, **fields):
    tasks = {"induction": induction, "associative_recall": recall}
    return [record("language", model, task=t, accuracy=a, **fields) for t, a in tasks.items()]


def test_solving_needs_both_languages():
    assert status(languages("h3", 0.98, 0.99), "H3 recalls") == "shown"
    assert status(languages("h3", 0.98, 0.9), "H3 recalls") == "not shown"
    assert status(languages("h3", 0.98, 0.99)[:1], "H3 recalls") == "not shown"


@pytest.mark.parametrize(
    ("s4d", "attention", "last", "expected"),
    [
        (0.4, 0.98, 0.41, "shown"),
        (0.9, 0.98, 0.41, "not shown"),
        (0.4, 0.5, 0.41, "not shown"),
        (0.4, 0.98, 0.43, "not shown"),  # it still learns
    ],
)
def test_s4d_must_stop_before_the_induction_head_which_attention_finds(
    s4d, attention, last, expected
):
    made = languages("s4d", s4d, 0.9, curve=[0.1, 0.4, last])
    made += languages("attention", attention, 0.9)
    made += languages("h3", 0.99, 0.9)
    assert status(made, "S4D cannot find the induction head") == expected


@pytest.mark.parametrize(("s4d", "expected"), [(0.3, "shown"), (0.85, "not shown")])
def test_the_gap_in_recall_is_measured_at_the_most_pairs(s4d, expected):
    made = [record("mqar", "h3", pairs=n, accuracy=0.9) for n in (4, 8)]
    made += [record("mqar", "s4d", pairs=4, accuracy=0.9)]
    made += [record("mqar", "s4d", pairs=8, accuracy=s4d)]
    assert status(made, "H3 recalls more than S4D") == expected


def test_an_order_of_perplexities_must_hold_with_every_seed():
    name = "H3 + attention models text better than H3"
    made = [record("text", "h3", seed, ppl=9.0) for seed in (0, 1)]
    better = [record("text", "hybrid", seed, ppl=8.5) for seed in (0, 1)]
    assert status(made + better, name) == "shown"
    assert status(made + [better[0], record("text", "hybrid", 1, ppl=9.1)], name) == "not shown"
    assert status(made, name) == "not shown"


def test_cells_build_the_models_that_the_table_names():
    hybrid = cells.model_keys("hybrid", 4, 96, 4)
    assert hybrid["model.pattern"] == ("h3", "mlp", "attention", "mlp", "h3", "mlp", "h3", "mlp")
    assert hybrid["model.repeats"] == 1 and hybrid["model.position"] == "none"
    assert cells.model_keys("s4d", 4, 96, 4)["model.repeats"] == 4
    for scale in SCALES:
        made = cells.cells(papers.load_config("h3", scale))
        assert len({cell.id for cell in made}) == len(made)


def test_state_spaces_train_in_groups_of_their_own_and_attention_has_learned_positions():
    planned = cells.cells(papers.load_config("h3", "cpu"))
    made = {cell.id: cell.settings["train"] for cell in planned if "train" in cell.settings}
    groups = {g["pattern"]: g for g in made["induction-h3-seed2"]["optimizer.groups"]}
    slow = next(g for pattern, g in groups.items() if "log_dt" in pattern)
    assert slow["lr_multiplier"] * made["induction-h3-seed2"]["optimizer.learning_rate"] == 1e-3
    assert made["induction-attention-seed2"]["model.position"] == "learned"
    assert "optimizer.groups" not in made["text-attention-seed2"]


def test_rates_of_text_are_those_that_were_better_in_trials():
    found = records.load(pathlib.Path("results/h3/cpu"))
    trials = {}
    for record in found.kind("final"):
        key = record.settings["model"]
        trials.setdefault(key, {})[record.settings["rate"]] = record.result["validation_loss"]
    for record in found.kind("text"):
        losses = trials[record.settings["model"]]
        assert record.settings["train"]["optimizer.learning_rate"] == min(losses, key=losses.get)
        assert len(losses) > 1
