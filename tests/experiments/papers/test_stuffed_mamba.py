"""State collapse: the laws, the diagnosis on random models, and what claims say of numbers."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tilescan.configs.common import SCALES
from tilescan.experiments.harness import registry as papers
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.workspace import Workspace
from tilescan.experiments.measurements import collapse_readings, state_collapse
from tilescan.experiments.measurements.state_collapse import (
    CARRIED,
    FORGET,
    HALF_STEP,
    LONGER,
    NONE,
    NORM,
    WINDOW,
)
from tilescan.experiments.measurements.training import metrics
from tilescan.experiments.papers.stuffed_mamba import (
    cells,
    claims,
    published,
    quantities,
    tables,
    training,
)
from tilescan.experiments.papers.stuffed_mamba.cells import MITIGATE
from tilescan.experiments.papers.stuffed_mamba.tables import NAMES
from tilescan.models import LanguageModel, LanguageModelConfig

CONFIG = LanguageModelConfig(
    vocab_size=11,
    d_model=8,
    pattern=("mamba2",),
    repeats=2,
    position="none",
    mixers={"mamba2": dict(state_dim=4, head_dim=8)},
)


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(LanguageModel(CONFIG).init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(1)
    draw = lambda x: 0.3 * rng.standard_normal(x.shape).astype(x.dtype)
    return jax.tree.map(draw, nn.unbox(shapes))


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(0, 11, (2, 33)).astype(np.int32)


def read(config, params, rows, **options):
    return state_collapse.read(config, params, rows[:, :-1], rows[:, 1:], chunk=8, **options)


def test_the_published_laws_give_the_published_lengths():
    assert published.t_forget(12.9e6) == pytest.approx(62.2e3, abs=100)
    assert published.t_recall(12.9e6) == pytest.approx(257.8e3, rel=2e-3)


@pytest.mark.parametrize(
    ("size", "millions"), [("36M", 0.81), ("47M", 1.6), ("85M", 2.4), ("130M", 4.85),
                           ("370M", 12.9), ("780M", 19.35)],
)  # fmt: skip
def test_the_formula_of_the_state_gives_the_published_sizes(size, millions):
    layers, width = next(row[1:] for row in published.SIZES if row[0] == size)
    count = published.state_elements(layers, width)
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    config = LanguageModelConfig(
        vocab_size=8, d_model=width, pattern=("mamba2",), repeats=layers, position="none"
    )
    assert state_collapse.state_elements(config) == count


def test_chunks_are_read_as_one_text(params, rows):
    found = read(CONFIG, params, rows)
    apply = jax.jit(lambda p, x: LanguageModel(CONFIG).apply(p, x, mutable=["intermediates"]))
    (logits, _), traced = apply({"params": params}, rows[:, :-1])
    logits = np.asarray(logits, np.float64)
    chosen = np.take_along_axis(logits, rows[:, 1:, None], axis=2)[..., 0]
    want = np.log(np.exp(logits).sum(axis=2)) - chosen
    np.testing.assert_allclose(found["nll"], want, atol=1e-4)
    np.testing.assert_array_equal(found["hit"], logits.argmax(axis=2) == rows[:, 1:])
    assert found["log_decay"].shape == (4, 2, 2, 2)  # chunks, layers, rows, heads
    assert (np.diff(found["log_decay"], axis=0) < 0).all() and (found["log_decay"][0] < 0).all()
    (leaf,) = [
        value
        for path, value in jax.tree.leaves_with_path(traced)
        if "cumulative_log_decay" in jax.tree_util.keystr(path)
    ]
    np.testing.assert_allclose(found["log_decay"][-1], leaf[:, :, -1], rtol=1e-4)


def test_norms_are_bounded_after_each_chunk(params, rows):
    plain = state_collapse.state_norms(read(CONFIG, params, rows), 32)
    limit = 0.5 * plain[0].mean(axis=1)
    bounded = state_collapse.state_norms(read(CONFIG, params, rows, limit=limit), 32)
    assert (plain > limit[:, None]).any()
    assert (bounded <= limit[:, None] * 1.001).all()
    free = read(CONFIG, params, rows, limit=1e6 * limit)
    np.testing.assert_array_equal(free["nll"], read(CONFIG, params, rows)["nll"])


def test_groups_of_rows_are_read_as_all_at_once(params, rows, monkeypatch):
    rows = np.concatenate([rows, rows[:, ::-1], rows[:1]])  # five, in groups of two or three
    want = read(CONFIG, params, rows)
    monkeypatch.setattr(state_collapse, "ROWS", 2)
    found = read(CONFIG, params, rows)
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_mitigations_that_do_nothing_change_nothing(params, rows):
    assert state_collapse.with_mixer(CONFIG, decay_scale=1.0, b_scale=1.0) == CONFIG
    plain = read(CONFIG, params, rows)["nll"]
    wide, narrow = (
        read(state_collapse.with_mixer(CONFIG, state_window=r), params, rows)["nll"]
        for r in (32, 4)
    )
    np.testing.assert_allclose(wide, plain, atol=1e-5)
    np.testing.assert_allclose(narrow[:, :4], plain[:, :4], atol=1e-5)
    assert np.abs(narrow[:, 8:] - plain[:, 8:]).max() > 1e-4


def test_validation_chooses_a_mitigation(params, rows):
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": np.ones((2, 32))}
    batches, sizes = {"validation": batch, "test": batch}, dict(train_length=8, chunk=8)
    compare = lambda **candidates: state_collapse.compare_mitigations(
        CONFIG, params, batches, candidates, **sizes
    )
    found = compare(none=[{}], norm=[{"bound": 1e-3}, {"bound": 1e6}])
    want = state_collapse.by_position(read(CONFIG, params, rows)["nll"], batch["weights"], 4)
    assert found["none"] == {"chosen": {}, "within": want[1], "beyond": want[-1]}
    loss = lambda bound: compare(norm=[{"bound": bound}])["norm"]["beyond"]
    best = min((1e-3, 1e6), key=loss)
    assert found["norm"]["chosen"] == {"bound": best} and loss(1e-3) != loss(1e6)
    assert loss(1e6) == pytest.approx(found["none"]["beyond"], rel=1e-5)


def test_the_norm_is_bounded_after_every_token(params, rows):
    """One candidate alone is taken without validation; the state of each token has the bound."""
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": np.ones((2, 32))}
    found = state_collapse.compare_mitigations(
        CONFIG,
        params,
        {"validation": batch, "test": batch},
        {"norm": [{"bound": 0.5}]},
        train_length=8,
        chunk=8,
    )["norm"]
    limit = 0.5 * state_collapse.state_norms(read(CONFIG, params, rows), 32)[0].mean(axis=1)
    one_by_one = state_collapse.read(
        CONFIG, params, rows[:, :-1], rows[:, 1:], chunk=1, limit=limit
    )
    want = state_collapse.by_position(one_by_one["nll"], batch["weights"], 4)
    assert found == {"chosen": {"bound": 0.5}, "within": want[1], "beyond": want[-1]}


def test_candidates_keep_shares_of_a_state_over_the_training_length():
    options = papers.load_config("stuffed_mamba", "cpu").mitigation
    found = state_collapse.candidates(options)
    kept = {round(c["decay_scale"] ** options.train_length, 6) for c in found[FORGET]}
    assert kept == set(options.kept_shares)
    assert {c["b_scale"] for c in found[FORGET]} == {0.75, 1.0}
    assert [c["state_window"] for c in found[WINDOW]] == [12, 9, 6]


def test_the_untrained_model_is_that_of_the_seed():
    first, again, other = (state_collapse.untrained(CONFIG, seed) for seed in (3, 3, 4))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), first, again)
    assert all(jax.tree.leaves(same))
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    assert any((a != b).any() for a, b in leaves)


def test_a_loss_rises_from_the_second_half_of_the_training_length():
    settings = dict(train_length=8, width=4, times=2)
    reading = Record("", "", "", settings, 0, {"loss": [1.0, 2.0, 2.0, 8.0, 99.0]}, 1.0, {})
    assert collapse_readings.rise_of(reading) == 2.5


def test_means_judge_the_tenth_of_the_heads():
    shares = np.arange(1, 21) / 20
    assert state_collapse.kept_by_top(np.log(shares)) == pytest.approx(0.975)
    assert state_collapse.kept_by_top(np.log(shares[:4])) == pytest.approx(0.2)
    grown = [np.ones(21), np.arange(21.0)]
    assert state_collapse.growth_of_outliers(grown) == pytest.approx(19)


KEYS = {
    "model.pattern": ("mamba2",),
    "model.repeats": 1,
    "model.d_model": 8,
    "model.position": "none",
    "model.vocab_size": 7,
    "model.mixers.mamba2.state_dim": 4,
    "model.mixers.mamba2.head_dim": 16,
    "data.seq_len": 8,
    "train.steps": 2,
    "train.log_every": 1,
    "optimizer.learning_rate": 0.0,
    "optimizer.warmup_steps": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize("carry", [1, 2])
def test_carried_state_reads_on_over_rows(carry, tmp_path):
    """At rate 0 the losses of a training are those of a reading of its rows."""
    rows = {"keys": 4, "values": 2, "window": 3}
    size = max(8, jax.device_count())  # a row for each device that JAX has started with
    keys = KEYS | {"data.batch_size": size}
    settings = {"data": "stream", "rows": rows, "carry": carry, "train": keys}
    model = training.trained(Workspace(tmp_path, tmp_path), settings, seed=3)
    losses = [row["loss"] for row in metrics(model.folder, "train")]
    make = training.make_rows("stream", rows)
    want = []
    for step in range(0, 2, carry):
        batch = make("train", size, carry * 8, (3, step + 1))
        found = state_collapse.read(
            model.config, model.params, batch["tokens"], batch["targets"], chunk=8
        )
        want += state_collapse.by_position(found["nll"], batch["weights"], 8)
    assert losses == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(("last", "collapsed"), [(1.9, False), (2.1, True)])
def test_collapse_is_twice_the_greatest_loss_within(last, collapsed):
    found = state_collapse.judge_collapse([0.2, 1.0, 1.2, last], width=4, train_length=8)
    assert found.ratio == last and found.collapsed == collapsed
    assert found.position == (16 if collapsed else None)
    with pytest.raises(ValueError, match="train_length=16"):
        state_collapse.judge_collapse([1.0, 1.0], width=8, train_length=16)


def test_buckets_are_weighted():
    values, weights = (
        np.array([[1.0, 2, 3, 4], [5, 6, 7, 8]]),
        np.array([[1, 0, 1, 1], [1, 0, 0, 1]]),
    )
    assert state_collapse.by_position(values, weights, 2) == [3.0, 5.0]
    with pytest.raises(ValueError, match="no token that counts"):
        state_collapse.by_position(values, np.zeros((2, 4)), 2)


# Claims of made-up numbers: of all sizes and lengths, the loss within is 1.

MITIGATED = {FORGET: 1.2, WINDOW: 1.4, NORM: 1.9, HALF_STEP: 1.6}


def made(beyond, *, kind="stream", recall=None, kept=None, mitigated=None):
    """Records of three sizes at lengths 16, 32, 64: beyond(size, length, seed) is the last loss."""
    records = []
    sizes = (1000, 2000, 4000) if kind == "stream" else (4000,)
    mitigated = MITIGATED if mitigated is None else mitigated

    def add(measure, n_s, length, seed, result, carry=1):
        settings = dict(
            kind=kind, measure=measure, size=[2, 8], state_dim=n_s, state_elements=n_s,
            train_length=length, carry=carry, width=8, times=4, at=16,
        )  # fmt: skip
        cell = f"{measure}-{kind}-{n_s}-{length}-{carry}-{seed}"
        records.append(Record("stuffed_mamba", cell, "", settings, seed, result, 1.0, {}))

    for n_s, length, seed in itertools.product(sizes, (16, 32, 64), (0, 1)):
        worst = kind == "stream" and n_s == 4000 and length == 16
        last = beyond(n_s, length, seed)
        reading = {
            "loss": [1.0] * (length // 8) + [last] * (3 * length // 8),
            "first_token": [[math.log(0.95 if kept is None else kept)] * 2],
            "untrained": [math.log(0.9)] * 2,
            "state_variance": [[1.0, 1.0], [last, last]],
            "state_mean": [[0.0, 0.0]] * 2,
        }
        add("read", n_s, length, seed, reading)
        answers = {"16": 1.0, "32": 0.97 if n_s >= (recall or 2000) else 0.5}
        if kind == "stream":
            add("recall", n_s, length, seed, answers)
        if worst:
            of = lambda **losses: {
                k: {"within": 1.0, "beyond": x, "chosen": {}} for k, x in losses.items()
            }
            add("mitigate", n_s, length, seed, of(**{NONE: last}, **mitigated))
            add("mitigate", n_s, length, seed, of(**{CARRIED: 1.3}), 12)
            add("mitigate", n_s, 64, seed, of(**{LONGER: 1.0}))
    return records


def by_size(n_s, length, seed):
    """Safe from 16, 32 and 64 tokens on."""
    return 3.0 if length < {1000: 16, 2000: 32, 4000: 64}[n_s] else 1.1


def statuses(records):
    return {c.name: c.status for c in claims.claims(Records(records))}


def test_claims_that_hold_are_shown():
    texts = [made(by_size, kind=kind) for kind in tables.TEXTS]
    found = statuses(sum(texts, made(by_size)))
    for name in (
        "state collapse on a stream of recalls",
        "state collapse on Python source code",
        "state collapse on English Wikipedia articles",
        "larger states need longer training",
        "heads that never forget",
        "states that explode",
        "larger states recall from farther",
        *(NAMES[name] for name in (FORGET, WINDOW, NORM, HALF_STEP, CARRIED, LONGER)),
    ):
        assert found[name] == "shown", name
    assert found["laws' coefficients"] == "needs scale: accelerator"


@pytest.mark.parametrize(
    ("name", "records"),
    [
        # Long training collapses as well; or one seed of short training does not.
        ("state collapse on a stream of recalls", lambda: made(lambda n, t, s: 3.0)),
        (
            "state collapse on a stream of recalls",
            lambda: made(lambda n, t, s: 1.5 if s and t == 16 else by_size(n, t, s)),
        ),
        (
            "state collapse on English Wikipedia articles",
            lambda: made(lambda n, t, s: 1.1, kind="wikipedia"),
        ),
        # The same length is enough for all; or the largest state needs the least.
        (
            "larger states need longer training",
            lambda: made(lambda n, t, s: 3.0 if t == 16 else 1.0),
        ),
        (
            "larger states need longer training",
            lambda: made(lambda n, t, s: by_size({1000: 4000, 2000: 2000, 4000: 1000}[n], t, s)),
        ),
        (NAMES[FORGET], lambda: made(by_size, mitigated={FORGET: 2.1})),
        (NAMES[WINDOW], lambda: made(by_size, mitigated={WINDOW: 3.5})),
        # Not nearly all; or no more than before training.
        ("heads that never forget", lambda: made(by_size, kept=0.5)),
        ("heads that never forget", lambda: made(by_size, kept=0.9)),
        ("states that explode", lambda: made(lambda n, t, s: 1.5)),
        ("larger states recall from farther", lambda: made(by_size, recall=10**6)),
    ],
)
def test_claims_can_fail(name, records):
    assert statuses(records())[name] == "not shown"


def test_a_size_without_a_safe_length_counts_above_all():
    records = Records(made(lambda n, t, s: 3.0 if n == 4000 else by_size(n, t, s)))
    safe = quantities.safe_lengths(records)
    assert safe == {1000: [16, 16], 2000: [32, 32], 4000: [math.inf, math.inf]}
    (table,) = [t for t in tables.tables(records) if t.name == "laws"]
    assert table.rows[-1][2] == "> 64, > 64"


def test_a_model_is_judged_against_the_one_trained_longest():
    """Where the control's loss rises as much in the same buckets, nothing collapses."""
    records = made(by_size)
    for record in records:
        if record.settings["measure"] == "read" and record.settings["train_length"] == 64:
            # From the shortest training length on, where it is judged by buckets 2 to 8.
            record.result["loss"][2:8] = [2.9] * 6
    judged = collapse_readings.over_control(quantities.read(Records(records), "stream"))
    shortest = Records(records).select(measure="read", state_elements=4000, train_length=16)
    assert [judged(r) for r in shortest] == pytest.approx([3.0 / 2.9] * 2)
    assert statuses(records)["state collapse on a stream of recalls"] == "not shown"
    assert collapse_readings.over_control(shortest)(next(iter(shortest))) == 1  # the longest


def test_recall_is_that_of_the_best_training_length():
    records = Records(made(by_size))
    for record in records.select(measure="recall", train_length=64):
        record.result["16"] = 0.5
    assert collapse_readings.recall_lengths(quantities.recalls(records))[4000] == [32, 32]


def test_training_asks_for_the_whole_row_and_reading_within_the_window():
    make = training.make_rows("stream", {"keys": 64, "values": 5, "window": 1})
    lags = {}
    for split in ("train", "test"):
        batch = make(split, 32, 40, (0,))
        lags[split] = max(
            (t - u) // 2
            for row, weights in zip(batch["tokens"], batch["weights"], strict=True)
            for t in np.flatnonzero(weights)
            for u in range(t - 2, -1, -2)
            if row[u] == row[t] and row[t] not in row[u + 2 : t : 2]
        )
    assert lags["train"] > 3 * lags["test"]  # blanks lie between


def test_an_incomplete_seed_has_no_safe_length():
    missing = lambda r: r.seed == 1 and r.settings["train_length"] == 32
    records = Records([r for r in made(by_size) if not missing(r)])
    assert quantities.safe_lengths(records)[2000] == [32]


def test_mitigations_are_shares_of_the_excess():
    cuts = collapse_readings.excess_cuts(Records(made(by_size)))
    want = {FORGET: 0.9, WINDOW: 0.8, NORM: 0.55, HALF_STEP: 0.7, CARRIED: 0.85, LONGER: 1.0}
    assert {name: cut.mean for name, cut in cuts.items()} == pytest.approx(want)


def test_an_excess_is_over_a_models_own_loss():
    """A model whose loss is high everywhere, and the same beyond T, has none."""
    records = Records(made(by_size))
    for record in records.select(measure=MITIGATE, train_length=16, carry=1):
        record.result[FORGET].update(within=2.0, beyond=2.0)
    assert collapse_readings.excess_cuts(records)[FORGET].mean == 1


@pytest.mark.slow
def test_scales_have_their_sizes_and_cells_names_of_their_own():
    for scale in SCALES:
        made = cells.cells(papers.load_config("stuffed_mamba", scale))
        assert len({cell.id for cell in made}) == len(made)
        if scale == "accelerator":
            sizes = {cell.settings["state_elements"] for cell in made}
            assert sizes == {published.state_elements(*size[1:]) for size in published.SIZES}


def test_cells_of_a_model_ask_for_the_same_one():
    made = cells.cells(papers.load_config("stuffed_mamba", "cpu"))
    models = {}
    for cell in made:
        models.setdefault(json.dumps([cell.settings["model"], cell.seed]), []).append(cell)
    # What is mitigated, text, and what is only read; what is read and asked for a passkey.
    counts = [len(asking) for asking in models.values()]
    assert {n: counts.count(n) for n in set(counts)} == {1: 31, 2: 72}
