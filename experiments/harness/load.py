"""How much of the machine other processes take, which a measured time suffers from."""

import contextlib
import contextvars
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

BOUND = 0.05  # share of the cores' time from which a time is marked
PATIENCE = 30.0  # seconds that a comparison of times may wait for less
_STAT = pathlib.Path("/proc/stat")
_BUSY = (0, 1, 2, 5, 6, 7)  # of its columns: all but idle, waiting for disks, and guests in users
_patience = contextvars.ContextVar("patience", default=0.0)
_shared = False  # whether this process measures beside others of the same run


class NotAlone(RuntimeError):
    """A time was to be measured while other cells of the run are."""


def share_machine() -> None:
    """Says that this process measures cells beside others, so that it can take no times."""
    global _shared
    _shared = True


def check_alone() -> None:
    """Raises NotAlone in a process that shares the machine with others of its run."""
    if _shared:
        raise NotAlone("times are measured when no other cell is: this one comes after the others")


def others_seconds() -> float | None:
    """Returns CPU seconds of all other processes since the machine began; None where unknown.

    Other machines on the same processor ("steal") count as other processes do.
    """
    try:
        fields = _STAT.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    times = os.times()
    busy = sum(int(fields[i]) for i in _BUSY if i < len(fields)) / os.sysconf("SC_CLK_TCK")
    return busy - times.user - times.system - times.children_user - times.children_system


class Meter:
    """The share of the cores' time that other processes took since the meter was made.

    Attributes:
      seconds, clock, cores: what is read: CPU seconds of the others, wall time, number of cores.
    """

    def __init__(
        self,
        seconds: Callable[[], float | None] = others_seconds,
        clock: Callable[[], float] = time.perf_counter,
        cores: int | None = None,
    ):
        self.seconds, self.clock, self.cores = seconds, clock, cores or os.cpu_count() or 1
        self._begin = seconds(), clock()

    def share(self) -> float | None:
        """Returns the share, 0 to 1; None where it is not known.

        Two ticks of the counter, which is coarse, are given away.
        """
        seconds, clock = self._begin
        now, passed = self.seconds(), self.clock() - self._begin[1]
        if seconds is None or now is None or passed <= 0:
            return None
        return min(1.0, max(0.0, now - seconds - 0.02) / (passed * self.cores))


@contextlib.contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Lets `wait_for_quiet` wait so long inside, instead of not at all."""
    token = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(token)


def wait_for_quiet(
    make: Callable[[], Meter] = Meter, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Waits until others take less than BOUND of the machine, as long as `patient` says at most."""
    left = _patience.get()
    while left > 0:
        meter = make()
        sleep(min(1.0, left))
        left -= 1.0
        share = meter.share()
        if share is None or share <= BOUND:
            return


def share_of(result: Mapping[str, Any]) -> float | None:
    """Returns the share of other work while the times of a record's result were measured.

    It is the greatest of its comparisons; None: below BOUND, unknown, or there are no times.
    """
    parts = [value for value in result.values() if isinstance(value, Mapping)]
    shares = [part["others"] for part in parts if part.get("others") is not None]
    return max((share for share in shares if share > BOUND), default=None)
