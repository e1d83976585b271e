"""The jitted steps of a training, kept for the next run that differs in its seed alone.

Runs of several seeds, one after another in a process, trace and compile once.
"""

import collections
import dataclasses
import json
from collections.abc import Callable

from flax import linen as nn
from jax.sharding import Mesh

from tilescan.training import config as config_lib
from tilescan.training.schedule_config import FILE
from tilescan.training.schedules import read_schedule
from tilescan.training.settings import Settings

KEPT = 2  # configurations whose programs stay in memory
_kept: collections.OrderedDict[tuple, tuple[Callable, ...]] = collections.OrderedDict()


def kept(
    model: nn.Module, c: Settings, mesh: Mesh, make: Callable[[], tuple[Callable, ...]]
) -> tuple[Callable, ...]:
    """Returns the functions that `make` makes, or those it made for the same model and settings.

    Args:
      model: of the run; one that cannot be hashed is never the same.
      c: all of it but the seed counts, and the numbers of a schedule that is a file.
      mesh: of the run.
      make: returns jitted functions that depend on nothing else.
    """
    settings = config_lib.as_dict(dataclasses.replace(c, seed=0))
    key = (model, mesh, json.dumps(settings, sort_keys=True), _numbers(c))
    try:
        found = _kept.pop(key, None)
    except TypeError:
        return make()
    _kept[key] = found or make()
    while len(_kept) > KEPT:
        _kept.popitem(last=False)
    return _kept[key]


def _numbers(c: Settings) -> bytes:
    """Returns what the file of a schedule holds, which may change while its name stays."""
    schedule = c.optimizer.schedule
    if not schedule.startswith(FILE):
        return b""
    return read_schedule(schedule.removeprefix(FILE), c.train.steps).tobytes()
