"""ZeCO's experiments: what its cells count, and what its claims say of numbers."""

import pytest

from tilescan.experiments.harness import registry as papers
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.papers.zeco import cells, claims, tables


def record(kind, result, **settings):
    cell = "-".join(map(str, (kind, *settings.values())))
    return Record("zeco", cell, "", {"kind": kind, **settings}, 0, result, 1.0, {})


def status(records, name):
    return {c.name: c for c in claims.claims(Records(records))}[name].status


def test_cells_are_unique_at_every_scale():
    for scale in papers.SCALES:
        made = cells.cells(papers.load_config("zeco", scale))
        assert len({cell.id for cell in made}) == len(made)


@pytest.mark.parametrize(
    ("P", "K"), [*(pytest.param(*c, marks=pytest.mark.slow) for c in ((2, 4), (4, 4))), (8, 2)]
)
def test_all_scan_alone_is_counted(P, K):
    settings = {"devices": P, "blocks": K, "heads": 2, "dim": 8}
    found = cells.all_scan(settings, 0)
    state = 4 * 2 * 8 * 8
    assert found["state_bytes"] == found["useful_bytes"] == state
    assert found["messages"] == P + K - 2
    assert found["bytes"] == (P + K - 2) * state / K


def test_a_device_needs_to_send_each_block_once():
    for P, K in ((1, 4), (2, 1), (5, 3), (16, 4)):
        assert cells.useful_blocks(P, K) == (K if P > 1 else 0)


@pytest.mark.slow
def test_schedules_are_exact_by_their_largest_difference():
    settings = {"devices": 2, "length": 16, "heads": 1, "dim": 4}
    settings |= {"decays": ["scalar"], "dtypes": ["float64"]}
    found = cells.exactness(settings, 0)
    errors = [e for kind in found["float64 scalar"].values() for e in kind.values()]
    assert len(errors) == 8 and max(errors) < 1e-13


def counts(sent, messages, both=None):
    bytes_ = lambda n: {"collective-permute": {"bytes": n, "runs": 1}}
    return {"forward": bytes_(sent), "both": bytes_(both or 2 * sent), "messages": messages}


def traffic(P, **changes):
    state = 4 * 2 * 4 * 4
    result = {
        "all_scan": counts((2 * P - 2) * state // P, 2 * P - 2),
        "chain": counts((P - 1) * state, P - 1),
        "all_gather": counts((P - 1) * state, 1),
        "log_step": counts(3 * state, 1 + (P - 2).bit_length()),
        "ring": counts(100 * P * state, P - 1),
    }
    shape = {"length": 1024, "heads": 2, "dim": 4}
    return record("traffic", result | changes, devices=P, **shape)


def blocks(P, K, extra=0, useful=1):
    state = 128
    result = {
        "bytes": (P + K - 2 + extra) * state / K,
        "messages": P + K - 2 + extra,
        "useful_bytes": useful * state,
        "state_bytes": state,
    }
    return record("blocks", result, devices=P, blocks=K, heads=2, dim=4)


def test_volumes_can_refute():
    one = "one state a device, however many devices"
    assert status([blocks(4, 8), blocks(8, 8)], one) == "shown"
    assert status([blocks(4, 8), blocks(8, 8, extra=1)], one) == "not shown"
    assert status([blocks(4, 8), blocks(8, 8, useful=2)], one) == "not shown"
    idle = "idle ticks cost less than a state"
    assert status([blocks(8, 8)], idle) == "shown"
    assert status([blocks(8, 8, extra=3)], idle) == "not shown"
    path = "critical path of 1 + (P - 1) / K states"
    assert status([blocks(64, 8)], path) == "shown"
    assert status([blocks(64, 8, extra=3)], path) == "not shown"
    grows = "LASP-2's volume grows with the devices"
    assert status([traffic(2), traffic(8)], grows) == "shown"
    constant = traffic(8, all_gather=counts(128, 1))
    assert status([traffic(2), constant], grows) == "not shown"
    steps = "LASP-1 waits for P - 1 states"
    assert status([traffic(2), traffic(8)], steps) == "shown"
    assert status([traffic(8, chain=counts(7 * 128, 6))], steps) == "not shown"
    back = "the backward pass is one scan more"
    assert status([traffic(8)], back) == "shown"
    assert status([traffic(8, chain=counts(896, 7, 3 * 896))], back) == "not shown"
    keys = "states are less than keys"
    assert status([traffic(8)], keys) == "shown"
    assert status([traffic(8, ring=counts(10, 7))], keys) == "not shown"


def test_exactness_and_training_can_refute():
    def exact(single, double):
        errors = lambda e: {kind: {"output": e, "gradients": e / 2} for kind in tables.KINDS}
        result = {"float32 vector": errors(single), "float64 vector": errors(double)}
        return [record("exactness", result, devices=4, length=8, heads=2, dim=4)]

    assert status(exact(1e-6, 1e-14), "all schedules are exact") == "shown"
    assert status(exact(1e-4, 1e-14), "all schedules are exact") == "not shown"
    assert status(exact(1e-6, 1e-9), "all schedules are exact") == "not shown"

    def trained(step, apart):
        curve = [1.0] * 30
        base = {"dtype": "float64"}
        other = [*curve[:step], 1.0 + apart, *curve[step + 1 :]]
        return [
            record("training", {"losses": curve}, schedule="one device", parts=1, **base),
            record("training", {"losses": other}, schedule="chain", parts=4, **base),
        ]

    early, late = "training is the same: 20 steps", "training is the same: all steps"
    assert status(trained(5, 1e-6), early) == status(trained(25, 1e-6), late) == "shown"
    assert status(trained(25, 1e-3), early) == "shown"
    assert status(trained(25, 1e-3), late) == "not shown"
    assert status(trained(5, 1e-3), early) == "not shown"


def test_published_times_are_modelled_by_their_ends():
    published = {2: 10.0, 4: 20.0, 8: 30.0}
    model = tables.modelled(published, {2: 1, 4: 3, 8: 7})
    assert model == pytest.approx({2: 10.0, 4: 10 + 2 * 20 / 6, 8: 30.0})
    assert tables.modelled(published, {4: 3}) == {}
    name = "published seconds follow the counted steps"
    found = [traffic(P) for P in (8, 32, 128)] + [blocks(P, 128) for P in (8, 32, 128)]
    assert status(found, name) == "shown"
    # Were All-Scan's steps to grow with the square of the devices, times between would not fit.
    found = [r for r in found if r.settings["kind"] == "traffic"]
    found += [blocks(8, 128), blocks(32, 128, extra=5000), blocks(128, 128, extra=6000)]
    assert status(found, name) == "not shown"
