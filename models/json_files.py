"""JSON of checkpoints: objects of bounded size and depth, in which no key stands twice."""

import json
import pathlib
from typing import Any

from tilescan.models.checkpoint_errors import CheckpointError, MissingFileError, short

# The index of a model of a trillion parameters takes about 10 MB.
MOST_BYTES = 32 * 2**20
MOST_LEVELS = 64


def read_json(file: pathlib.Path, what: str) -> dict[str, Any]:
    """Returns the object that a file holds.

    Args:
      file: to read.
      what: what is wrong with a file that is not such an object, e.g. "describes no model".

    Raises:
      MissingFileError: if there is no such file.
      CheckpointError: if it can't be read, is larger than MOST_BYTES, or is not a JSON object.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise MissingFileError(f"{file.parent} has no {file.name}") from error
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error
    if len(content) > MOST_BYTES:
        raise CheckpointError(f"{file} {what}: it is larger than {MOST_BYTES} bytes")
    return parse_json(content, f"{file} {what}")


def parse_json(content: bytes, wrong: str) -> dict[str, Any]:
    """Returns the object that `content` holds in UTF-8.

    Args:
      content: the text.
      wrong: how errors begin: the file, and what is wrong with it.

    Raises:
      CheckpointError: if it is not a JSON object, is nested too deeply or holds a key twice.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{wrong}: {error}") from error
    if _levels(value) > MOST_LEVELS:
        raise CheckpointError(f"{wrong}: it is nested more than {MOST_LEVELS} levels deep")
    if not isinstance(value, dict):
        raise CheckpointError(f"{wrong}: it must be a JSON object, not {short(value)}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"the key {short(repeated)} stands there twice")
    return values


def _levels(value: Any) -> int:
    """How deep lists and objects are nested, up to MOST_LEVELS + 1."""
    level = [value] if isinstance(value, dict | list) else []
    found = 0
    while level and found <= MOST_LEVELS:
        containers = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for inner in containers for v in inner if isinstance(v, dict | list)]
        found += 1
    return found
