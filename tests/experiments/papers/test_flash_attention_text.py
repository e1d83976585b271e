"""Training cells: equal tokens for every context, standard attention by a key, claims."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.workspace import Workspace
from tilescan.experiments.measurements import attention_exactness
from tilescan.experiments.measurements import contexts as long_context
from tilescan.experiments.measurements import static_kernels as static_figures
from tilescan.experiments.measurements import training as measurements
from tilescan.experiments.papers import flash_attention
from tilescan.ops import masks
from tilescan.training import inputs
from tilescan.training.config import settings

KEYS = {
    "data.tokenizer": "byte", "data.sources": ["shakespeare"], "model.repeats": 2,
    "model.d_model": 128, "model.position": "rope", "train.steps": 3,
}  # fmt: skip


def record(kind, result, seed=0, **settings):
    settings = {"kind": kind, "train": KEYS, **settings}
    cell = "-".join(f"{k}{v}" for k, v in settings.items() if k != "train") + f"-{seed}"
    return Record("flash_attention", cell, "", settings, seed, result, 1.0, {"backend": "cpu"})


def claim(name, made):
    return next(c for c in flash_attention.PAPER.claims(Records(made)) if c.name == name)


class Batches:
    """Two batches [2, 8] of counted tokens, resumable like a pipeline's."""

    def __iter__(self):
        batches = [{"tokens": np.arange(16).reshape(2, 8) + 16 * i} for i in range(2)]
        iterator = iter(batches)

        class Iterator:
            __next__ = lambda self: next(iterator)
            get_state = lambda self: {"position": 1}

        return Iterator()


def test_cut_rows_hold_the_same_tokens_in_the_same_order():
    cut = iter(long_context.CutRows(Batches(), 4))
    batch = next(cut)["tokens"]
    assert batch.shape == (4, 4)
    np.testing.assert_array_equal(batch.ravel(), np.arange(16))
    assert cut.get_state() == {"position": 1}
    next(cut)
    with pytest.raises(StopIteration):
        next(cut)


def test_context_must_divide_the_rows(tmp_path):
    settings = {"context": 48, "train": {**KEYS, "data.seq_len": 64}}
    with pytest.raises(ValueError, match="context=48 must divide data.seq_len=64"):
        long_context.run(settings, 0, tmp_path)


def test_standard_attention_is_the_definition_and_nothing_else_differs(monkeypatch, tmp_path):
    trained = []

    def train(config, folder):
        trained.append(config)
        (folder / "metrics.jsonl").write_text("")
        names = ("loss", "perplexity", "accuracy", "weight")
        return {f"test/{name}": 1.0 for name in names}

    monkeypatch.setattr(measurements, "train", train)
    for kind in ({"attention": "standard"}, {"attention": "tiled"}, {}):
        measurements.measure_text({"train": KEYS, **kind}, 0, Workspace(tmp_path))
    standard, tiled, default = (inputs.make_model(settings(config)).config for config in trained)
    assert tiled == default
    assert standard == dataclasses.replace(tiled, attention_implementation="reference")
    with pytest.raises(ValueError, match="attention='dense' is unknown"):
        measurements.measure_text({"train": KEYS, "attention": "dense"}, 0, Workspace(tmp_path))


def test_unknown_key_of_the_training_config_is_refused():
    with pytest.raises((KeyError, AttributeError), match="seq_length"):
        measurements.training_config({"data.seq_length": 64}, 0)


@pytest.mark.parametrize(("gap", "status"), [(1e-4, "shown"), (0.5, "not shown")])
def test_equal_curves_look_at_every_step(gap, status):
    losses = [3.0, 2.0, 1.0]
    result = {"steps": [1, 2, 3], "train_loss": losses, "test_perplexity": 5.0}
    other = {**result, "train_loss": [3.0, 2.0 + gap, 1.0]}
    made = [
        record("curves", result, attention="standard"),
        record("curves", other, attention="tiled"),
    ]
    assert claim("equal training curves", made).status == status


@pytest.mark.parametrize(
    ("long", "status"),
    [
        ((9.6, 9.7, 10.1), "shown"),
        ((9.6, 9.7, 10.4), "not shown"),  # one seed the other way
        ((9.89, 9.99, 10.29), "not shown"),  # too little
    ],
)
def test_longer_context_must_gain_with_every_seed(long, status):
    made = [
        record("context", {"test_perplexity": p}, seed, context=context)
        for context, values in ((64, (9.9, 10.0, 10.3)), (512, long))
        for seed, p in enumerate(values)
    ]
    assert claim("longer context", made).status == status
    # Other positions are told of, and decide nothing.
    made += [
        record("context_compared", {"test_perplexity": p}, 0, context=context)
        for context, p in ((64, 8.0), (512, 9.0))
    ]
    found = claim("longer context", made)
    assert found.status == status and "+12.5% (seed 0) from 64 to 512" in found.evidence
    table = next(t for t in flash_attention.PAPER.tables(Records(made)) if t.name == "context")
    assert "Lowest of all is context 64 with rotary positions." in table.note


@pytest.mark.parametrize(("long", "status"), [((0.9, 0.91), "shown"), ((0.7, 0.6), "not shown")])
def test_longer_documents_must_beat_the_seeds(long, status):
    made = [
        record("documents", {"test_accuracy": p}, seed, length=length)
        for length, values in ((32, (0.69, 0.71)), (256, long))
        for seed, p in enumerate(values)
    ]
    found = claim("longer documents", made)
    assert found.status == status
    table = next(t for t in flash_attention.PAPER.tables(Records(made)) if t.name == "documents")
    assert table.rows[-1][:3] == ["16384", 57.1, 79.2]


def exactness(dtype, error):
    names = {"standard, none": 1e-3, "tiled (XLA), as chosen": 1e-7, "tiled (XLA), 64x64": error}
    result = {n: dict.fromkeys(attention_exactness.OUTPUTS, e) for n, e in names.items()}
    return record("exactness", result, dtype=dtype, mask="full", length=8, heads=1, head_dim=8)


@pytest.mark.parametrize(
    ("float32", "bfloat16", "status"),
    [(1e-6, 1.9e-3, "shown"), (3e-6, 1e-3, "not shown"), (1e-6, 2.1e-3, "not shown")],
)
def test_exactness_has_a_bound_for_each_dtype(float32, bfloat16, status):
    made = [exactness("float32", float32), exactness("bfloat16", bfloat16)]
    assert claim("exact attention", made).status == status


@pytest.mark.slow
def test_exactness_is_measured_in_the_tiles_that_are_asked_for():
    settings = {
        "length": 40, "heads": 2, "head_dim": 16, "mask": "causal", "dtype": "float32",
        "tiles": ("8x8", "16x32"), "kernel_tiles": (),
    }  # fmt: skip
    found = attention_exactness.errors(settings, 0)
    tiled = list(found.values())[1:]  # other tiles, other rounding
    assert all(a != b for a, b in itertools.combinations(tiled, 2))
    assert list(found)[2:] == ["tiled (XLA), 8x8", "tiled (XLA), 16x32"]
    assert all(0 < e < 2e-6 for error in found.values() for e in error.values())
    with pytest.raises(ValueError, match="tile='16' must be queries x keys"):
        attention_exactness.errors({**settings, "tiles": ("16",)}, 0)


def textbook(q, k, v, do, visible):
    """(o, dq, dk, dv) by the formulas in NumPy's float64; `visible` is bool [B, 1, T, T]."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    repeats, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    full_k, full_v = (np.repeat(x, repeats, axis=2) for x in (k, v))
    scores = np.where(visible, scale * np.einsum("bthd,bshd->bhts", q, full_k), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    o = np.einsum("bhts,bshd->bthd", weights, full_v)
    dweights = np.einsum("bthd,bshd->bhts", do, full_v)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    dq = np.einsum("bhts,bshd->bthd", dscores, full_k)
    dk = np.einsum("bhts,bthd->bshd", dscores, q)
    dv = np.einsum("bhts,bthd->bshd", weights, do)
    grouped = (*k.shape[:3], repeats, k.shape[3])
    return o, dq, *(x.reshape(grouped).sum(3) for x in (dk, dv))


NAMES = ("full", "causal", "window", "butterfly", "segments", "grouped heads")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in NAMES[2:]),
        ("grouped heads", "bfloat16"),
        *(pytest.param(name, "float32", marks=pytest.mark.slow) for name in NAMES[:2]),
        *(pytest.param(name, "bfloat16", marks=pytest.mark.slow) for name in NAMES[:-1]),
    ],
)
def test_float64_oracle_agrees_with_the_textbook(name, dtype):
    length, groups = 24, 2 if name == "grouped heads" else 4
    rng = np.random.default_rng(0)
    q, do = rng.standard_normal((2, 1, length, 4, 8)).astype(jnp.dtype(dtype))
    k, v = rng.standard_normal((2, 1, length, groups, 8)).astype(jnp.dtype(dtype))
    mask = attention_exactness.make_mask(name, length)
    visible = np.array(masks.as_array(mask, length, length)).reshape(1, 1, length, length)
    o, gradients = attention_exactness.in_float64(do, q, k, v, mask=mask)
    for ours, theirs in zip((o, *gradients), textbook(q, k, v, do, visible), strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, atol=1e-14)


def tpu_row(implementation, kernel, cycles):
    return {
        "implementation": implementation, "kernel": kernel, "mask": "full", "generation": "v5e",
        "cycles": cycles, "bytes": 2**20, "bandwidth_cycles": 15,
        "mxu_share": 0.01 * cycles, "vmem": 2**20 * cycles,
        "shape": {"B": 1, "T": 8, "H": 2, "D": 4},
    }  # fmt: skip


@pytest.mark.parametrize(("stock", "status"), [(31, "shown"), (29, "not shown")])
def test_static_cycles_add_up_our_backward_kernels(stock, status):
    rows = [
        tpu_row("tilescan", "dq", 10),
        tpu_row("tilescan", "dkv", 20),
        tpu_row("jax flash", "backward", stock),
    ]
    made = Records([record("static-tpu", {"rows": rows, "versions": {}})])
    assert static_figures.claims(made)[0].status == status
    table = static_figures.tables(made)[0]
    assert table.rows[0][4:6] == [None, None] and table.rows[1][4:6] == [30, stock]
    row = dict(zip([c.title for c in table.columns], table.rows[1], strict=True))
    assert row["FLOPs"] == 7 * 2 * 8 * 8 * 4 * 2 / 1e9
    assert row["ours, cycles to move them"] == 15 + 15
    assert row["ours, share of the MXU's peak"] == pytest.approx((10 * 0.1 + 20 * 0.2) / 30)
    assert row["ours, VMEM"] == 20


def test_visible_scores_are_counted_by_element():
    made = {"full": masks.Full(), "causal": masks.Causal(), "window 3": masks.SlidingWindow(2)}
    for name, mask in made.items():
        seen = int(np.sum(masks.as_array(mask, 10, 10)))
        assert static_figures.visible_scores(name, 10) == seen


@pytest.mark.parametrize(("spills", "status"), [(0, "shown"), (20, "not shown")])
def test_kernels_must_not_spill(spills, status):
    row = {"kernel": "dkv", "mask": "full", "batch": 1, "heads": 2, "head_dim": 64, "length": 32,
           "dtype": "float16", "registers": 168, "shared_memory": 1024, "spills": spills,
           "loop": {"hgmma": 12, "issue_cycles": 500}}  # fmt: skip
    made = Records([record("static-gpu", {"rows": [row]})])
    assert static_figures.claims(made)[1].status == status
    table = static_figures.tables(made)[1]
    assert table.rows[0][3] == 4 * 2 * 32 * 32 * 64 * 2 / 1e9
    assert table.rows[0][4] == 2 * 32 * (6 * 64 * 2 + 2 * 4) / 2**20  # q k v do dk dv, lse delta


def test_copied_tpu_figures_are_of_one_shape():
    """The file has rows of one head too, which would make two kernels of one in a table."""
    path = static_figures.FOLDER / "tpu_static.json"
    heads = [row["shape"]["H"] for row in json.loads(path.read_text())["rows"]]
    assert set(heads) == {1, 2}
    assert {row["shape"]["H"] for row in static_figures.copy_tpu(path)["rows"]} == {2}


def test_static_cells_exist_where_the_figures_do(tmp_path):
    assert static_figures.cells(tmp_path) == []
    (tmp_path / "tpu_static.json").write_text('{"rows": [], "versions": {}}')
    (cell,) = static_figures.cells(tmp_path)
    assert cell.measure(cell.settings, 0) == {"rows": [], "versions": {}}
