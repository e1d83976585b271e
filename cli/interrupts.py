"""What Ctrl-C does."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


def end_at_once() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which Ctrl-C ends the process, for work that has nothing to save.

    An exception would wait for the end of a compilation, and is lost where a callback raises it.
    """
    return _handled(signal.SIG_DFL)


def raise_exception() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which Ctrl-C raises KeyboardInterrupt, as where a line is read.

    The terminal has to be put in order then.
    """
    return _handled(signal.default_int_handler)


@contextlib.contextmanager
def _handled(action: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only that one may say so
        yield
        return
    before = signal.signal(signal.SIGINT, action)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
