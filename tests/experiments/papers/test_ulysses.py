"""Ulysses' experiments: what its cells count, and what its claims say of numbers."""

import dataclasses

import pytest

from tilescan.experiments.harness import registry as papers
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.measurements.sharded_transformer import shape_of, step_memory
from tilescan.experiments.measurements.traffic import sent_bytes
from tilescan.experiments.papers.ulysses import cells, claims, tables


def record(kind, result, **settings):
    cell = "-".join(map(str, (kind, *settings.values())))
    return Record("ulysses", cell, "", {"kind": kind, **settings}, 0, result, 1.0, {})


def status(records, name):
    return {c.name: c for c in claims.claims(Records(records))}[name].status


def test_cells_are_unique_at_every_scale():
    for scale in papers.SCALES:
        made = cells.cells(papers.load_config("ulysses", scale))
        assert len({cell.id for cell in made}) == len(made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "gqa", "alibi", "sparse", "ssd"])
def test_exactness_is_measured_for_any_attention(kind):
    settings = {"attention": kind, "devices": 2, "length": 64, "heads": 2, "dim": 8}
    found = cells.exactness(settings, 0)
    # Whole heads may come out to the same bits on one device and on two.
    assert 0 <= found["output"] < 1e-5 and 0 <= found["gradients"] < 1e-5


@pytest.mark.slow
def test_exactness_sees_a_wrong_op(monkeypatch):
    made = cells._attention

    def wrong(settings, rng):
        alone, sharded, arrays = made(settings, rng)
        return alone, lambda *arrays: 1.01 * sharded(*arrays), arrays

    monkeypatch.setattr(cells, "_attention", wrong)
    settings = {"attention": "full", "devices": 2, "length": 32, "heads": 2, "dim": 8}
    found = cells.exactness(settings, 0)
    assert found["output"] > 1e-3 and found["gradients"] > 1e-3


def test_unknown_attention_is_named():
    settings = {"attention": "dense", "devices": 2, "length": 32, "heads": 2, "dim": 8}
    with pytest.raises(ValueError, match="attention='dense' is unknown"):
        cells.exactness(settings, 0)


@pytest.mark.slow
def test_compiled_layers_send_what_the_formulas_say():
    settings = {"devices": 2, "length": 32, "width": 16, "heads": 2}
    ways = ["ulysses", "megatron_sp"]
    found = record("traffic", cells.traffic({**settings, "ways": ways}, 0), **settings)
    for way in ways:
        assert sent_bytes(found, way) == tables.formula(found, way)
    assert sent_bytes(found, "ulysses") == 4 * 4 * 32 * 16 / 4


@pytest.mark.slow
def test_memory_of_a_step_counts_adam_and_shrinks_with_the_devices():
    base = {"layers": 2, "width": 32, "heads": 2, "vocab_size": 64, "unit": 16}
    shape = shape_of({**base, "length": 64}, **cells.step_options(base))
    one, two = (step_memory("ulysses", shape, n) for n in (1, 2))
    weights = 4 * (2 * (12 * 32**2 + 2 * 32) + 64 * 32)
    assert one["moments"] == 2 * weights and one["results"] >= weights
    assert two["total"] < 0.8 * one["total"]


def counts(n):
    return {"all-to-all": {"bytes": n, "runs": 1}}


def traffic(P, N, mine=1.0, theirs=1.0, back=2.0):
    whole = 4 * N * 32
    sent = {"ulysses": mine * 4 * whole * (P - 1) / P**2}
    sent["megatron_sp"] = theirs * 4 * whole * (P - 1) / P
    result = {w: {"forward": counts(n), "both": counts(back * n)} for w, n in sent.items()}
    return record("traffic", result, devices=P, length=N, width=32, heads=16)


def test_volumes_can_refute():
    good = [traffic(2, 64), traffic(4, 128), traffic(16, 512)]
    names = {
        "volume of Ulysses": [traffic(2, 64, mine=1.02)],
        "volume of Megatron-SP": [traffic(2, 64, theirs=0.9)],
        "the backward pass sends as much": [traffic(2, 64, back=3.0)],
        "Megatron-SP sends P times as much": [traffic(2, 64, mine=1.1)],
        "constant volume when sequences grow with the devices": [
            traffic(2, 64), traffic(4, 128, mine=2.0),
        ],
        "more than ten times less communication": [traffic(16, 512, mine=2.0)],
    }  # fmt: skip
    for name, bad in names.items():
        assert status(good, name) == "shown", name
        assert status(bad, name) == "not shown", name
    assert status(good[:2], "more than ten times less communication") == "needs scale: cpu"


def longest(way, **lengths):
    return [
        record("longest", {"length": n}, way=way, devices=int(P[1:])) for P, n in lengths.items()
    ]


def test_longest_sequences_can_refute():
    grows = "the longest sequence grows with the devices"
    bounded = "four times longer sequences than Megatron-SP"
    mine = longest("ulysses", P1=10, P2=80, P8=330, P64=2500)
    assert status(mine, grows) == "shown"
    assert status(longest("ulysses", P2=80, P8=420), grows) == "not shown"  # too fast
    assert status(longest("ulysses", P2=80, P8=200), grows) == "not shown"
    assert status(mine + longest("megatron_sp", P2=80, P64=500), bounded) == "shown"
    assert status(mine + longest("megatron_sp", P2=80, P64=2000), bounded) == "not shown"


def test_exactness_and_training_can_refute():
    exact = lambda e: [record("exactness", {"output": e, "gradients": 0.0}, attention="full")]
    assert status(exact(1e-6), "any attention is exact") == "shown"
    assert status(exact(1e-4), "any attention is exact") == "not shown"

    def trained(*apart):
        """Of seeds whose losses over devices are so far apart from one device's."""
        runs = [(seed, parts) for seed in range(len(apart)) for parts in (1, 8)]
        losses = lambda seed, parts: [2.0 + seed, 1.0 + (parts > 1) * apart[seed]]
        return [
            dataclasses.replace(
                record("training", {"losses": losses(*run)}, parts=run[1], dtype="float64"),
                seed=run[0],
            )
            for run in runs
        ]

    assert status(trained(1e-6, 1e-6), "training is the same") == "shown"
    assert status(trained(1e-6, 1e-3), "training is the same") == "not shown"
    assert status(trained(1e-3, 1e-6), "training is the same") == "not shown"
