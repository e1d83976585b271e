"""Keys of a published configuration: each is read by type and bounds, or known to be harmless.

config.json and the metadata of GGUF files are both read through `Keys`; what nobody asked for and
no list of harmless keys holds is refused by name, since it may change what the model computes.
"""

import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from tilescan.models.checkpoint_errors import CheckpointError, short

REQUIRED: Any = object()
# Bounds that no model reaches, far below what overflows or fills memory before a tensor is seen.
MOST_LAYERS = 2**16
MOST_HEADS = 2**16
MOST_CHANNELS = 2**24
MOST_TOKENS = 2**31 - 1


class Keys:
    """The keys and values of one configuration, which remembers what was read.

    Attributes:
      values: what the file holds.
      file: named in errors.
      within: the key that holds these keys, for nested objects.
    """

    def __init__(self, values: Mapping[str, Any], file: pathlib.Path, within: str = ""):
        self.values, self.file, self.within = values, file, within
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Returns whether the file has a key, whatever its value."""
        return key in self.values

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        """Returns a value as it is; raises CheckpointError if it is absent and required."""
        self._read.add(key)
        if key in self.values:
            return self.values[key]
        if default is REQUIRED:
            where = f" in {self.within}" if self.within else ""
            raise CheckpointError(f"{self.file} has no {key!r}{where}")
        return default

    def integer(
        self, key: str, ours: str, most: int, default: Any = REQUIRED, *, least: int = 1
    ) -> Any:
        """Returns an integer from `least` to `most`; `ours` is what it sets, for errors.

        A default of None lets the file say null.
        """
        value = self.get(key, default)
        if value is None and default is None:
            return None
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, f"{ours} must be int, from {least} to {most}")
        return value

    def number(
        self, key: str, ours: str, least: float, most: float, default: Any = REQUIRED
    ) -> float:
        """Returns a finite number from `least` to `most`; `ours` is what it sets, for errors."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not least <= value <= most:
            self.refuse(key, f"{ours} must be a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str, ours: str, default: Any = REQUIRED) -> bool:
        """Returns true or false; `ours` is what it sets, for errors."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, f"{ours} must be true or false")
        return value

    def text(self, key: str, known: Collection[str], default: Any = REQUIRED) -> str:
        """Returns one of the known strings."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in known:
            raise CheckpointError(
                f"{self.file}: {self._name(key)} {short(value)} is not supported; "
                f"{', '.join(known)} {'is' if len(known) == 1 else 'are'}"
            )
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses all values but those that leave the function as it is; absent is fine."""
        value = self.get(key, allowed[0])
        if not any(_same(value, one) for one in allowed):
            raise CheckpointError(
                f"{self.file}: {self._name(key)}={short(value)} is not supported, only "
                f"{' or '.join(map(repr, allowed))}"
            )

    def equal(self, key: str, value: Any, why: str) -> None:
        """Refuses a value that contradicts what other keys say; absent is fine."""
        if not _same(self.get(key, value), value):
            self.refuse(key, f"it must be {why} = {value!r}")

    def rename(self, names: Mapping[str, str]) -> None:
        """Reads second names of keys; refuses two that contradict each other."""
        self.values = dict(self.values)
        for second, first in names.items():
            if second not in self.values:
                continue
            value = self.values.pop(second)
            if not _same(self.values.setdefault(first, value), value):
                self.refuse(first, f"{second}={short(value)} says something else")

    def finish(self, harmless: Callable[[str], bool]) -> None:
        """Refuses what was not read and is not harmless."""
        unknown = [k for k in self.values if k not in self._read and not harmless(k)]
        if unknown:
            key = unknown[0]
            raise CheckpointError(
                f"{self.file}: {self._name(key)}={short(self.values[key])} is not known, and may "
                "change what the model computes; take the key out if it does not"
            )

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raises CheckpointError, which names the key, its value and what is wrong with it."""
        raise CheckpointError(
            f"{self.file} describes no model: {self._name(key)}={short(self.get(key, None))}: {why}"
        )

    def _name(self, key: str) -> str:
        return f"{self.within}.{key}" if self.within else short(key).strip("'\"")


def _same(a: Any, b: Any) -> bool:
    """Equality that distinguishes true from 1, and lets 1 be 1.0."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b
