"""The ledger of criteria: since when every claim is judged as it is, beside the age of its records.

results/criteria.json has {PAPER/SCALE: {claim: entry}} with
  criterion, since, commit   the text, and the time and the commit since which it stands: those of
                             the commit that brought it, or of the report that met it first, which
                             was made on top of that commit
  reworded                   earlier texts that say the same in other words
  before                     what it was, oldest first: {criterion, since, commit} of each change
  note                       what else is to be said of one that is younger than records, by hand

A report dates whatever text it does not know; that a text says the same is declared to it. What
it cannot notice is a criterion whose words stay while the cells or the code under them change.
"""

import dataclasses
import datetime
import json
import pathlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tilescan.experiments.harness.claims import Claim
from tilescan.experiments.harness.records import Record, Records, dumps
from tilescan.files import write_atomically

FILE = "criteria.json"
Entries = Mapping[str, Mapping[str, Any]]  # {claim: entry}
Ledger = Mapping[str, Entries]  # {PAPER/SCALE: entries}


def load(root: pathlib.Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the ledger of a folder of results, {} where there is none yet."""
    path = root / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def updated(
    ledger: Ledger,
    found: Mapping[str, Sequence[Claim]],
    now: str,
    commit: str | None,
    *,
    reworded: Iterable[str] = (),
    begun: Ledger = types.MappingProxyType({}),
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the ledger with the criteria of today; those of claims that are gone stay in it.

    Args:
      ledger: as `load` returns it.
      found: {PAPER/SCALE: claims}.
      now: time of what is new.
      commit: on top of which it is new.
      reworded: "PAPER/SCALE: CLAIM" of each claim whose new text says the same as the old one, and
        "PAPER/SCALE: CLAIM < OLD NAME" of one that has a new name as well.
      begun: what a run wrote down as it began, see `begin`: a criterion in it is as old as it.

    Raises:
      ValueError: a claim that is said to be reworded has no entry, or has not changed.
    """
    made = {folder: dict(entries) for folder, entries in ledger.items()}
    same = {_place(text): text for text in reworded}
    for folder, claims in found.items():
        entries = made.setdefault(folder, {})
        for claim in claims:
            declared = next((p for p in same if p[:2] == (folder, claim.name)), None)
            old = entries.pop(declared[2] if declared else claim.name, None)
            told = old is not None and old["criterion"] == claim.criterion
            if declared and old and (not told or declared[2] != claim.name):
                del same[declared]
                texts = [*old.get("reworded", ()), *([] if told else [old["criterion"]])]
                more = {"reworded": texts} if texts else {}
                entries[claim.name] = {**old, "criterion": claim.criterion, **more}
            elif told:
                entries[claim.name] = old
            else:
                entry = begun.get(folder, {}).get(claim.name, {})
                if entry.get("criterion") != claim.criterion:
                    entry = {"criterion": claim.criterion, "since": now, "commit": commit}
                entries[claim.name] = _after(entry, old)
    if same:
        raise ValueError(
            f"reworded={next(iter(same.values()))!r} is no claim whose criterion or name changed; "
            f"give 'PAPER/SCALE: CLAIM' or 'PAPER/SCALE: CLAIM < OLD NAME', by the names in {FILE}"
        )
    return made


def _place(text: str) -> tuple[str, str, str]:
    """Returns the folder, the claim's name and its old name of a declared rewording."""
    folder, _, names = text.partition(": ")
    name, _, old = names.partition(" < ")
    return folder.strip(), name.strip(), (old or name).strip()


def _after(entry: Mapping[str, Any], old: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns an entry with what the criterion was before it."""
    if old is None:
        return dict(entry)
    then = {key: old[key] for key in ("criterion", "since", "commit")}
    # What stood in between, in the folder of a run that went on after a change.
    later = [e for e in entry.get("before", ()) if e["criterion"] != old["criterion"]]
    return {**entry, "before": [*old.get("before", ()), then, *later]}


def begin(
    workdir: pathlib.Path, folder: str, claims: Sequence[Claim], now: str, commit: str | None
) -> None:
    """Writes a paper's criteria into the folder of a run before it measures.

    Args:
      workdir: of the run; one that goes on keeps what it wrote first.
      folder: PAPER/SCALE.
      claims: of no records.
      now, commit: as of `updated`.
    """
    ledger = updated(load(workdir), {folder: claims}, now, commit)
    write_atomically(workdir / FILE, dumps(ledger))


def marked(
    claims: Sequence[Claim], entries: Entries, read: Callable[[], Mapping[str, Sequence[Record]]]
) -> list[Claim]:
    """Returns the claims, marked where the criterion is younger than a record that it reads.

    Args:
      claims: of one paper at one scale.
      entries: the ledger's, of that folder; a claim that has none is left as it is.
      read: returns {claim: the records it reads}, see `readings`; called if a mark may be due.
    """
    made, of_claims = [], None
    for claim in claims:
        entry = entries.get(claim.name)
        if entry is None or entry["criterion"] != claim.criterion:
            made.append(claim)
            continue
        of_claims = read() if of_claims is None else of_claims
        made.append(dataclasses.replace(claim, late=_late(entry, of_claims.get(claim.name, ()))))
    return made


def _late(entry: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Returns what is to be said of a criterion's age, "" if it is older than all records."""
    time = datetime.datetime.fromisoformat
    since, finished = entry["since"], [record.environment["finished"] for record in records]
    if not any(time(each) < time(since) for each in finished):
        return ""
    day = f"{since[:10]} {since[11:16]}"
    if before := entry.get("before"):
        said = f"criterion changed after measuring, {day}; before: {before[-1]['criterion']}"
    else:
        said = f"criterion written down after measuring: first kept {day}"
    return "; ".join(filter(None, (said, entry.get("note"))))


def readings(
    judge: Callable[[Records], Sequence[Claim]], records: Records
) -> dict[str, list[Record]]:
    """Returns {claim: the records it reads}: those without whose kind it would be another claim.

    Args:
      judge: gives a paper's claims of records.
      records: all of them.
    """
    whole = {claim.name: claim for claim in judge(records)}
    found: dict[str, list[Record]] = {name: [] for name in whole}
    kinds: dict[tuple, list[Record]] = {}
    for record in records:
        kind = tuple(map(record.settings.get, ("kind", "measure", "name")))
        kinds.setdefault(kind, []).append(record)
    for kind, of_kind in kinds.items():
        others = [record for other, rs in kinds.items() if other != kind for record in rs]
        without = {claim.name: claim for claim in judge(Records(others))}
        for name in whole:
            if without.get(name) != whole[name]:
                found[name] += of_kind
    return found
