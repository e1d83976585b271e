"""FlashAttention-2's formulas and claims, both ways."""

import jax
import numpy as np
import pytest

from tilescan.experiments.harness import registry as papers
from tilescan.experiments.harness import tables
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.measurements import attention, attention_counts, training_steps
from tilescan.experiments.papers import flash_attention_2
from tilescan.experiments.papers.flash_attention_2 import cells
from tilescan.ops import masks, reference

SETTINGS = {"kind": "speed", "batch": 1, "length": 4096, "heads": 8, "head_dim": 64, "dtype": "f"}


def speed(**medians):
    base = {
        f"{v} {m} {d}": 70.0
        for v in ("standard", "tiled")
        for m in ("full", "causal")
        for d in ("forward", "forward_backward")
    }
    base |= {name.replace("__", " "): value for name, value in medians.items()}
    result = {n: {"median_ms": v, "samples_ms": [v, v]} for n, v in base.items()}
    return Record("flash_attention_2", "speed", "", SETTINGS, 0, result, 1.0, {})


def counts(**changes):
    one = dict(visits=4, matmul_flops=9, exps=5, rescales=8, divisions=8, other_ops=21, traffic=3)
    two = {**one, "rescales": 4, "divisions": 2, "other_ops": 11} | changes
    settings = {"kind": "counts", "length": 2, "head_dim": 1, "causal": False,
                "block_q": 1, "block_k": 1}  # fmt: skip
    return Record("flash_attention_2", "c", "", settings, 0, {"fa1": one, "fa2": two}, 1.0, {})


def claim(name, *made):
    return next(c for c in flash_attention_2.PAPER.claims(Records(made)) if c.name == name)


def test_flops_are_the_papers_formula():
    forward = attention.flops(SETTINGS, "forward", causal=False)
    assert forward == 4 * 4096**2 * 64 * 8
    assert attention.flops(SETTINGS, "backward", causal=False) == 2.5 * forward
    assert attention.flops(SETTINGS, "forward_backward", causal=True) == (3.5 * forward / 2)


def test_backward_is_the_difference():
    made = speed(tiled__full__forward=20.0)
    both, forward, backward = (
        attention.milliseconds(made, "tiled", "full", d)
        for d in ("forward_backward", "forward", "backward")
    )
    assert (both, forward, backward) == (70.0, 20.0, 50.0)


@pytest.mark.parametrize(
    ("causal", "status"), [(40.0, "shown"), (60.0, "not shown"), (30.0, "not shown")]
)
def test_causal_gain(causal, status):
    assert claim("causal masks", speed(tiled__causal__forward=causal)).status == status


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize(("tiled", "status"), [(20.0, "shown"), (30.0, "not shown")])
def test_over_standard(mask, tiled, status):
    made = speed(**{f"tiled__{mask}__forward_backward": tiled})
    assert claim(f"over standard attention, {mask}", made).status == status
    other = {"full": "causal", "causal": "full"}[mask]
    assert claim(f"over standard attention, {other}", made).status == "not shown"


@pytest.mark.parametrize(
    ("live", "partial", "status"),
    [(36, 8, "shown"), (64, 8, "not shown"), (36, 36, "not shown")],
)
def test_skipped_tiles(live, partial, status):
    result = {"all": 64, "live": live, "partial": partial}
    settings = {"kind": "tiles", "side": 8, "block": 64}
    made = Record("flash_attention_2", "t", "", settings, 0, result, 1.0, {})
    assert claim("skipped tiles", made).status == status


def test_masks_leave_the_lower_triangle_of_tiles():
    found = attention_counts.causal_tiles({"side": 8, "block": 16}, 0)
    assert found == {"all": 64, "live": 36, "partial": 8}


def training(length, standard, tiled):
    result = {
        n: {"median_ms": v, "samples_ms": [v, v]}
        for n, v in (("standard", standard), ("tiled", tiled))
    }
    keys = {"data.seq_len": length, "data.batch_size": 2, "model.repeats": 3, "model.d_model": 8}
    settings = {"kind": "training", "repeats": 2, "train": keys}
    result["parameters"] = 10**6
    return Record("flash_attention_2", f"training-T{length}", "", settings, 0, result, 1.0, {})


def test_training_table_has_the_papers_speeds_and_ours_by_its_formula():
    table = flash_attention_2.PAPER.tables(Records([training(100, 20.0, 10.0)]))[-1]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["GPT3-1.3B, 8k"][:4] == [72, 170, 220, pytest.approx(220 / 72)]
    assert rows["GPT3-2.7B, 2k"][:3] == [149, 189, 205]
    operations = 2 * (6 * 100 * 10**6 + 12 * 3 * 8 * 100**2)
    standard, tiled, gain = rows["1.0M parameters, 100"][4:]
    assert standard == pytest.approx(operations / 20e-3 / 1e9) and tiled == 2 * standard
    assert gain == tables.Spread(2.0, 0.0, 2)


@pytest.mark.parametrize(
    ("short", "long", "status"),
    [(11, 13, "shown"), (11, 11.5, "not shown"), (14, 13, "not shown")],
)
def test_training_must_gain_more_at_longer_contexts(short, long, status):
    made = training(64, short, 10.0), training(256, long, 10.0)
    assert claim("faster training", *made).status == status
    assert claim("faster training", made[0]).evidence == "its measurements are missing"


def test_training_steps_differ_in_attention_alone(monkeypatch):
    programs = {}

    def compare(functions, arguments, *, repeats):
        for name, function in functions.items():
            jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*arguments)
            programs[name] = str(jaxpr), jax.tree.map(lambda x: (x.shape, x.dtype), out)
        return {}

    monkeypatch.setattr(training_steps.timing, "compare", compare)
    config = papers.load_config("flash_attention_2", "smoke")
    cell = cells.cells(config)[-1]
    assert cell.measure(cell.settings, 0)["parameters"] > 2000
    (standard, shapes), (tiled, theirs) = programs["standard"], programs["tiled"]
    assert shapes == theirs and standard != tiled

    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 9, 2, 4))
    want = reference.attention(q, k, v, mask=masks.Causal(), scale=0.3)
    got = training_steps.standard_attention(q, k, v, mask=masks.Causal(), scale=0.3)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_accelerator_scale_is_the_papers_grid():
    config = papers.load_config("flash_attention_2", "accelerator").speed
    assert config.lengths == tuple(2**k for k in range(9, 15)) and config.head_dims == (64, 128)
    assert (config.tokens, config.hidden, config.dtype) == (16384, 2048, "bfloat16")
    made = cells.cells(papers.load_config("flash_attention_2", "accelerator"))
    found = [c for c in made if c.settings["kind"] == "speed"]
    assert {c.settings["batch"] * c.settings["length"] for c in found} == {16384}
    assert {c.settings["heads"] * c.settings["head_dim"] for c in found} == {2048}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "shown"),
        ({"divisions": 4}, "not shown"),
        ({"rescales": 5}, "not shown"),
        ({"visits": 3}, "not shown"),
        ({"exps": 6}, "not shown"),
    ],
)
def test_fewer_operations(changes, status):
    assert claim("fewer operations", counts(**changes)).status == status
