"""The ledger of criteria, on invented claims and records: what is dated, kept, marked, refused."""

import pytest

from tilescan.experiments.harness import criteria
from tilescan.experiments.harness.claims import judge
from tilescan.experiments.harness.records import Record, Records

FOLDER = "toy/cpu"
EARLY, LATE = "2026-01-01T10:00:00+00:00", "2026-01-02T10:00:00+00:00"


def claim(criterion, name="grows"):
    return judge(name, "y grows", criterion, True, "y 2")


def dated(ledger, claims, now, **options):
    return criteria.updated(ledger, {FOLDER: claims}, now, f"commit of {now}", **options)


@pytest.fixture
def ledger():
    return dated({}, [claim("y > 1")], EARLY)


def measured(at):
    """Returns what `criteria.marked` asks for, of one record that was finished at a time."""
    made = Record("toy", "x", "", {"kind": "y"}, 0, {"y": 2}, 1.0, {"finished": at})
    return lambda: {"grows": [made]}


def late(ledger, at, criterion):
    (one,) = criteria.marked([claim(criterion)], ledger[FOLDER], measured(at))
    return one.late


def test_a_new_criterion_is_dated_and_the_same_text_keeps_its_date(ledger):
    entry = {"criterion": "y > 1", "since": EARLY, "commit": f"commit of {EARLY}"}
    assert ledger == {FOLDER: {"grows": entry}}
    assert dated(ledger, [claim("y > 1")], LATE) == ledger
    assert dated(ledger, [], LATE) == ledger  # a claim that is gone may come again


def test_another_text_gets_a_new_date_and_keeps_what_it_was(ledger):
    changed = dated(ledger, [claim("y > 0")], LATE)[FOLDER]["grows"]
    assert (changed["criterion"], changed["since"]) == ("y > 0", LATE)
    assert changed["before"] == [ledger[FOLDER]["grows"]]
    again = dated({FOLDER: {"grows": changed}}, [claim("y > 1")], "2026-01-03T10:00:00+00:00")
    assert [then["criterion"] for then in again[FOLDER]["grows"]["before"]] == ["y > 1", "y > 0"]


def test_a_declared_rewording_keeps_the_date_and_lists_the_earlier_text(ledger):
    made = dated(ledger, [claim("y above 1")], LATE, reworded=[f"{FOLDER}: grows"])
    entry = made[FOLDER]["grows"]
    assert entry["since"] == EARLY and entry["reworded"] == ["y > 1"] and "before" not in entry
    renamed = dated(
        made, [claim("y above 1", "rises")], LATE, reworded=[f"{FOLDER}: rises < grows"]
    )
    assert renamed[FOLDER] == {"rises": entry}


@pytest.mark.parametrize("text", ["toy/cpu: grows", "toy/cpu: shrinks", "grows"])
def test_a_rewording_of_nothing_is_an_error_that_names_it(ledger, text):
    with pytest.raises(ValueError, match=f"reworded='{text}'"):
        dated(ledger, [claim("y > 1")], LATE, reworded=[text])


def test_a_criterion_is_as_old_as_the_run_that_began_with_it(ledger, tmp_path):
    criteria.begin(tmp_path, FOLDER, [claim("y > 0")], EARLY, "c")
    criteria.begin(tmp_path, FOLDER, [claim("y > 0")], LATE, "d")  # it goes on
    begun = criteria.load(tmp_path)
    new = dated({}, [claim("y > 0")], LATE, begun=begun)[FOLDER]["grows"]
    assert (new["since"], new["commit"]) == (EARLY, "c")
    assert dated({}, [claim("y > 5")], LATE, begun=begun)[FOLDER]["grows"]["since"] == LATE


def test_what_stood_while_a_run_measured_is_kept(ledger, tmp_path):
    """Between what was published before and what is published now."""
    for now, text in ((EARLY, "y > 1"), (EARLY, "y > 2"), (LATE, "y > 3")):
        criteria.begin(tmp_path, FOLDER, [claim(text)], now, "c")
    begun = criteria.load(tmp_path)
    new = dated(ledger, [claim("y > 3")], LATE, begun=begun)[FOLDER]["grows"]
    assert [entry["criterion"] for entry in new["before"]] == ["y > 1", "y > 2"]


def test_a_claim_is_marked_if_its_criterion_is_younger_than_a_record(ledger):
    before, between, after = (f"2026-01-0{day}T09:00:00+00:00" for day in (1, 2, 3))
    assert late(ledger, between, "y > 1") == ""
    assert late(ledger, before, "y > 1").startswith("criterion written down after measuring")
    changed = dated(ledger, [claim("y > 0")], LATE)
    assert late(changed, between, "y > 0") == (
        "criterion changed after measuring, 2026-01-02 10:00; before: y > 1"
    )
    assert late(changed, after, "y > 0") == ""  # measured again
    assert late(ledger, before, "y > 7") == ""  # nothing is known of this text
    (said,) = criteria.marked([claim("y > 0")], changed[FOLDER], measured(between))
    assert said.judged == f"y > 0 [{said.late}]"


def test_a_claim_reads_the_kinds_of_records_without_which_it_is_another():
    def records(kind):
        return [Record("toy", f"{kind}{i}", "", {"kind": kind}, i, {}, 1.0, {}) for i in range(2)]

    def claims(found):
        return [
            judge(kind, "", "", True, str(len(found.select(kind=kind))))
            for kind in ("a", "b", "none")
        ]

    found = criteria.readings(claims, Records([*records("a"), *records("b")]))
    assert {name: [r.cell for r in of] for name, of in found.items()} == {
        "a": ["a0", "a1"],
        "b": ["b0", "b1"],
        "none": [],
    }


def test_a_claim_on_one_task_does_not_read_the_others():
    made = [Record("toy", n, "", {"kind": "task", "name": n}, 0, {}, 1.0, {}) for n in "ab"]
    claims = lambda found: [judge(n, "", "", True, str(len(found.select(name=n)))) for n in "ab"]
    found = criteria.readings(claims, Records(made))
    assert {name: [r.cell for r in of] for name, of in found.items()} == {"a": ["a"], "b": ["b"]}
