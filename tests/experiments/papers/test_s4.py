"""S4's experiments: what its cells build and measure, and what its claims say of numbers."""

import jax
import numpy as np
import pytest

from tilescan.data import tasks
from tilescan.experiments.harness import registry as papers
from tilescan.experiments.harness.claims import Effect
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.measurements import state_space_kernels as kernels
from tilescan.experiments.measurements import training as measurements
from tilescan.experiments.measurements.training import training_config
from tilescan.experiments.papers.s4 import cells, claims, tables
from tilescan.ops import s4
from tilescan.training import config as config_lib
from tilescan.training.optimizers import group_of


def record(kind, result, seed=0, **settings):
    cell = "-".join(map(str, (kind, seed, *settings.values())))
    return Record("s4", cell, "", {"kind": kind, **settings}, seed, result, 1.0, {})


def claim(records, name):
    found = {c.name: c for c in claims.claims(Records(records))}
    return found[name]


def status(records, name):
    return claim(records, name).status


@pytest.mark.slow
def test_exactness_is_measured_by_the_largest_difference():
    settings = {"length": 24, "channels": 2, "state_dim": 4, "batch": 1}
    found = kernels.exactness(settings, 0)
    assert found["kernel"]["Cauchy, float64"] < 1e-11
    assert 1e-9 < found["kernel"]["Cauchy, float32"] < 1e-3
    assert all(0 < error < 1e-5 for error in found["mixer"].values())
    truth = np.array([[1.0, -4.0]])
    assert kernels.error(truth + [[0.0, 0.4]], truth) == pytest.approx(0.1)


def test_methods_of_a_kernel_agree():
    length, N = 20, 6
    dense, modes = kernels.systems(np.random.default_rng(0).normal(size=(2, N)))
    system = kernels.single(np.log([0.05, 0.1]), *dense, *modes)
    known = {name: jax.jit(kernel) for name, kernel in kernels.kernels(length).items()}
    dense, powers = (known[name](*system) for name in (kernels.DENSE, kernels.POWERS))
    np.testing.assert_allclose(powers, dense, atol=1e-4 * np.abs(dense).max())
    # The Cauchy products take a C that holds the truncation already.
    log_dt, *_, L, P, B, C = system
    C = jax.jit(s4.dplr_truncate, static_argnums=4)(log_dt, L, P, C, length)
    cauchy = known[kernels.CAUCHY](*system[:-1], C)
    np.testing.assert_allclose(cauchy, dense, atol=1e-3 * np.abs(dense).max())


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["cpu", pytest.param("accelerator", marks=pytest.mark.slow)])
def test_transformers_have_as_many_parameters(scale):
    config = papers.load_config("s4", scale)
    for name in ("generation", *cells.TASKS):
        section = config[name]
        data = {"model.vocab_size": 256}
        if name == "generation":
            data = {"model.vocab_size": section.vocab_size}
        else:
            data = tasks.get(section.task).config_keys
        counts = [
            measurements.parameters(
                training_config({**data, **cells.model_keys(model, section)}, 0)
            )
            for model in ("s4", "attention")
        ]
        assert abs(counts[1] / counts[0] - 1) < 0.05, (name, counts)


def test_cells_are_unique_and_models_known():
    for scale in papers.SCALES:
        made = cells.cells(papers.load_config("s4", scale))
        assert len({cell.id for cell in made}) == len(made)
    config = papers.load_config("s4", "cpu")
    with pytest.raises(ValueError, match="model='s5' is unknown"):
        cells.model_keys("s5", config.digits)


def test_state_spaces_train_slowly_and_do_not_decay():
    section = papers.load_config("s4", "cpu").digits

    def groups(**options):
        keys = cells.optimizer_keys("s4", section, **options)
        optimizer = config_lib.settings(training_config(keys, 0)).optimizer
        place = "backbone/layers/s4_0/mixer/"
        return {
            name: (g.lr_multiplier, g.weight_decay)
            for name in ("log_A_real", "A_imag", "P_real", "B_imag", "log_dt", "C_real", "D")
            for g in [group_of(place + name, optimizer)]
        } | {"kernel": group_of(place + "out/kernel", optimizer).weight_decay}

    trained = groups()
    assert {trained[k] for k in ("log_A_real", "A_imag", "P_real", "B_imag", "log_dt")} == {
        (0.1, 0.0)
    }
    assert trained["C_real"] == (1.0, section.weight_decay) and trained["D"] == (1.0, 0.0)
    assert trained["kernel"] == section.weight_decay
    frozen = groups(frozen=True)
    assert frozen["A_imag"] == frozen["P_real"] == frozen["B_imag"] == (0.0, 0.0)
    assert frozen["log_dt"] == (0.1, 0.0)


def test_initializations_are_options_of_the_mixers():
    section = papers.load_config("s4", "cpu").inits
    made = {cell.id: cell.settings["train"] for cell in cells.init_cells(section)}
    assert len(made) == len(section.inits) * len(section.seeds)
    slow = {
        init: [g["pattern"] for g in made[f"init-{init}-trained-seed0"]["optimizer.groups"]][1]
        for init in section.inits
    }
    assert slow["dense_hippo"] == slow["dense_random"] == "/[AB]$" != slow["hippo"]
    dense = made["init-dense_random-trained-seed0"]
    assert dense["model.mixers.s4.dense"] and dense["model.mixers.s4.init_A"] == "random"
    assert made["init-random_diagonal-trained-seed0"]["model.mixers.s4d.n_ssm"] == 1


def accuracies(name, model, *values, task="sequential_mnist", params=1000):
    settings = dict(name=name, model=model, task=task)
    settings["train"] = {"train.steps": 100, "data.batch_size": 32}
    return [
        record("task", {"test_accuracy": v, "params": params}, seed, **settings)
        for seed, v in enumerate(values)
    ]


def test_a_lead_must_exceed_the_spread_of_the_gap():
    name = "S4 beats a Transformer: sequential MNIST"
    attention = accuracies("digits", "attention", 0.90, 0.92, 0.88)
    ahead = accuracies("digits", "s4", 0.97, 0.98, 0.96) + attention
    assert status(ahead, name) == "shown"
    # Paired by seed: both are better and worse with the same seeds.
    assert status(accuracies("digits", "s4", 0.91, 0.93, 0.89) + attention, name) == "shown"
    assert status(accuracies("digits", "s4", 0.99, 0.92, 0.91) + attention, name) == "not shown"
    assert status(accuracies("digits", "s4", 0.97, 0.98, 0.80) + attention, name) == "not shown"
    two_seeds = accuracies("digits", "s4", 0.99, 0.99) + attention
    assert status(two_seeds, name) == "not shown" and claim(two_seeds, name).effect is None
    larger = accuracies("digits", "s4", 0.97, 0.98, 0.96, params=1051)
    assert status(larger + attention, name) == "not shown"
    found = claim(ahead, name)
    assert found.criterion == claim([], name).criterion  # no number of a record is part of it
    assert found.evidence.endswith("gap 7.0 ± 1.0 points, after 3,200 examples")
    assert found.effect.published == pytest.approx(0.73) and len(found.effect.measured) == 3
    others = {"task": "permuted_mnist"}  # a claim on one set of images is not one on another
    made = accuracies("digits", "s4", 0.97, 0.98, 0.96, **others)
    made += accuracies("digits", "attention", 0.5, 0.5, 0.5, **others)
    assert status(made, name) == "not shown"
    assert status([], "S4 beats a Transformer: Pathfinder") == "needs scale: accelerator"


def generation(context, attention, s4_ms, width=64):
    models = {"s4": {"model.d_model": width, "model.repeats": 1}}
    result = {
        "s4": {"median_ms": s4_ms, "state_bytes": 8, "params": 1},
        "attention": {"median_ms": attention, "state_bytes": 8 * context, "params": 1},
    }
    return record("generation", result, context=context, tokens=2, batch=1, models=models)


def test_generation_is_judged_by_the_ratio_and_by_s4s_own_times():
    grows = "S4 generates faster, the more so the longer the context"
    constant = "S4's time of a token is constant"
    made = [generation(256, 2.0, 1.0), generation(1024, 6.0, 1.2)]
    assert status(made, grows) == status(made, constant) == "shown"
    assert status([generation(256, 3.0, 1.0), generation(1024, 2.0, 1.0)], grows) == "not shown"
    assert status([generation(256, 0.2, 1.0), generation(1024, 0.9, 1.0)], grows) == "not shown"
    assert status([generation(256, 2.0, 1.0), generation(1024, 6.0, 2.0)], constant) == "not shown"
    sixty = "60 times faster generation"
    assert status(made, sixty) == "needs scale: accelerator"
    assert status([generation(256, 90.0, 1.0)], sixty) == "shown"
    assert claim(made, sixty).effect == Effect(60.0, [5.0])
    assert status([generation(256, 30.0, 1.0, width=1024)], sixty) == "not shown"
    (table,) = [table for table in tables.tables(Records(made)) if table.rows]
    assert table.rows[1][:4] == ["1024", 3.0, 0.6, pytest.approx(5.0)]


def test_errors_and_costs_can_refute():
    def exact(kernel, mixer):
        return [
            record(
                "exactness", {"kernel": {"Cauchy, float64": kernel}, "mixer": {"s4": m}}, length=n
            )
            for n, m in ((256, mixer / 10), (1024, mixer))
        ]

    assert status(exact(1e-12, 1e-5), "convolution is recurrence") == "shown"
    assert status(exact(1e-12, 1e-3), "convolution is recurrence") == "not shown"
    assert status(exact(1e-12, 1e-3), "DPLR kernels are exact") == "shown"
    assert status(exact(1e-6, 1e-5), "DPLR kernels are exact") == "not shown"

    def cost(*dense):
        return [
            record(
                "cost",
                {
                    "dense powers": {"median_ms": d, "temp_bytes": 100},
                    "Cauchy": {"median_ms": 1.0, "temp_bytes": 100 // N},
                },
                state_dim=N,
                length=length,
                channels=1,
            )
            for N, d in zip((4, 16), dense, strict=True)
            for length in (64, 128)
        ]

    name = "DPLR kernels take less time than dense ones"
    assert status(cost(2.0, 8.0), name) == "shown"
    assert status(cost(2.0, 1.5), name) == "not shown"
    assert claim(cost(2.0, 8.0), name).evidence == "2.00 at 4 states, 8.00 at 16 states"
    assert status(cost(2.0, 8.0), "DPLR kernels take less memory than dense ones") == "shown"


@pytest.mark.parametrize(
    ("random", "fit", "expected"),
    [(0.80, 1.0, "shown"), (0.89, 1.0, "not shown"), (0.80, 0.97, "not shown")],
)
def test_hippo_must_lead_where_both_fit_the_training_data(random, fit, expected):
    made = [
        record(
            "init",
            {"test_accuracy": base + step * sign, "train_accuracy": train},
            seed,
            init=init,
            frozen=False,
        )
        for init, base, train, sign in (
            ("dense_hippo", 0.90, 1.0, 1),
            ("dense_random", random, fit, -1),
        )
        for seed, step in enumerate((-0.02, 0.0, 0.02))
    ]
    name = "HiPPO-LegS, dense beats random Gaussian, dense, trained"
    assert status(made, name) == expected
    assert claim(made, name).effect.published == 15
    assert claim(made, name).evidence.endswith(f"training accuracy of at least {fit:.1%}")
    assert status(made, "HiPPO-LegS (S4) beats random NPLR, trained") == "not shown"
