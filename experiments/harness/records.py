"""What one measurement leaves behind: a JSON file with the numbers and where they came from."""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import pathlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from tilescan.training.environment import cores, git, processor

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """The finished measurement of one cell.

    Attributes:
      paper: name of the paper's module, e.g. "flash_attention".
      cell: the cell's id, also the file's name.
      digest: hash of paper, id, settings and seed; another digest means another measurement.
      settings: everything that the measurement depended on.
      seed: random seed.
      result: the measured numbers.
      seconds: wall time of the cell.
      environment: versions, device and commit, see `environment`; when it was finished; "code" and
        "data", see `provenance`.
      curve: {"steps", "loss"} of the cell's training, None where there is none.
      models: {digest: {"settings", "seed"}} of the shared models that it read, None for none: see
        `workspace.Workspace.trained`.
    """

    paper: str
    cell: str
    digest: str
    settings: Mapping[str, Any]
    seed: int
    result: Mapping[str, Any]
    seconds: float
    environment: Mapping[str, Any]
    curve: Mapping[str, Any] | None = None
    models: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """Returns the record as text; `from_json` of it gives the same record back."""
        fields = dataclasses.asdict(self)
        for name in ("curve", "models"):
            if fields[name] is None:
                del fields[name]
        return dumps({"schema": SCHEMA, **fields})

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Reads what `to_json` wrote; ValueError says what is wrong with the text."""
        try:
            fields = json.loads(text)
            if fields.pop("schema") != SCHEMA:
                raise ValueError(f"schema is not {SCHEMA}")
            return cls(**fields)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a record of this version: {error}") from error


class Records:
    """All records of one run, with the few ways of looking at them that tables need."""

    def __init__(self, records: list[Record]):
        self._records = sorted(records, key=lambda record: record.cell)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def select(self, **settings: Any) -> "Records":
        """Returns the records whose settings have all of the given values."""
        return Records(
            [r for r in self if all(r.settings.get(k) == v for k, v in settings.items())]
        )

    def kind(self, name: str) -> "Records":
        """Returns the records of one kind of cell."""
        return self.select(kind=name)

    def values(self, setting: str) -> list:
        """Returns the different values of one setting, sorted."""
        return sorted({r.settings[setting] for r in self if setting in r.settings})

    def one(self, **settings: Any) -> Record | None:
        """Returns the only record with these settings, None when there is none.

        Raises:
          ValueError: several records match.
        """
        found = list(self.select(**settings))
        if len(found) > 1:
            raise ValueError(f"{len(found)} records match {settings}: {[r.cell for r in found]}")
        return found[0] if found else None


def dumps(value: Any) -> str:
    """Returns JSON that is the same text for the same value, readable in a diff, and always valid.

    Raises:
      ValueError: a NaN or an infinity, which JSON cannot say; a measurement that meets one
        should fail or say so in words.
    """
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def plain(value: Any) -> Any:
    """Returns `value` as JSON will give it back: tuples as lists, NumPy scalars as numbers.

    Raises:
      TypeError: a value that JSON cannot hold.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return plain(value.tolist())
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot be kept in a record: {value!r} of type {type(value).__name__}")


def digest(paper: str, cell: str, settings: Mapping[str, Any], seed: int) -> str:
    """Returns a short hash that names a measurement; equal inputs, equal hash, on every machine."""
    text = json.dumps([SCHEMA, paper, cell, plain(settings), seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(folder: pathlib.Path) -> Records:
    """Returns the records under `folder`/cells.

    Raises:
      ValueError: a file there is not a record; the message names it.
    """
    records = []
    for path in sorted((pathlib.Path(folder) / "cells").glob("*.json")):
        try:
            records.append(Record.from_json(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; delete it to have it measured again") from error
    return Records(records)


def is_finite(value: Any) -> bool:
    """Returns whether every number in a nested result is finite."""
    if isinstance(value, Mapping):
        return all(is_finite(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(is_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


@functools.cache
def environment() -> dict[str, Any]:
    """Returns versions, device and commit: what a reader needs to judge or repeat a number."""
    import jax

    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "packages": {
            name: _version(name) for name in ("tilescan", "jax", "jaxlib", "flax", "numpy")
        },
        "backend": device.platform,
        "device": processor() if device.platform == "cpu" else device.device_kind,
        "device_count": jax.device_count(),
        "cpu_count": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def now() -> str:
    """Returns the time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
