"""The configuration as people edit it: a locked `ConfigDict`, command-line overrides, JSON.

`default_config()` makes a `ConfigDict` out of the dataclasses in `training.settings`, which is what
config files and the command line edit; `settings(config)` turns that back into the dataclasses,
which is what the rest of the code sees. A `ConfigDict` goes no further than `train()`.

    config = default_config()
    config.train.steps = 500
    override(config, "optimizer.learning_rate=1e-3")
"""

import ast
import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np
from ml_collections import config_dict

from tilescan.models import LanguageModelConfig, mixer_options
from tilescan.models.config import default_heads
from tilescan.models.earlier_configs import current_fields
from tilescan.models.mixers import MIXERS, MODEL_FIELDS, base_name
from tilescan.ops import masks
from tilescan.spelling import nearest, synonym
from tilescan.training.schedule_config import ScheduleConfig, warmup_steps
from tilescan.training.settings import (
    SECTIONS,
    TASKS,
    ConfigError,
    OptimizerConfig,
    ParamGroup,
    Settings,
    default_max_len,
)

# What people edit, or the same as a plain mapping: what `as_dict` gives and JSON holds.
Config = ml_collections.ConfigDict | Mapping[str, Any]

__all__ = [
    "Config",
    "ConfigError",
    "as_dict",
    "assignments_meant",
    "check_keys",
    "default_config",
    "differing_keys",
    "keys_named",
    "known_keys",
    "nearest_key",
    "override",
    "settings",
]


def _plain(value):
    """Turns dataclasses to dicts and arrays to lists, in tuples too: what JSON can hold."""
    if isinstance(value, masks.Mask):
        return {"mask": type(value).__name__} | _fields(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return value


def _fields(value) -> dict[str, Any]:
    return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}


def _section(cls, leave_out=(), unset=()) -> dict[str, Any]:
    """Returns names and defaults of a dataclass; None, and no default, are typed placeholders.

    So are the fields in `unset`, whose default comes from somewhere else.
    """
    hints, section = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        hint, value = hints[field.name], field.default
        kinds = set(typing.get_args(hint) or (hint,)) & {bool, int, float, str}
        if field.name in leave_out:
            continue
        if value in (None, dataclasses.MISSING) or field.name in unset:
            section[field.name] = config_dict.placeholder(kinds.pop()) if kinds else None
        else:
            section[field.name] = _plain(value)
    return section


def default_config() -> ml_collections.ConfigDict:
    """Returns every key with its default, locked; the dataclasses above say what they mean.

    `model.mixers` has a section per mixer, of its options; those that are None are the model's. A
    variant of a mixer gets its section from `override`, or as in

        with config.unlocked():
            config.model.mixers["attention:global"] = {"position": "none"}
    """
    model = _section(LanguageModelConfig, leave_out=("dtype", "param_dtype", "mixers"))
    leave_out = mixer_options.SHARED + mixer_options.LINEN
    mixers = {
        name: _section(mixer, leave_out, unset=MODEL_FIELDS.get(name, ()))
        for name, mixer in MIXERS.items()
    }
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "task": "language_model",
            "stages": (),
            "model": model | {"max_len": config_dict.placeholder(int), "mixers": mixers},
            **{name: _section(cls) for name, cls in SECTIONS.items()},
        }
    )
    return config.lock()


def known_keys(config: ml_collections.ConfigDict | None = None) -> list[str]:
    """Lists every dotted key of a configuration, sections included; None: of the default one."""

    def keys(section, prefix="") -> Iterator[str]:
        yield from (prefix + key for key in section)
        for key, value in section.items():
            if isinstance(value, ml_collections.ConfigDict):
                yield from keys(value, f"{prefix}{key}.")

    return list(keys(default_config() if config is None else config))


def keys_named(name: str, known: list[str], near: bool = False) -> list[str]:
    """Returns the known keys that `name` is, or is the last part of; "-" stands for "_" as well.

    With `near`, where there is none, those that begin with it (batch: data.batch_size) or are
    spelled alike.
    """
    name = name.replace("-", "_")
    last = {key: key.rsplit(".", 1)[-1] for key in known}
    found = [name] if name in known else [key for key in known if last[key] == name]
    if found or not near:
        return found
    name = name.rsplit(".", 1)[-1]
    begun = [key for key in known if len(name) > 2 and last[key].startswith(f"{name}_")]
    alike = nearest(name, set(last.values()), cutoff=0.8)
    return begun or [key for key in known if last[key] == alike]


def assignments_meant(word: str, known: list[str], near: bool = False) -> list[str]:
    """Returns ["--config.train.steps=5"] of a mistaken "--steps=5": up to four, shortest first.

    Args:
        word: what stands on a command line; "train.steps=5" and "--config.steps=5" mean it too.
        known: the dotted keys of its configuration.
        near: see `keys_named`.
    """
    name, equals, text = word.lstrip("-").removeprefix("config.").partition("=")
    keys = sorted(keys_named(name, known, near), key=lambda key: key.count("."))
    return [f"--config.{key}={text if equals else 'VALUE'}" for key in keys[:4]]


def nearest_key(key: str, known: list[str]) -> str:
    """Returns the known key that `key` most likely means: same last name, else closest spelling."""
    last = key.rsplit(".", 1)[-1]
    named = {k: k.rsplit(".", 1)[-1] for k in known}
    last = synonym(last, named.values()) or last
    same_name = [k for k in known if named[k] in (last, f"{last}s")]
    alike = [k for k in known if named[k].endswith(f"_{last}")]  # dtype, compute_dtype
    return nearest(key, same_name or alike or known, cutoff=0)


def _default_name(name: str, prefix: str) -> str:
    """Returns the key of the default config like a key: of a variant, its mixer's."""
    return base_name(name) if prefix == "model.mixers." else name


def check_keys(config: Config) -> None:
    """Raises ConfigError, with the nearest key that exists, for the first key that does not.

    A locked `default_config()` cannot get such a key; one that was built by hand or read from a
    file can.
    """
    known, default = known_keys(), default_config()

    def check(section, default, prefix=""):
        for name, value in section.items():
            key = prefix + name
            name = _default_name(name, prefix)
            if name not in default:
                raise ConfigError(f"unknown key {key!r}; did you mean {nearest_key(key, known)!r}?")
            if isinstance(default[name], ml_collections.ConfigDict):
                if not hasattr(value, "items"):
                    raise ConfigError(f"{key!r} is a section of the configuration, not {value!r}")
                check(value, default[name], f"{key}.")

    check(config, default)


def override(config: ml_collections.ConfigDict, assignment: str) -> None:
    """Applies one "section.key=value" in place; the value is a Python literal or a bare word.

    `config` may be any configuration of sections of keys, a paper's as well.

    Raises:
        ConfigError: no "=", an unknown key (the nearest one is named), a value of another type.
    """
    key, equals, text = assignment.removeprefix("--").removeprefix("config.").partition("=")
    if not equals:
        raise ConfigError(f"{assignment!r} is not of the form section.key=value")
    _add_variant(config, key)
    known = known_keys(config)
    if key not in known:
        near, written = [nearest_key(key, known)], ""
        if "." not in key:  # a name without its section
            name = synonym(key, (other.rsplit(".", 1)[-1] for other in known)) or key
            near += [other for other in keys_named(name, known) if other not in near][:3]
            written = f" Write --config.{near[0]}={text}"
        words = " or ".join(map(repr, near))
        raise ConfigError(f"unknown key {key!r}; did you mean {words}?{written}")
    *parents, name = key.split(".")
    section = functools.reduce(lambda section, parent: section[parent], parents, config)
    if isinstance(section[name], ml_collections.ConfigDict):
        example = next(iter(section[name]))
        raise ConfigError(f"{key!r} is a section: set one of its keys, e.g. {key}.{example}")
    old, kind = section[name], section.get_type(name)
    value = text if kind is str else _literal(text)
    kinds = {type(item) for item in old} if kind is tuple else set()
    if kinds == {str} and isinstance(value, str) and value == text:
        value = _words(text)
    if kind is tuple and not isinstance(value, tuple | list):
        value = (value,)
    try:
        # ConfigDict takes a bool for a number, and anything for an item of a tuple.
        if value is not None and not _fits(value, kind):
            raise TypeError
        if len(kinds) == 1 and not all(_fits(item, *kinds) for item in value):
            raise TypeError
        section[name] = value
    except TypeError:
        like = "" if old is None else f" like {old!r}"
        raise ConfigError(f"{key} must be of type {kind.__name__}{like}, not {text!r}") from None


def _add_variant(config: ml_collections.ConfigDict, key: str) -> None:
    """Makes a section for a variant, "model.mixers.mamba2:wide.state_dim", if its mixer has one.

    It holds the options that are set; each begins as the mixer's, of the same type.
    """
    block, _, option = key.removeprefix("model.mixers.").partition(".")
    if not key.startswith("model.mixers.") or ":" not in block or "mixers" not in config.model:
        return
    mixers, base = config.model.mixers, base_name(block)
    if base in mixers and option in mixers[base]:
        with config.unlocked():
            mixers[block] = mixers.get(block, {})
            if option not in mixers[block]:
                value, kind = mixers[base][option], mixers[base].get_type(option)
                typed = config_dict.FieldReference(value, field_type=kind)
                mixers[block][option] = value if kind is type(None) else typed


def _literal(text: str):
    """Evaluates a Python literal; returns other text as it is."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _words(text: str) -> tuple[str, ...]:
    """Splits a,b or (a,b), whose quotes a shell has eaten: bare words with commas between them."""
    inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
    return tuple(word.strip() for word in inner.split(",") if word.strip())


def _fits(value, kind: type) -> bool:
    """Returns whether a value fits a key's type; an int can be a float, a bool not a number."""
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return kind not in (bool, str) or isinstance(value, kind)


def _tuples(section: dict) -> dict:
    """Turns lists, which JSON and a config file may hold, into tuples, which is what we hold."""

    def tuples(value):
        if isinstance(value, Mapping):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return tuples(section)


def _build(cls, section: dict):
    values = _tuples(section)
    if cls is OptimizerConfig and "groups" in values:
        values["groups"] = tuple(_group(g) for g in values["groups"])
    return cls(**values)


def _group(group) -> ParamGroup:
    known = [f.name for f in dataclasses.fields(ParamGroup)]
    if not hasattr(group, "items"):
        raise ConfigError(
            f"optimizer.groups holds {group!r}; each group is a dict with the keys "
            f"{', '.join(known)}, e.g. {{'pattern': 'kernel', 'lr_multiplier': 0.1}}"
        )
    for key in group:
        if key not in known:
            near = nearest_key(key, known)
            raise ConfigError(f"unknown key {key!r} in optimizer.groups; did you mean {near!r}?")
    if "pattern" not in group:
        raise ConfigError(f"optimizer.groups: {dict(group)} has no pattern")
    return ParamGroup(**group)


def settings(config: Config) -> Settings:
    """Checks every key and value and returns plain dataclasses. Raises ConfigError.

    Keys of the model that have moved since (`models.earlier_configs`) are read as what they mean.
    """
    plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    plain = _current(plain)
    check_keys(plain)
    sections = {name: _build(cls, plain.get(name, {})) for name, cls in SECTIONS.items()}
    return Settings(
        seed=plain.get("seed", 0),
        task=plain.get("task", TASKS[0]),
        model=_tuples(plain.get("model", {})),
        stages=tuple(plain.get("stages", ())),
        **sections,
    )


def _current(plain: dict) -> dict:
    """A configuration whose model has today's keys, from one of any version."""
    if not hasattr(plain.get("model"), "items"):
        return plain
    try:
        return plain | {"model": current_fields(plain["model"])}
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def as_dict(config: Settings) -> dict[str, Any]:
    """Returns what config.json and checkpoints hold. Reads back to the same settings."""
    return _plain(config)


def differing_keys(ours: dict, theirs: dict) -> dict[str, tuple]:
    """Returns {dotted key: (ours, theirs)} of the leaves in which two `as_dict`s differ.

    A key that one of them lacks, because it was written before there was such a key, has its
    default; of two keys of which one is None, what it then follows counts.
    """

    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", _jsonable(value)

    default = dict(flat(as_dict(settings(default_config()))))
    a, b = (default | dict(flat(_current(x))) for x in (ours, theirs))
    for key, follow in _FOLLOWING.items():
        if (a[key] is None) != (b[key] is None):
            a[key], b[key] = (x[key] if x[key] is not None else follow(x) for x in (a, b))
    return {k: (a.get(k), b.get(k)) for k in sorted(a | b) if a.get(k) != b.get(k)}


def _warmup(flat: dict) -> int:
    names = (field.name for field in dataclasses.fields(ScheduleConfig))
    options = {name: flat[f"optimizer.{name}"] for name in names}
    return warmup_steps(ScheduleConfig(**options), flat["train.steps"])


def _heads(flat: dict) -> int:
    names = ("d_model", "pattern", "n_kv_heads", "head_dim", "position")
    return default_heads(*(flat[f"model.{name}"] for name in names))


# Keys that follow others where they are None: what they are then, by all keys.
_FOLLOWING = {
    "optimizer.warmup_steps": _warmup,
    "model.n_heads": _heads,
    "model.max_len": lambda flat: default_max_len(flat["data.seq_len"]),
}


def _jsonable(value):
    """Turns tuples to lists, so that they compare equal after a round trip through JSON."""
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    return value
