"""What the devices of compiled programs send each other: counts, and how records of them are read.

A record's result has {strategy: {"forward": counts, "both": counts}}, of the forward pass and of
both passes, as `sent` returns them.
"""

from collections.abc import Mapping
from typing import Any

from tilescan.experiments.harness.records import Record
from tilescan.training import collectives

MIB = 2**20


def sent(program: Any) -> dict[str, dict[str, float]]:
    """Returns {kind: {"bytes" that a device sends, "runs" of its collectives}} of a program."""
    found = collectives.collectives(program.as_text())
    runs: dict[str, int] = {}
    for c in found:
        runs[c.kind] = runs.get(c.kind, 0) + c.times
    return {
        kind: {"bytes": n, "runs": runs[kind]} for kind, n in collectives.sent_bytes(found).items()
    }


def messages(program: Any) -> int:
    """Returns how often a program sends its largest piece: a state, a block of it, or keys."""
    found = collectives.collectives(program.as_text())
    most = max(c.operand_bytes for c in found)
    return sum(c.times for c in found if c.operand_bytes == most)


def total_bytes(counts: Mapping[str, Mapping[str, float]]) -> float:
    """Returns the bytes of all kinds that `sent` counted."""
    return sum(kind["bytes"] for kind in counts.values())


def sent_bytes(record: Record, strategy: str, passes: str = "forward") -> float | None:
    """Returns the bytes that a device sends, None for a strategy that the record lacks."""
    found = record.result.get(strategy)
    return None if found is None else total_bytes(found[passes])


def over_forward(record: Record, strategy: str) -> float | None:
    """Returns what both passes send over what the forward pass sends."""
    both, forward = (sent_bytes(record, strategy, passes) for passes in ("both", "forward"))
    return None if both is None else both / forward
