"""Ctrl-C and SIGTERM (schedulers send it before they kill) as a question between steps."""

import os
import signal
import threading
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interrupts:
    """Within `with Interrupts() as stop:`, `stop.signal` is the first signal received, or None.

    A second one acts at once, as it does without this class. Signals reach only the main thread, so
    in any other one nothing is installed.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._before = {}

    def _receive(self, number, frame):
        del frame
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc):
        self._restore()

    def agreed(self) -> signal.Signals | None:
        """Returns `signal`, once any process has one; all of several must ask at the same step."""
        if jax.process_count() == 1:
            return self.signal
        number = int(multihost_utils.process_allgather(np.int32(self.signal or 0)).max())
        return signal.Signals(number) if number else None

    @staticmethod
    def raise_for(received: signal.Signals, step: int, saved: str | os.PathLike | None) -> NoReturn:
        """Ends the program as the signal asks, and says how to go on."""
        how = f"run the same command to continue from {saved}" if saved else "nothing was saved"
        message = f"stopped by {received.name} after step {step}; {how}"
        if received == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(message)
