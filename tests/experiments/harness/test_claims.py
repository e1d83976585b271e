"""Predicates that papers share, on made-up numbers."""

import types

import pytest

from tilescan.experiments.harness import matrix
from tilescan.experiments.harness.claims import Effect, judge, leads, lower_every_seed, rises
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread
from tilescan.experiments.harness.tables import RECALLED, Column


@pytest.mark.parametrize(
    ("first", "second", "points", "holds"),
    [
        (Spread(90.0, 1.0, 2), Spread(87.0, 0.5, 2), 0.0, True),
        (Spread(90.0, 2.0, 2), Spread(87.0, 0.5, 2), 0.0, False),  # within two deviations
        (Spread(90.0, 1.0, 2), Spread(87.0, 0.5, 2), 5.0, False),  # not by enough
        (Spread(90.0, 1.0, 2), None, 0.0, None),
    ],
)
def test_a_mean_leads_by_more_than_its_deviation(first, second, points, holds):
    found = leads("leads", {"a": first, "b": second}, points, head="both: ")
    assert found.holds is holds and found.evidence.startswith("both: a 90.0")


@pytest.mark.parametrize(("least", "holds"), [(None, True), (80, True), (81, False)])
def test_a_mean_that_leads_must_come_to_the_least_as_well(least, holds):
    found = {"a": Spread(80.0, 1.0, 3), "b": Spread(20.0, 1.0, 3)}
    assert leads("leads", found, least=least).holds is holds
    behind = dict(reversed(found.items()))
    assert leads("leads", behind, least=0).holds is False
    assert leads("leads", {"a": None, "b": None}, least=least).holds is None


def test_a_ratio_rises_if_it_grows_and_ends_above_one():
    assert rises("rises", {1: 0.5, 2: 1.5}).holds
    assert (
        rises("rises", {1: 0.5, 2: 1.5}, " states").evidence == "0.50 at 1 states, 1.50 at 2 states"
    )
    assert rises("rises", {1: 0.5, 2: 0.9}).holds is False
    assert rises("rises", {1: 1.5, 2: 1.2}).holds is False
    assert rises("rises", {1: 1.5}).holds is None


def test_an_order_of_every_seed_has_its_effect_in_each():
    made = [
        Record("p", f"{model}{seed}", "", {"model": model}, seed, {"loss": loss}, 1.0, {})
        for model, losses in (("a", (2.0, 3.0)), ("b", (1.0, 2.0)))
        for seed, loss in enumerate(losses)
    ]
    options = dict(names={"a": "A", "b": "B"}, worse={"model": "a"}, better={"model": "b"})
    found = lower_every_seed(Records(made), "loss", "loss", published=1.5, **options)
    assert found.holds and found.effect == Effect(1.5, [2.0, 1.5])
    assert lower_every_seed(Records(made), "loss", "loss", **options).effect is None
    assert (
        lower_every_seed(Records(made[:2]), "loss", "loss", published=1.5, **options).effect is None
    )


def test_claims_by_construction_have_a_sign_of_their_own_and_count_apart():
    def claim(holds, **flags):
        return judge("n", "s", "c", holds, "e", effect=Effect(2.0, [2.0]), **flags)

    made = [claim(True), claim(False), claim(True, by_construction=True)]
    row = matrix.Row(None, "", "cpu", made, 1, 1.0, "", "", "")
    assert row.shown == "1 of 2 + 1≡" and "".join(map(matrix.symbol, made)) == "✓✗≡"
    assert made[2].outcome == "shown, by construction" and made[2].to_json()["by_construction"]
    broken = claim(False, by_construction=True)  # a fault of the code is no less not shown
    assert (
        matrix.symbol(broken) == "✗"
        and matrix.Row(None, "", "cpu", [broken], 1, 1.0, "", "", "").shown == "0 of 1"
    )
    results = types.SimpleNamespace(claims=made, paper=types.SimpleNamespace(short_title="p"))
    assert matrix.effects([results]) == {"p": {"n": [1.0]}}


def test_a_claim_shows_the_kind_of_the_number_it_quotes():
    assert judge("n", "s", "c", True, "e", source=RECALLED).said == "s [recalled]"
    assert judge("n", "s", "c", True, "e").said == "s"
    with pytest.raises(ValueError, match="source='hearsay'"):
        judge("n", "s", "c", True, "e", source="hearsay")
    column = Column("x", RECALLED, "ms")
    assert (column.heading, column.style) == ("x (ms), recalled", "published")
