"""The benchmark of scans: its peers compute the same, wrong ones are not timed, and it says so."""

import argparse
import dataclasses

import pytest

from tilescan.benchmarks import scans, scans_cases
from tilescan.benchmarks.scans_cases import Case

SMALL = {
    op: Case(op, "fwd+bwd", 128, H=2 if "H" in output else 1, D=8, N=8)
    for op, (output, _) in scans_cases.LETTERS.items()
}


# Gradients of one op; values of all but one, whose peers are those of gated linear attention.
DIFFERENTIATED = ("linear_recurrence",)
SLOW = ("gated_delta_rule",)


@pytest.mark.parametrize(
    ("op", "direction"),
    [
        *(pytest.param(op, "fwd+bwd" if op in DIFFERENTIATED else "fwd",
                       marks=pytest.mark.slow if op in SLOW else ())
          for op in scans_cases.BY_STEPS),
        *(pytest.param(op, "fwd+bwd", marks=pytest.mark.slow)
          for op in scans_cases.BY_STEPS if op not in DIFFERENTIATED),
    ],
)  # fmt: skip
def test_all_peers_agree_with_steps_in_float64(op, direction):
    case = dataclasses.replace(SMALL[op], direction=direction)
    arrays = scans_cases.inputs(case)
    judge = scans.Judge(case, arrays)
    for peer in scans_cases.peers_of(case):
        results = scans_cases.jitted(peer, case)(*arrays.values())
        assert len(results) == (1 if direction == "fwd" else len(arrays))
        assert judge.error(results) <= 2e-5, peer
        wrong = [results[0].at[0, 100].multiply(1.01), *results[1:]]
        assert judge.error(wrong) > 1e-4


def test_a_wrong_peer_is_not_timed(monkeypatch):
    case = dataclasses.replace(SMALL["linear_recurrence"], direction="fwd")
    monkeypatch.setitem(scans_cases.PEERS["linear_recurrence"], "wrong", lambda a, b: a * b)
    options = argparse.Namespace(repeats=3, seconds=0.0, no_memory=True)
    rows = {r["peer"]: r for r in scans.measure(case, None, options)}
    assert "refused" in rows["wrong"] and "median_ms" not in rows["wrong"]
    assert rows["lax.scan"]["tilescan_time_over_this"] > 0
    assert rows["tilescan"]["runs"] == 3 and rows["tilescan"]["compile_s"] > 0


def test_the_crossover_is_the_length_from_which_a_scan_stays_faster():
    def rows(T, *ms):
        for peer, x in zip(("attention", "ssd", "gated_linear_attention"), ms, strict=True):
            yield dict(direction="fwd", T=T, peer=peer, median_ms=x)

    lengths = (256, 2, 1, 9), (512, 4, 5, 9), (1024, 9, 7, 9), (2048, 30, 9, 31)
    _, lines = scans.crossover_table([r for length in lengths for r in rows(*length)])
    assert "ssd is faster than attention from 1024 steps on" in lines[0]
    assert "not up to 2048 steps" in lines[1]


def test_static_figures_have_a_row_for_each_kernel():
    row = dict(job=dict(T=8), kernels=[dict(name="f", loop=None), dict(name="g", x=[1, 2])])
    assert scans.flat_rows(row) == [
        dict(job="T=8", name="f", loop=""),
        dict(job="T=8", name="g", x="1 2"),
    ]
