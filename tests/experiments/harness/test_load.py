"""Other work on the machine is noticed: by a fake counter, and by a lock between two runs."""

import pytest

from tilescan.experiments.harness import load, locks
from tilescan.experiments.harness.records import Record
from tilescan.experiments.harness.tables import LABEL, MEASURED, Column, table


class Machine:
    """A machine of two cores on which others take a share, for as long as it is told."""

    def __init__(self, shares):
        self.shares, self.now, self.others, self.slept = list(shares), 0.0, 100.0, 0

    def meter(self):
        return load.Meter(lambda: self.others, lambda: self.now, cores=2)

    def sleep(self, seconds):
        share = self.shares.pop(0) if len(self.shares) > 1 else self.shares[0]
        self.now += seconds
        self.others += 2 * seconds * share
        self.slept += 1


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_is_of_all_cores(share):
    machine = Machine([share])
    meter = machine.meter()
    machine.sleep(10.0)
    assert meter.share() == pytest.approx(max(0.0, share - 0.001))  # two ticks are given away


def test_where_the_system_says_nothing_the_share_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_STAT", tmp_path / "absent")
    assert load.others_seconds() is None and load.Meter().share() is None


def test_a_counter_of_all_processes_loses_what_is_our_own(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  1000000 0 500000 9 9 0 0 100000 7 7\ncpu0 1 1\n")
    monkeypatch.setattr(load, "_STAT", stat)
    total = 1_600_000 / load.os.sysconf("SC_CLK_TCK")
    assert 0 < total - load.others_seconds() < total


@pytest.mark.parametrize(
    ("shares", "patience", "slept"),
    [([0.9, 0.9, 0.0], 30.0, 3), ([0.9], 4.0, 4), ([0.9], 0.0, 0), ([0.01], 30.0, 1)],
)
def test_a_comparison_waits_for_a_quiet_machine_as_long_as_it_may(shares, patience, slept):
    machine = Machine(shares)
    with load.patient(patience):
        load.wait_for_quiet(machine.meter, machine.sleep)
    assert machine.slept == slept


def test_rows_that_were_timed_beside_other_work_are_marked():
    records = [
        Record("p", f"T{n}", "", {"length": n}, 0, {"a": {"median_ms": 1.0, "others": x}}, 1.0, {})
        for n, x in ((64, 0.0), (128, 0.31), (256, None), (512, load.BOUND))
    ]
    columns = [
        Column("length", LABEL, of=lambda r: str(r.settings["length"])),
        Column("a", MEASURED, of=lambda r: r.result["a"]["median_ms"]),
    ]
    made = table("t", "T", records, columns, "Note.")
    assert [row[0] for row in made.rows] == ["64", "128 *", "256", "512"]
    assert made.note == "Note. * Measured while other work took of the machine: 128 * 31%."
    assert table("t", "T", records[:1], columns, "Note.").note == "Note."


def test_a_second_run_says_so_and_goes_on_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    said = []
    with locks.alone("run", said.append) as first:
        assert first and not said
        with locks.alone("run", said.append, timeout=0.0) as second:
            assert not second
    assert "another run is going on (process" in said[0] and "beside the other" in said[1]
    with locks.alone("run", said.append) as third:
        assert third and len(said) == 2
