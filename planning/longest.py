"""The longest sequence whose training step fits, found by compiling."""

import dataclasses
from collections.abc import Callable

from tilescan.planning import chips, topologies
from tilescan.planning.plan import plan
from tilescan.planning.report import Plan
from tilescan.training import config as config_lib


def longest(
    config: config_lib.Config,
    topology: str | None = None,
    *,
    memory: float | None = None,
    resolution: float = 1 / 16,
    report: Callable[[Plan], None] = lambda plan: None,
) -> Plan | None:
    """Finds the longest data.seq_len whose step fits, by doubling, halving and bisection.

    Lengths are multiples of what the mesh and model.sequence_balance need, times 128 where the
    first length allows it.

    Args:
      config: of `training.config.default_config()`, or what `training.config.as_dict` gives.
      topology: as in `plan`.
      memory: bytes of a device, instead of the vendor's figure.
      resolution: stop when a length that does not fit is at most so much longer.
      report: called with every plan that was made.

    Returns:
      The plan of that length; None if not even the shortest fits.

    Raises:
      ValueError: neither the topology nor `memory` says what a device has; and as `plan`.
    """
    if memory is None and topologies.generation(topology) not in chips.CHIPS:
        raise ValueError(
            f"how much memory has a device of topology={topology!r}? Give memory (--memory=GIB)"
        )

    # The unit of lengths: what shards evenly.
    settings = config_lib.settings(config)
    parts = max(1, settings.mesh.sequence) * (1 + (settings.balance == "zigzag"))
    unit = parts * 128 if settings.data.seq_len % (parts * 128) == 0 else parts

    made: dict[int, Plan] = {}

    def fits(units: int) -> bool:
        data = dataclasses.replace(settings.data, seq_len=units * unit)
        tried = dataclasses.replace(settings, data=data)
        made[units] = plan(config_lib.as_dict(tried), topology, memory=memory)
        report(made[units])
        return bool(made[units].fits)

    return made.get(search(fits, max(1, settings.data.seq_len // unit), resolution))


def search(fits: Callable[[int], bool], first: int, resolution: float) -> int:
    """Returns the largest number tried that fits, by doubling, halving and bisection; 0 if 1 fails.

    The smallest number tried that does not fit is larger by 1, or by at most `resolution` of it.
    """
    good, bad, number = 0, None, first
    while True:
        if fits(number):
            good = number
        else:
            bad = number
        if bad is None:
            number = 2 * good
        elif bad == 1 or (good and bad - good <= max(1, int(resolution * bad))):
            return good
        else:
            number = (good + bad) // 2
