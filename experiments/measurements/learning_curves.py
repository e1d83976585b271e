"""What curves of validation say: the examples that a model needs, and whether it still learns.

Records are of `training.measure_task`, of one model each.
"""

import statistics

from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.measurements.training import examples_to


def needed(records: Records, share: float) -> list[int | None]:
    """Returns the examples to a share of whole answers right, of each seed; None: not reached."""
    return [examples_to(record.result, share) for record in records]


def times_as_many(records: Records, share: float, examples: int) -> tuple[float, bool]:
    """Returns the examples that the fastest seed needs to a share, relative to `examples`.

    Returns:
      The ratio, and whether it is a lower bound: no seed got there, and all need more than the
      budget.
    """
    reached = [n for n in needed(records, share) if n is not None]
    budget = max(record.result["examples"][-1] for record in records)
    return min(reached, default=budget) / examples, not reached


def late_gain(records: Records) -> float:
    """Returns what validation's accuracy gains from the second to the last third, mean over seeds.

    Thirds are of the steps before the schedule's last decay ("wsd"), and a third's accuracy is the
    mean over its validations.
    """
    return statistics.fmean(_third(record, 2) - _third(record, 1) for record in records)


def _third(record: Record, number: int) -> float:
    keys, result = record.settings["train"], record.result
    steps = keys["train.steps"] - keys.get("optimizer.decay_steps", 0)
    third = steps * keys["data.batch_size"] / 3
    found = zip(result["examples"], result["validation_accuracy"], strict=True)
    return statistics.fmean(a for n, a in found if number * third < n <= (number + 1) * third)
