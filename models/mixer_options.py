"""The options of mixers: the attributes of their Linen modules, by name and type.

A mixer's class is the only list of its options. An option has a default and a type: int, float,
bool, str, None, a tuple of them, a mask, a function. `SHARED` attributes are the language model's
alone; those in `mixers.MODEL_FIELDS` are the language model's unless the mixer has its own.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from flax.core import FrozenDict

from tilescan.models.mixers import MIXERS, MODEL_FIELDS, base_name, named_options
from tilescan.models.positions import RopeScaling
from tilescan.spelling import did_you_mean

# Attributes that `models.blocks` fills in, where a mixer has them.
SHARED = (
    "d_model", "norm_eps", "out_scale", "dtype", "param_dtype", "sequence_parallel",
    "sequence_balance",
)  # fmt: skip
LINEN = ("parent", "name")


def defaults(name: str) -> dict[str, Any]:
    """Returns {option: default} of a mixer by its name; None where the default is the model's."""
    of_model = MODEL_FIELDS.get(name, {})
    fields = [f for f in dataclasses.fields(MIXERS[name]) if f.name not in SHARED + LINEN]
    return {f.name: None if f.name in of_model else f.default for f in fields}


def checked(mixers: Mapping[str, Mapping[str, Any]], pattern: Iterable[str]) -> FrozenDict:
    """Returns {block: {option: value}} without the values that are defaults, hashable.

    The default of a variant's option is what the mixer without a variant has.

    Args:
      mixers: what a configuration says.
      pattern: names of the blocks that there are.

    Raises:
      ValueError: an unknown block or option (the nearest one is named), a value of another type,
        options of a block that is not in the pattern.
    """
    if not isinstance(mixers, Mapping):
        raise ValueError(f"mixers must map blocks to their options, got {mixers!r}")
    pattern = tuple(pattern)
    present = {*pattern, *map(base_name, pattern)}
    found: dict[str, dict[str, Any]] = {}
    for block in sorted(mixers, key=lambda block: ":" in block):  # a variant after its base
        base = base_name(block)
        if base not in MIXERS:
            raise ValueError(f"mixers: {block!r} is not a mixer; {_nearest(base, MIXERS)}")
        default = defaults(base) | (found.get(base, {}) if block != base else {})
        changed = _checked_options(block, mixers[block], default)
        if changed and block not in present:
            raise ValueError(
                f"mixers: {block!r} has options ({', '.join(changed)}), but is not in pattern: "
                f"{_nearest(block, pattern)}"
            )
        if changed:
            found[block] = changed
    return FrozenDict(found)


def _checked_options(block: str, options: Any, default: dict[str, Any]) -> dict[str, Any]:
    """The options of one block that differ from their defaults."""
    if not isinstance(options, Mapping):
        raise ValueError(f"mixers: the options of {block!r} must be a mapping, got {options!r}")
    base, changed = base_name(block), {}
    hints, of_model = typing.get_type_hints(MIXERS[base]), MODEL_FIELDS.get(base, {})
    for name, value in options.items():
        if name not in default:
            raise ValueError(f"mixers: {block!r} has no {name!r}; {_nearest(name, default)}")
        if value is None and name in of_model:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if name == "rope_scaling":
            value = RopeScaling.of(value)
        if not _fits(value, hints[name]):
            raise ValueError(f"mixers: {block}.{name} must be {_words(hints[name])}, got {value!r}")
        if name in named_options(block):
            raise ValueError(
                f"mixers: {block}.{name}={value!r}, but the name {block!r} says it already"
            )
        if value != default[name]:
            changed[name] = value
    return changed


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value can be of a type; an int can be a float, and no bool is a number."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    for kind in kinds:
        kind = typing.get_origin(kind) or kind
        if kind is Any or (kind is float and type(value) is int) or type(value) is kind:
            return True
        if kind not in (int, float) and isinstance(value, kind):  # a mask, a function
            return True
    return False


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _words(hint: Any) -> str:
    return str(hint) if _is_union(hint) else getattr(hint, "__name__", str(hint))


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"{did_you_mean(name, known)}known: {', '.join(known) or 'none'}"
