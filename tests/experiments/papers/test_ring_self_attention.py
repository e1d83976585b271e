"""RSA's experiments: what its cells count, and what its claims say of numbers."""

import pytest

from tilescan.experiments.harness import registry as papers
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.measurements.traffic import sent_bytes
from tilescan.experiments.papers.ring_self_attention import cells, claims, tables

MODEL = {"layers": 2, "width": 16, "heads": 2, "vocab_size": 32}


def record(kind, result, **settings):
    cell = "-".join(map(str, (kind, *settings.values())))
    return Record("ring_self_attention", cell, "", {"kind": kind, **settings}, 0, result, 1.0, {})


def status(records, name):
    return {c.name: c for c in claims.claims(Records(records))}[name].status


def test_cells_are_unique_and_heads_limit_tensor_parallelism():
    for scale in papers.SCALES:
        made = cells.cells(papers.load_config("ring_self_attention", scale))
        assert len({cell.id for cell in made}) == len(made)
        for cell in made:
            if cell.settings.get("way") in ("tensor", "ulysses"):
                assert cell.settings["heads"] % cell.settings["devices"] == 0


SLOW = ("rsa_all_reduce", "ring", "ulysses", "tensor")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in cells.TRAFFIC],
)
def test_compiled_layers_send_what_the_formulas_say(name, monkeypatch):
    monkeypatch.setattr(cells, "TRAFFIC", {name: cells.TRAFFIC[name]})
    # On two devices a ring is one message, which the compiler sends once for both passes.
    settings = {"devices": 4, "batch": 1, "length": 16, "width": 16, "heads": 4}
    found = record("traffic", cells.traffic(settings, 0), **settings)
    assert sent_bytes(found, name, "both") == tables.formula(found, name)
    assert tables.formula(found, "tensor") == 8 * 3 * 4 * 4 * 16


@pytest.mark.slow
def test_memory_is_flat_for_a_device_with_as_much_work():
    settings = {"way": "ring_self_attention", "length": 64, **MODEL}
    one, two = (
        cells.memory({**settings, "devices": n, "batch": 4 * n}, 0)
        for n in (2, 4)  # one has nothing to receive
    )
    assert abs(two["total"] / one["total"] - 1) < 0.1  # at such sizes buffers are rounded


@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_does_not():
    settings = {"way": "ring_self_attention", "devices": 2, "length": 16, "vary": "batch", **MODEL}
    settings |= {"gib": 0.0004, "tolerance": 0.0}
    found = cells.largest_size(settings, 0)
    size = lambda batch: cells.memory({**settings, "batch": batch}, 0)
    budget = settings["gib"] * 2**30
    assert found["bytes"]["total"] <= budget < size(found["value"] + 1)["total"]


@pytest.mark.slow
def test_exactness_is_measured_against_dense_attention():
    settings = {"devices": 2, "length": 8, "heads": 2, "dim": 4}
    found = cells.exactness(settings, 0)
    assert set(found) == set(cells.ATTENTION)
    assert max(e for errors in found.values() for e in errors.values()) < 1e-14


def weak(grows, way, **sizes):
    shape = {"batch": 8, "length": 8, **MODEL}
    return [
        record("weak", {"total": size}, grows=grows, way=way, devices=int(n[1:]), **shape)
        for n, size in sizes.items()
    ]


def test_memory_can_refute():
    flat = "RSA's memory stays flat when batches grow"
    assert status(weak("batch", "ring_self_attention", N1=100, N4=101), flat) == "shown"
    assert status(weak("batch", "ring_self_attention", N1=100, N4=110), flat) == "not shown"
    grows = "tensor parallelism's memory grows with batches"
    assert status(weak("batch", "tensor", N1=100, N4=130), grows) == "shown"
    assert status(weak("batch", "tensor", N1=100, N4=110), grows) == "not shown"
    sequences = "RSA's memory grows less when sequences grow"
    ours = weak("length", "ring_self_attention", N1=100, N4=180)
    assert status(ours + weak("length", "tensor", N1=100, N4=220), sequences) == "shown"
    assert status(ours + weak("length", "tensor", N1=100, N4=170), sequences) == "not shown"


def largest(vary, way, kind="largest", **values):
    return [
        record(kind, {"value": v}, vary=vary, way=way, devices=int(n[1:]))
        for n, v in values.items()
    ]


@pytest.mark.parametrize(
    ("vary", "name"), [("batch", "larger batches"), ("length", "longer sequences")]
)
def test_largest_sizes_can_refute(vary, name):
    tensor = largest(vary, "tensor", N4=10, N12=20)
    name = f"{name} than tensor parallelism"
    assert status(tensor + largest(vary, "ring_self_attention", N12=90, N64=300), name) == "shown"
    small = largest(vary, "ring_self_attention", N12=21, N64=22)
    assert status(tensor + small, name) == "not shown"
    few = largest(vary, "ring_self_attention", N8=90)
    assert status(tensor + few, name) == "needs scale: cpu"


def test_sparse_sequences_must_grow_with_the_devices():
    name = "sequences grow with the devices under sparse attention"
    sparse = lambda **n: largest("length", "linformer", "sparse", **n)
    assert status(sparse(N1=100, N32=2700), name) == "shown"
    assert status(sparse(N1=100, N32=600), name) == "not shown"


def test_crossings_lie_between_the_measured_points():
    def at(n, tokens, gap):
        result = {"tensor": {"kept": 100 + gap, "total": 100}}
        result["sequence"] = {"kept": 100, "total": 200}
        return record("crossover", result, devices=n, tokens=tokens, width=8)

    found = Records([at(2, 24, -8), at(2, 40, 8), at(2, 64, 32)])
    assert tables.crossings(found, "kept") == {2: 32.0}
    assert tables.crossings(found, "total") == {2: None}
    name = "an MLP's crossover at B L = 32 H: "
    assert status(list(found), name + "what is kept") == "shown"
    assert status(list(found), name + "all buffers") == "not shown"
    assert status([at(2, 8, -1), at(2, 16, 1)], name + "what is kept") == "not shown"


def test_volume_exactness_and_training_can_refute():
    def sent(tensor=1.0, scattered=0.75):
        shard = 4 * 2 * 8 // 2 * 16
        both = lambda x: {"both": {"all-reduce": {"bytes": x * 8 * shard, "runs": 1}}}
        result = {"tensor": both(tensor), "rsa_all_reduce": both(1.0)}
        result["rsa_reduce_scatter"] = both(scattered)
        return [record("traffic", result, devices=2, batch=2, length=8, width=16)]

    same, saves = "RSA sends what tensor parallelism sends", "a reduce-scatter saves a quarter"
    assert status(sent(), same) == status(sent(), saves) == "shown"
    assert status(sent(tensor=0.5), same) == "not shown"
    assert status(sent(scattered=1.0), saves) == "not shown"
    exact = lambda e: [
        record("exactness", {"rsa_all_reduce": {"output": e, "gradients": 0}}, devices=2)
    ]
    assert status(exact(1e-14), "RSA is exact") == "shown"
    assert status(exact(1e-9), "RSA is exact") == "not shown"
    trained = lambda apart: [
        record("training", {"losses": [2.0, 1.0]}, parts=1, dtype="float64"),
        record("training", {"losses": [2.0, 1.0 + apart]}, parts=4, dtype="float64"),
    ]
    assert status(trained(1e-6), "convergence is the same") == "shown"
    assert status(trained(1e-3), "convergence is the same") == "not shown"
