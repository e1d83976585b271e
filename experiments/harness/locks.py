"""One process at a time: a lock on a file, which ends with its process however that ends."""

import contextlib
import fcntl
import os
import pathlib
import platform
import time
from collections.abc import Iterator


@contextlib.contextmanager
def locked(path: pathlib.Path, timeout: float, every: float = 0.5) -> Iterator[None]:
    """Locks a file: inside, no other process and no other thread is inside with it.

    The operating system holds the lock for as long as the process lives: one that is killed leaves
    the file, which then locks nothing. The file stays and says who had it last.

    Args:
      path: of the file; made if absent.
      timeout: seconds to wait for another one.
      every: seconds between tries.

    Raises:
      TimeoutError: the other one did not come to an end; names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        end = time.monotonic() + timeout
        while not _acquire(file):
            if time.monotonic() >= end:
                raise TimeoutError(
                    f"{path} is still held by {_holder(path)} after {timeout:g} s: wait for it, or "
                    "end it if it hangs, and run the same command again"
                )
            time.sleep(every)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield  # closing the file ends the lock


def _acquire(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8").strip() or "another process"
