"""Rounds of an interleaved comparison: their order, their number, and what they count as one."""

from tilescan.benchmarks.timing import interleaved, seconds_of


def test_rounds_go_through_all_functions_each_after_an_untimed_call():
    called = []
    functions = {name: lambda name=name: called.append(name) for name in "ab"}
    times = interleaved(functions, repeats=2, calls={"b": 3})
    assert called == list("aabbbb") * 2
    assert all(len(of) == 2 and min(of) >= 0 for of in times.values())
    assert interleaved({}, repeats=2) == {}


def test_no_round_begins_late_after_three():
    times = interleaved({"a": lambda: None}, repeats=9, seconds=0)
    assert len(times["a"]) == 3
    assert len(interleaved({"a": lambda: None}, repeats=1, seconds=0)["a"]) == 1


def test_a_function_may_time_itself():
    assert interleaved({"a": lambda: 0.5}, repeats=2, calls={"a": 4}) == {"a": [0.5, 0.5]}
    assert seconds_of(lambda: 2.0, 3) == 6.0
