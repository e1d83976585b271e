"""Folders of runs: on a disk or in a bucket."""

import importlib.util
import os
import pathlib

from etils import epath

from tilescan.files import is_on_disk, write_atomically

# Buckets that Orbax can write arrays to, and the modules (and packages) that it and the other files
# take for each.
BUCKETS = {
    "gs": {"gcsfs": "gcsfs", "google.cloud.storage": "google-cloud-storage"},
    "s3": {"s3fs": "s3fs"},
}


def writable_path(path: str | os.PathLike, name: str) -> epath.Path:
    """Returns `path`, absolute if it is on a disk, after refusing what can never be written.

    Args:
      path: a folder, file:///folder, or a folder of a bucket, gs://... or s3://...
      name: of the argument, for messages.

    Raises:
      ValueError: an empty path, a scheme that can't be written, or one whose package is missing.
    """
    text = os.fspath(path)
    if not text.strip():
        raise ValueError(f"{name} is empty; give a folder, e.g. {name}=runs/first")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return epath.Path(pathlib.Path(text).absolute())
    if scheme == "file":
        return epath.Path(pathlib.Path(rest).absolute())
    if scheme not in BUCKETS:
        known = ", ".join(f"{bucket}://" for bucket in BUCKETS)
        raise ValueError(
            f"{name}={text!r}: {scheme}:// can't be written; use a folder, or a bucket by {known}"
        )
    missing = [package for module, package in BUCKETS[scheme].items() if not _is_there(module)]
    if missing:
        packages = " ".join(missing)
        raise ValueError(f"{name}={text!r} needs packages: pip install {packages}")
    return epath.Path(text)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it is in
        return False


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Replaces a file in one step, in a folder that is there; an object appears once all is sent.

    Raises:
      OSError: the file cannot be written.
    """
    if is_on_disk(path):
        write_atomically(path, text)
    else:
        epath.Path(path).write_text(text, encoding="utf-8")
