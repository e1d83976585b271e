"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replaces a file in one step: a reader, or a run after a crash, never sees half of it.

    Folders that are missing are made; lines end in "\\n" on every system.

    Raises:
      OSError: the file cannot be written; what was there before stays as it was.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_on_disk(path: str | os.PathLike) -> bool:
    """Returns whether `path` is on a disk, and not in a bucket."""
    return "://" not in os.fspath(path)
