"""The options of recurrent mixers: the attributes of their Linen modules, by name and type.

A mixer's class is the only list of its options. An option has a default and a type of int, float,
bool, str, None or a tuple of them; `SHARED` attributes are the language model's.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from flax.core import FrozenDict

from tilescan.spelling import did_you_mean

# Attributes that `models.blocks` fills in, where a mixer has them.
SHARED = ("d_model", "norm_eps", "out_scale", "dtype", "param_dtype", "sequence_parallel")
LINEN = ("parent", "name")


def defaults(mixer: type) -> dict[str, Any]:
    """{option: default} of a mixer's class."""
    fields = [f for f in dataclasses.fields(mixer) if f.name not in SHARED + LINEN]
    return {f.name: f.default for f in fields}


def checked(mixers: Mapping[str, Mapping[str, Any]], known: Mapping[str, type]) -> FrozenDict:
    """{block: {option: value}} without the values that are defaults, hashable.

    Args:
      mixers: what a configuration says.
      known: {block: class of its mixer}.

    Raises:
      ValueError: an unknown block or option (the nearest one is named), a value of another type.
    """
    if not isinstance(mixers, Mapping):
        raise ValueError(f"mixers must map blocks to their options, got {mixers!r}")
    found = {}
    for block, options in mixers.items():
        if block not in known:
            raise ValueError(f"mixers: {block!r} is no recurrent block; {_nearest(block, known)}")
        if not isinstance(options, Mapping):
            raise ValueError(f"mixers: the options of {block!r} must be a mapping, got {options!r}")
        default, hints = defaults(known[block]), typing.get_type_hints(known[block])
        changed = {}
        for name, value in options.items():
            if name not in default:
                raise ValueError(f"mixers: {block!r} has no {name!r}; {_nearest(name, default)}")
            value = tuple(value) if isinstance(value, list) else value
            if not _fits(value, hints[name]):
                raise ValueError(
                    f"mixers: {block}.{name} must be {_words(hints[name])}, got {value!r}"
                )
            if value != default[name]:
                changed[name] = value
        if changed:
            found[block] = changed
    return FrozenDict(found)


def _fits(value, hint) -> bool:
    """Whether a value can be of a type; an int can be a float, and no bool is a number."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    for kind in kinds:
        kind = typing.get_origin(kind) or kind
        if kind is Any or (kind is float and type(value) is int) or type(value) is kind:
            return True
    return False


def _is_union(hint) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _words(hint) -> str:
    return str(hint) if _is_union(hint) else getattr(hint, "__name__", str(hint))


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"{did_you_mean(name, known)}known: {', '.join(known) or 'none'}"
