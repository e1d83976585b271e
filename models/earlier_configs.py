"""Configurations that were written down before a field of `LanguageModelConfig` moved.

| until then                 | now                                                          |
|----------------------------|--------------------------------------------------------------|
| `window`, `sinks`          | `mixers["local_attention"]`, options of the same names       |
| `mask`                     | `mixers["attention"]["mask"]`                                |
| `sequence_parallel`        | `attention_sequence_parallel` and `scan_sequence_parallel`   |

Parameters have kept their names and shapes.
"""

from collections.abc import Mapping
from typing import Any

from tilescan.models.config import LanguageModelConfig
from tilescan.models.mixers import base_name
from tilescan.ops.sequence_parallel.kinds import kinds

# {earlier field: (mixer that it is an option of, the value that set nothing)}
_MOVED = {
    "window": ("local_attention", None),
    "sinks": ("local_attention", 0),
    "mask": ("attention", None),
}
EARLIER = (*_MOVED, "sequence_parallel")


def current_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields of `LanguageModelConfig` from those of this or any earlier version.

    Of an earlier version, options of blocks that the pattern lacks are left out: they had no
    effect. Unknown fields stay as they are, for `LanguageModelConfig` to refuse.

    Args:
      fields: keyword arguments of the model's configuration, as they were written down.

    Raises:
      ValueError: a field stands there twice, under its earlier and its present name, with two
        values; or a `sequence_parallel` that never was one.
    """
    if not set(EARLIER) & set(fields):
        return dict(fields)
    found = {name: value for name, value in fields.items() if name not in EARLIER}
    pattern = fields.get("pattern") or LanguageModelConfig.pattern
    pattern = (pattern,) if isinstance(pattern, str) else tuple(pattern)
    present = {*pattern, *map(base_name, pattern)}
    mixers = dict(fields.get("mixers") or {})
    mixers = {block: dict(options) for block, options in mixers.items() if block in present}
    for name, (mixer, unset) in _MOVED.items():
        value = fields.get(name, unset)
        if value != unset and mixer in present:
            _put(mixers.setdefault(mixer, {}), name, value, f"mixers: {mixer}.{name}")
    if fields.get("sequence_parallel") is not None:
        attention, scan = kinds(fields["sequence_parallel"])
        for name, kind in (("attention", attention), ("scan", scan)):
            name += "_sequence_parallel"
            _put(found, name, kind, name)
    return found | {"mixers": mixers}


def _put(fields: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Sets a field that is not there yet, or that says the same."""
    if fields.setdefault(name, value) != value:
        raise ValueError(f"{where} is {fields[name]!r}, but by its earlier name it is {value!r}")
