"""Tasks by name."""

import dataclasses
from typing import Any

from tilescan.data.tasks import algorithms, images, listops, passkey, pathfinder, reviews, synthetic
from tilescan.data.tasks.base import FixedTask, Task
from tilescan.spelling import did_you_mean

_FAMILIES = (algorithms, synthetic, passkey, listops, pathfinder, images, reviews)
TASKS = {name: make for family in _FAMILIES for name, make in family.TASKS.items()}


def summaries() -> dict[str, str]:
    """Returns all tasks that `get` makes: name -> what a model does in it, in a line."""
    return {name: make.__doc__.partition("\n")[0] for name, make in TASKS.items()}


def get(name: str, **options: Any) -> Task | FixedTask:
    """Makes a task by name; options are the arguments of the function that makes it.

    Raises:
      ValueError: an unknown name (the nearest is named), or options that make no task.
    """
    if name not in TASKS:
        hint = did_you_mean(name, TASKS)
        raise ValueError(f"task={name!r} is unknown; {hint}known: {', '.join(TASKS)}")
    try:
        task = TASKS[name](**options)
    except TypeError as error:
        raise ValueError(f"task {name!r}: {error}") from error
    return dataclasses.replace(task, options=options)
