"""What a configuration's values are checked with."""

from collections.abc import Iterable
from typing import Any

from tilescan.spelling import did_you_mean


class ConfigError(ValueError):
    """A key that does not exist, or a value that makes no sense."""


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises ConfigError, with the nearest name, for a value that is none of those known."""
    if value not in known:
        hint = did_you_mean(value, known, cutoff=0)
        raise ConfigError(f"{name} = {value!r} is unknown; {hint}Known: {', '.join(known)}")


def at_least(section: str, config: Any, low: int | float, *names: str) -> None:
    """Raises ConfigError for the first field, of those named, that is below `low`; None is not."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(f"{section}.{name} = {value} must be at least {low}")
