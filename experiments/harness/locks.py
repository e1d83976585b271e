"""One process at a time: a lock on a file, which ends with its process however that ends."""

import contextlib
import fcntl
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Iterator


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


@contextlib.contextmanager
def alone(
    name: str, say: Callable[[str], None], timeout: float = 600.0, every: float = 0.5
) -> Iterator[bool]:
    """Notices another process of this user on this machine that is inside under the same name.

    The second one says so, waits for the first, and after `timeout` goes on beside it.

    Args:
      name: of what only one should do.
      say: gets what the user is to know.
      timeout: seconds to wait.
      every: seconds between tries.

    Yields:
      Whether no other one was inside as this one began.
    """
    path = pathlib.Path(tempfile.gettempdir()) / f"tilescan-{os.getuid()}" / f"{name}.lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, 0, every))
        except TimeoutError:
            say(f"another {name} is going on ({_holder(path)}): waiting {timeout:g} s at most")
        else:
            yield True
            return
        try:
            stack.enter_context(locked(path, timeout, every))
        except TimeoutError:
            say(f"going on beside the other {name}: times are marked if it takes much of the cores")
            yield False
        else:
            yield True


def _acquire(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8").strip() or "another process"
