"""Records by the values of their settings: the rows of tables and the points of figures."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, spread


@dataclasses.dataclass(frozen=True)
class Group:
    """Records that share the values of some settings.

    Attributes:
      key: the value of the setting, or a tuple of the values of several.
      records: at least one.
    """

    key: Any
    records: Records

    def __len__(self) -> int:
        return len(self.records)

    @property
    def first(self) -> Record:
        """The first record: for what all of them agree on."""
        return next(iter(self.records))

    def select(self, **settings: Any) -> "Group":
        """Returns the group of those records whose settings have all of the given values."""
        return Group(self.key, self.records.select(**settings))

    def values(self, metric: str, unit: float = 1.0) -> list[float]:
        """Returns a measured number of each record, times `unit`."""
        return [unit * record.result[metric] for record in self.records]

    def mean_std(self, metric: str, unit: float = 1.0) -> Spread | None:
        """Returns mean ± standard deviation of a measured number, times `unit`."""
        return spread(self.values(metric, unit))


def by(records: Records, *settings: str, order: Sequence[Sequence[Any]] = ()) -> list[Group]:
    """Returns the groups of records that share their values of `settings`.

    Args:
      records: those that lack one of the settings are left out.
      *settings: names; a group's key is the value of the only one, or the tuple of their values.
      order: for each of the settings its values in the order wanted, others left out; sorted
        without it.
    """
    values = lambda r: tuple(_hashable(r.settings[s]) for s in settings)
    keys = {values(r) for r in records if all(s in r.settings for s in settings)}
    if order:
        orders = [list(known) for known in order]
        keys = {k for k in keys if all(v in o for v, o in zip(k, orders, strict=True))}
        ranked = sorted(keys, key=lambda k: [o.index(v) for v, o in zip(k, orders, strict=True)])
    else:
        ranked = sorted(keys)
    groups = []
    for key in ranked:
        found = [r for r in records if all(s in r.settings for s in settings) and values(r) == key]
        groups.append(Group(key[0] if len(key) == 1 else key, Records(found)))
    return groups


def series(records: Records, setting: str, metric: str) -> dict[Any, Any]:
    """Returns {value of a setting: a measured number}, sorted, of records that differ in it."""
    return {group.key: group.first.result[metric] for group in by(records, setting)}


def measured(groups: Sequence[Group], of: Callable[[Group], Any]) -> dict[Any, Any]:
    """Returns {key: value} of those groups that have one."""
    found = {group.key: of(group) for group in groups}
    return {key: value for key, value in found.items() if value is not None}


def at(found: Mapping[Any, Any]) -> Callable[[Group], Any]:
    """Returns the function of a group that gives what was found for its key, None without."""
    return lambda group: found.get(group.key)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def first(records: Records, text: str, **computed: Callable[[Mapping[str, Any]], Any]) -> str:
    """Returns `text` with the settings that all records agree on filled in; "" without records.

    Args:
      records: of one kind; the first one's settings are read.
      text: with {name} for a setting or a key of the training config ({data.seq_len},
        {options[length]}, {optimizer.learning_rate:g}).
      **computed: further names, functions of the settings.
    """
    for record in records:
        known = {**record.settings, **record.settings.get("train", {})}
        known |= {name: function(known) for name, function in computed.items()}
        fill = lambda match, known=known: _filled(known, *match.groups())
        return re.sub(r"\{([\w.]+)(?:\[(\w+)\])?(?::([^}]*))?\}", fill, text)
    return ""


def _filled(known: Mapping[str, Any], name: str, item: str | None, spec: str | None) -> str:
    value = known[name]
    if item is not None:
        value = value[int(item) if item.isdigit() else item]
    return format(value, spec or "")
