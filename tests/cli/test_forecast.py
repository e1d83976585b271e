"""`tilescan forecast` on curves that the law itself makes."""

import csv
import re

import numpy as np
import pytest

from tilescan.cli import forecast, main
from tilescan.training.annealing_law import Law, predict
from tilescan.training.schedules import ScheduleConfig, rates

TRUE = Law(L0=2.6, A=0.45, C=0.04, alpha=0.6, decay=0.999)


def losses_of(name, steps=4000, **options):
    eta = rates(ScheduleConfig(1e-2, name, warmup_steps=100, **options), steps)
    return eta, predict(TRUE, eta, 100)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Curves of a cosine, a constant rate and a decay, in files."""
    monkeypatch.chdir(tmp_path)
    curves = {"cosine": {}, "constant": {}, "wsd": {"decay_steps": 1000}}
    for name, options in curves.items():
        eta, losses = losses_of(name, **options)
        rows = [f"{s},{eta[s - 1]:.12g},{losses[s - 1]:.9g}" for s in range(101, 4001, 10)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["step,lr,loss", *rows]) + "\n")
    return tmp_path


def test_a_forecast_is_the_law(folder, capsys):
    assert (
        main.main(
            ["forecast", "cosine.csv", "constant.csv", "--check=wsd.csv", "--check=cosine.csv"]
            + ["--schedule=wsd,decay_steps=500,decay_shape=sqrt,warmup_steps=100"]
            + ["--schedule=linear,learning_rate=0.02,final_fraction=0.0", "--samples=20"]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "L = 2.6 + 0.45 S1^-0.6 - 0.04 S2, lambda = 0.999" in said
    assert "alpha 0.6 [0.6, 0.6]" in said
    assert said.count("mean |error| 0.00%") == 4
    assert "note: its peak 0.02 is above the runs' 0.01" in said

    # Whole curves, of every update.
    with open(folder / "forecast" / "forecast.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["schedule"].startswith("wsd")]
    eta, losses = losses_of("wsd", 3991, decay_steps=500, decay_shape="sqrt")
    assert len(rows) == 3991
    np.testing.assert_allclose([float(row["lr"]) for row in rows], eta, rtol=1e-6)
    np.testing.assert_allclose([float(row["loss"]) for row in rows][200:], losses[200:], rtol=1e-4)
    assert (folder / "forecast" / "forecast.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.csv"], "nothing.csv is neither the work folder of a run nor a CSV file"),
        (["cosine.csv", "--schedule=wds"], "'wds' is unknown; did you mean 'wsd'"),
        (["cosine.csv", "--schedule=wsd,decay=5"], "'decay=5' must be .* did you mean 'decay_st"),
        (["cosine.csv", "--schedule=wsd,decay_steps=ten"], "decay_steps"),
        (["cosine.csv", "--schedule=wsd,decay_steps=5000"], "exceeds train.steps = 3991"),
        (["cosine.csv", "--decay=2"], "decay=2.0 must lie in"),
    ],
)
def test_what_cannot_be_forecast_is_refused(folder, capsys, words, message):

    assert main.main(["forecast", *words]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "forecast").exists()


def test_constant_rates_say_nothing_of_annealing(folder, capsys):
    main.main(["forecast", "constant.csv", "--schedule=linear", "--samples=0", "--steps=500"])
    assert "constant rates, which say nothing of annealing" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "milestones"), [("600:800", (600, 800)), ("600", (600,))])
def test_milestones_are_written_with_colons(text, milestones):
    found = forecast.parse_schedule(f"multi_step,milestones={text},milestone_factor=0.5", 1e-2)
    assert found == ScheduleConfig(1e-2, "multi_step", milestones=milestones, milestone_factor=0.5)
