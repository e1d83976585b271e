"""Refined schedules: the paper's algebra and figure, and the norms that runs record."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.optimize
from tiny_training import TinyModel, tiny_config, tiny_datasets

from tilescan.cli import main
from tilescan.training import programs, steps
from tilescan.training.metrics import read_rows
from tilescan.training.optimizers import make_optimizer
from tilescan.training.refinement import norm_for, read_norms, refined_schedule, smoothed
from tilescan.training.schedules import read_schedule
from tilescan.training.settings import OptimizerConfig
from tilescan.training.train import train


def test_equal_norms_give_linear_decay():
    T = 50
    want = 1 - np.arange(T) / (T - 1)
    for power in (1, 2):
        np.testing.assert_allclose(refined_schedule(np.full(T, 3.0), power), want, atol=1e-15)


def test_the_schedule_is_weights_times_what_follows():
    """In the paper's own order, one update after another, after the filter of the reference."""
    norms = np.random.default_rng(0).uniform(0.5, 2, 40)
    padded = np.pad(norms, (0, 10), mode="reflect")
    filtered = scipy.ndimage.median_filter(padded, size=5, mode="nearest")[:40]
    np.testing.assert_array_equal(smoothed(norms, 0.1), filtered)
    weights = [1 / g**2 for g in filtered]
    eta = [weights[t] * sum(weights[t + 1 :]) for t in range(40)]
    np.testing.assert_allclose(refined_schedule(norms, 2), np.array(eta) / max(eta), rtol=1e-12)


def test_scale_does_not_matter_and_powers_are_of_norms():
    norms = np.random.default_rng(1).uniform(0.5, 2, 100)
    found = refined_schedule(norms, 2, tau=0)
    np.testing.assert_allclose(refined_schedule(1e9 * norms, 2, tau=0), found, rtol=1e-12)
    np.testing.assert_allclose(refined_schedule(norms**2, 1, tau=0), found, rtol=1e-12)
    assert found[-1] == 0 and found.max() == 1


@pytest.mark.parametrize(
    ("values", "peak", "shares"),
    [
        ([1, 1, 1, 1, 1, 1], 0, [0.95, 0.90, 0.75, 0.50, 0.25, 0.10]),
        ([15, 6, 4, 2, 1, 1], 13.5, [0.260, 0.844, 0.875, 0.583, 0.291, 0.116]),
        ([15, 6, 4, 2, 1, 2], 12.1, [0.291, 0.906, 0.603, 0.212, 0.062, 0.019]),
        ([15, 6, 4, 2, 1, 0.7], 15.05, [0.247, 0.815, 0.980, 0.860, 0.582, 0.283]),
    ],
)
def test_figure_2s_norms_give_its_schedules(values, peak, shares):
    """Norms that fall at first give a warm-up, those that rise at the end a faster decay."""
    n = 2000
    norms = np.interp(np.linspace(0, 1, n), [0, 0.003, 0.02, 0.03, 0.1, 1], values)
    norms = scipy.ndimage.gaussian_filter1d(norms, 40)
    found = refined_schedule(norms, 2, tau=0)
    assert 100 * found.argmax() / n == pytest.approx(peak, abs=0.1)
    at = [int(n * share / 100) for share in (5, 10, 25, 50, 75, 90)]
    np.testing.assert_allclose(found[at], shares, rtol=0.05, atol=1e-3)  # the first is steep


def test_another_length_has_the_same_shape():
    norms = 1 + np.linspace(2, 0, 500) ** 2
    short, long = refined_schedule(norms, 1, steps=100), refined_schedule(norms, 1, steps=1000)
    np.testing.assert_allclose(short, long[np.linspace(0, 999, 100).round().astype(int)], atol=0.02)


def test_the_last_iterate_is_the_weighted_mean():
    """With x_{t+1} = x_t + (w_{t+1:T} / w_{1:T}) Delta_t, x_T = sum_t w_t z_t / w_{1:T}."""
    rng, T = np.random.default_rng(2), 30
    norms, total = rng.uniform(0.5, 2, T), 0.0
    w = norms**-2.0
    eta = refined_schedule(norms, 2, tau=0) * (w[:-1] * np.cumsum(w[:0:-1])[::-1]).max() / w.sum()
    A, x, z = rng.standard_normal((3, 3)), np.ones(3), np.ones(3)
    for t in range(T):
        total = total + w[t] * z / w.sum()
        gradient = A.T @ A @ x  # at x_t
        x, z = (x - eta[t] * gradient, z - w[t] * gradient) if t < T - 1 else (x, z)
    np.testing.assert_allclose(x, total, rtol=1e-10)


def test_linear_decay_keeps_its_bound_on_convex_problems():
    """The last iterate's gap is at most D G / sqrt(T), on piecewise linear functions."""
    worst, T = 0.0, 60
    for seed in range(20):
        rng = np.random.default_rng(seed)
        planes, heights = rng.standard_normal((8, 3)), rng.standard_normal(8)
        planes -= planes.mean(0)  # so that there is a minimum
        found = scipy.optimize.linprog(
            [0, 0, 0, 1],
            A_ub=np.c_[planes, -np.ones(8)],
            b_ub=-heights,
            bounds=[(None, None)] * 4,
        )
        best, D = found.x[:3], np.linalg.norm(found.x[:3])
        G = np.linalg.norm(planes, axis=1).max()
        x = np.zeros(3)
        for factor in D / (G * np.sqrt(T)) * (1 - np.arange(1, T) / T):
            x = x - factor * planes[np.argmax(planes @ x + heights)]
        value = lambda x, p=planes, h=heights: np.max(p @ x + h)
        worst = max(worst, (value(x) - value(best)) / (D * G / np.sqrt(T)))
    assert 0 < worst <= 1


@pytest.mark.parametrize(
    ("norms", "options", "message"),
    [
        ([1.0], {}, r"must be \[T\] with T of at least 2, got shape \(1,\)"),
        ([1.0, 0.0, 2.0], {}, "above 0 and finite; that of update 1 is 0.0"),
        ([1.0, 2.0, np.nan], {}, "that of update 2 is nan"),
        ([1.0, 2.0], {"tau": 2}, "tau=2 must lie in"),
        ([1.0, 2.0], {"steps": 1}, "steps=1 must be at least 2"),
    ],
)
def test_norms_that_cannot_be_are_refused(norms, options, message):
    with pytest.raises(ValueError, match=message):
        refined_schedule(np.array(norms), 1, **options)


def test_a_step_gives_the_norms_of_the_gradient_before_clipping():
    target = jnp.arange(6.0)

    def loss(params, batch, key=None):
        value = jnp.sum((params["w"] - target) ** 2)
        sums = dict.fromkeys(("nll", "correct", "exact", "rows"), 0.0)
        return value, {"loss": value, "weight": jnp.float32(1), **sums}

    tx, rate = make_optimizer(OptimizerConfig(clip_norm=0.1, warmup_steps=0), 10)
    params = {"w": jnp.ones(6)}
    state = steps.TrainState(
        jnp.int32(0), params, tx.init(params), jax.random.key_data(jax.random.key(0)), None
    )
    gradient = 2 * (1 - target)
    for on in (False, True):
        step = jax.jit(steps.make_train_step(loss, tx, rate, gradient_norms=on))
        metrics = step(state, {"tokens": jnp.zeros((1, 1))})[1]
        assert metrics["grad_norm"] == pytest.approx(float(jnp.linalg.norm(gradient)))
        assert ("grad_l1" in metrics) == on
    assert metrics["grad_l1"] == pytest.approx(float(jnp.abs(gradient).sum()))


def run(workdir, *assignments):
    config = tiny_config("train.log_every=4", *assignments)
    return train(config, workdir, model=TinyModel(0.1), datasets=tiny_datasets())


def test_the_command_writes_a_schedule_of_a_runs_norms(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    norms = np.linspace(3, 1, 12)
    rows = [{"step": i + 1, "l2": g, "l1": 2 * g} for i, g in enumerate(norms)]
    (tmp_path / "run").mkdir()
    config = {"optimizer": {"name": "sgd"}, "train": {"steps": 12}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    path = tmp_path / "run" / "gradient_norms.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main.main(["refine", "run"]) == 0
    assert "refined.txt: 12 updates; peak at update" in capsys.readouterr().out
    want = refined_schedule(norms, 2)
    np.testing.assert_allclose(read_schedule("refined.txt", 12), want, rtol=1e-8)
    assert (tmp_path / "refined.svg").read_text().count("<svg") == 1
    assert main.main(["refine", "run", "--steps=30", "--output=long.txt", "--norm=l1"]) == 0
    assert len(read_schedule("long.txt", 30)) == 30
    assert main.main(["refine", "nothing"]) == 1
    assert "nothing/config.json cannot be read: " in capsys.readouterr().err


@pytest.mark.slow
def test_recording_changes_nothing_else_and_a_run_follows_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir, plain = tmp_path / "run", tmp_path / "plain"
    run(workdir, "train.gradient_norms=True")
    rows = read_rows(workdir / "gradient_norms.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    logged = {r["step"]: r for r in read_rows(workdir / "metrics.jsonl") if r["split"] == "train"}
    assert set(logged) == {4, 8, 12}
    assert all(rows[step - 1]["l2"] == logged[step]["grad_norm"] for step in logged)
    assert "grad_l1" not in logged[4] and all(row["l1"] > row["l2"] for row in rows)
    run(plain)
    assert not (plain / "gradient_norms.jsonl").exists()
    assert (plain / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds no norms: train with --config.train.gradient_norm"):
        read_norms(plain, "l1")
    assert main.main(["refine", "run"]) == 0
    want = refined_schedule(read_norms(workdir, "l1"), 1)
    run("second", "optimizer.schedule=file:refined.txt", "optimizer.warmup_steps=None")
    rates = [r["learning_rate"] for r in read_rows("second/metrics.jsonl") if r["split"] == "train"]
    np.testing.assert_allclose(rates, 1e-2 * want[[3, 7, 11]], rtol=1e-6)


def test_norms_are_of_all_steps(tmp_path):
    """A run that was continued with norms lacks those before."""
    path = tmp_path / "gradient_norms.jsonl"
    path.write_text("".join(json.dumps({"step": s, "l1": 1.0, "l2": 1.0}) + "\n" for s in (3, 4)))
    with pytest.raises(ValueError, match="begins with step 3 and has 2 up to 4: norms of all"):
        read_norms(tmp_path, "l2")
    path.write_text("".join(json.dumps({"step": s, "l1": 1.0, "l2": 1.0}) + "\n" for s in (1, 2)))
    (tmp_path / "config.json").write_text(json.dumps({"train": {"steps": 2}}))
    assert len(read_norms(tmp_path, "l2")) == 2
    (tmp_path / "config.json").write_text(json.dumps({"train": {"steps": 5}}))
    with pytest.raises(ValueError, match="norms of 2 of the run's 5 updates: let it finish"):
        read_norms(tmp_path, "l2")
    with pytest.raises(ValueError, match="norm='l3' must be one of l2, l1"):
        read_norms(tmp_path, "l3")
    for name, norm in (("sgd", "l2"), ("adamw", "l1"), ("lion", "l1")):
        (tmp_path / "config.json").write_text(json.dumps({"optimizer": {"name": name}}))
        assert norm_for(tmp_path) == norm


def test_a_file_that_changed_has_programs_of_its_own(tmp_path):
    from tilescan.training import sharding
    from tilescan.training.config import settings

    path = tmp_path / "mine.txt"
    kept = []
    for text in ("1\n" * 12, "1\n" * 12, "0.5\n" * 12):
        path.write_text(text)
        c = settings(tiny_config(f"optimizer.schedule=file:{path}", "optimizer.warmup_steps=None"))
        kept.append(programs.kept(TinyModel(), c, sharding.make_mesh(c.mesh), lambda: (object(),)))
    assert kept[0] is kept[1] and kept[1] is not kept[2]
