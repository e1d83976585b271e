"""The configuration of a training run: what there is to choose, in what unit, and why the default.

The dataclasses below are the only list of fields. `default_config()` turns them into a locked
`ConfigDict`, which is what config files and the command line edit; `settings(config)` turns that
back into the dataclasses, which is what the rest of the code sees. A `ConfigDict` goes no further
than `train()`.

    config = default_config()
    config.train.steps = 500
    override(config, "optimizer.learning_rate=1e-3")
"""

import ast
import dataclasses
import difflib
import typing
from typing import Any

import ml_collections
import numpy as np
from ml_collections import config_dict

from models import LanguageModelConfig
from ops import masks

TASKS = ("language_model", "classification")
OPTIMIZERS = ("adamw", "adam", "lion", "sgd")
SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")
PACKINGS = ("packed", "whole", "contiguous")


class ConfigError(ValueError):
    """A key that does not exist, or a value that makes no sense."""


def _one_of(name: str, value, known) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1, 0.0)
        raise ConfigError(
            f"{name} = {value!r} is unknown; did you mean {near[0]!r}? Known: {', '.join(known)}"
        )


def _at_least(section: str, config, low: int | float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(f"{section}.{name} = {value} must be at least {low}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    sources: tuple[str, ...] = ("python_stdlib",)  # names in data.sources; no download here
    tokenizer: str = "byte"  # name in data.tokenizers
    seq_len: int = 256  # tokens per row (T)
    batch_size: int = 16  # rows per update, over all devices and microbatches
    packing: str = "packed"  # packed, whole or contiguous: see data.packing
    shuffle: bool = True  # another order of documents in each epoch, from the seed
    fractions: tuple[float, ...] = (0.9, 0.05, 0.05)  # of the documents: train, validation, test
    split_seed: int = 0  # which documents are held out; apart from the seed, so that seeds compare
    max_documents: int | None = None  # use only the first so many; None: all
    eval_stride: int | None = None  # slide windows by so many tokens in evaluations; None: packed

    def __post_init__(self):
        _one_of("data.packing", self.packing, PACKINGS)
        _at_least("data", self, 1, "seq_len", "batch_size")
        _at_least("data", self, 1, "max_documents", "eval_stride")
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one source of data.sources")


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    pattern: str  # regular expression, searched in the parameter's path "a/b/kernel"
    lr_multiplier: float = 1.0  # times the learning rate; 0 freezes
    weight_decay: float | None = None  # None: optimizer.weight_decay


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"  # adamw, adam (adamw that must not decay), sgd, lion
    learning_rate: float = 3e-4  # the peak
    schedule: str = "cosine"  # constant, linear, cosine, wsd, inverse_sqrt
    warmup_steps: int = 100  # updates until the peak
    decay_steps: int = 0  # wsd alone: length of the decay that ends the run, in updates
    final_fraction: float = 0.1  # of the peak, where linear, cosine and wsd end
    b1: float = 0.9  # decay of the first moment; sgd's momentum
    b2: float = 0.95  # decay of the second moment: language models' habit; optax has 0.999
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled: p -= learning rate * weight_decay * p
    clip_norm: float = 1.0  # bound on the global norm of the gradient; 0: no clipping
    # The first group that matches a parameter holds. Scales and biases are not decayed.
    groups: tuple[ParamGroup, ...] = (ParamGroup(r"(^|/)(scale|bias)$", 1.0, 0.0),)

    def __post_init__(self):
        _one_of("optimizer.name", self.name, OPTIMIZERS)
        _one_of("optimizer.schedule", self.schedule, SCHEDULES)
        positive = ("learning_rate", "warmup_steps", "decay_steps", "weight_decay", "clip_norm")
        _at_least("optimizer", self, 0, *positive)
        if self.name == "adam" and (self.weight_decay or any(g.weight_decay for g in self.groups)):
            raise ConfigError(
                "optimizer.name = 'adam' does not decay weights: set weight_decay to 0 or name to "
                "'adamw'"
            )
        if self.schedule == "wsd" and not self.decay_steps:
            raise ConfigError("optimizer.schedule = 'wsd' needs optimizer.decay_steps > 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000  # updates of the parameters
    microbatches: int = 1  # parts of a batch, whose gradients are added up: saves memory
    z_loss: float = 0.0  # times log(Z)^2 per token; 1e-4 keeps bf16 logits near 0 (PaLM, section 5)
    log_every: int = 10  # steps between rows of metrics.jsonl
    eval_every: int = 200  # steps between evaluations; step 0 and the last have one too
    eval_batches: int = 16  # batches per evaluation; 0: all of the validation documents
    checkpoint_every: int = 200  # steps between checkpoints; the last has one too. 0: none
    keep: int = 2  # how many checkpoints stay on disk
    resume_step: int | None = None  # go back to this checkpoint, drop later ones; None: newest
    progress: bool = True  # a bar on a terminal, a line per row of metrics elsewhere
    tensorboard: bool = True  # event files beside metrics.jsonl

    def __post_init__(self):
        _at_least("train", self, 1, "steps", "microbatches", "log_every", "eval_every", "keep")
        _at_least("train", self, 0, "z_loss", "eval_batches", "checkpoint_every", "resume_step")


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    param_dtype: str = "float32"  # of the parameters; the optimizer's moments are always float32
    compute_dtype: str = "float32"  # of activations; bfloat16 on accelerators. Loss: always float32

    def __post_init__(self):
        for field in ("param_dtype", "compute_dtype"):
            _one_of(f"precision.{field}", getattr(self, field), ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    n_classes: int | None = None  # task "classification"; None: as many as the data have labels
    pooling: str = "mean"  # of all real tokens; "last": the last one alone

    def __post_init__(self):
        _one_of("classifier.pooling", self.pooling, ("mean", "last"))
        _at_least("classifier", self, 2, "n_classes")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = -1  # copies of the model; -1: whatever devices the other axes leave
    fsdp: int = 1  # parts of each parameter and its moments; the batch is cut as well
    sequence: int = 1  # parts of the time axis; only 1 for now
    tensor: int = 1  # parts of heads, MLP and vocabulary

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1 and not (value == -1 and field.name == "data"):
                raise ConfigError(
                    f"mesh.{field.name} = {value} must be at least 1 (or -1 for mesh.data)"
                )
        if self.sequence > 1:
            raise ConfigError(
                f"mesh.sequence = {self.sequence}: the time axis is not split yet; set it to 1 and "
                "use mesh.data, mesh.fsdp and mesh.tensor"
            )


SECTIONS = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "precision": PrecisionConfig,
    "classifier": ClassifierConfig,
    "mesh": MeshConfig,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A checked configuration.

    `model` holds the fields of models.LanguageModelConfig but dtype and param_dtype, which are
    `precision`'s; its vocab_size may be None, which means the tokenizer's.
    """

    seed: int  # of parameters, data order, dropout: the run's only source of chance
    task: str  # "language_model" (next token) or "classification" (the row's label)
    model: dict[str, Any]
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    precision: PrecisionConfig
    classifier: ClassifierConfig
    mesh: MeshConfig

    def __post_init__(self):
        _one_of("task", self.task, TASKS)
        if self.data.batch_size % self.train.microbatches:
            raise ConfigError(
                f"train.microbatches = {self.train.microbatches} must divide "
                f"data.batch_size = {self.data.batch_size}"
            )
        try:
            self.model_config(vocab_size=1)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model: {error}") from error

    def model_config(self, vocab_size: int) -> LanguageModelConfig:
        """The model's configuration; `vocab_size` is used if config.model has none."""
        return LanguageModelConfig(
            **self.model | {"vocab_size": self.model.get("vocab_size") or vocab_size},
            dtype=self.precision.compute_dtype,
            param_dtype=self.precision.param_dtype,
        )


def _plain(value):
    """Dataclasses to dicts, arrays to lists, in tuples too: what JSON can hold."""
    if isinstance(value, masks.Mask):
        return {"mask": type(value).__name__} | _fields(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return value


def _fields(value) -> dict[str, Any]:
    return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}


def _section(cls, leave_out=()) -> dict[str, Any]:
    """Names and defaults of a dataclass; None, and no default, are placeholders of their type."""
    hints, section = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        hint, value = hints[field.name], field.default
        kinds = set(typing.get_args(hint) or (hint,)) & {int, float, str}
        if field.name in leave_out:
            continue
        if value in (None, dataclasses.MISSING):
            section[field.name] = config_dict.placeholder(kinds.pop()) if kinds else None
        else:
            section[field.name] = _plain(value)
    return section


def default_config() -> ml_collections.ConfigDict:
    """Returns every key with its default, locked; the dataclasses above say what they mean."""
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "task": "language_model",
            "model": _section(LanguageModelConfig, leave_out=("dtype", "param_dtype")),
            **{name: _section(cls) for name, cls in SECTIONS.items()},
        }
    )
    return config.lock()


def known_keys() -> list[str]:
    """Every dotted key of the default configuration, sections included."""
    config = default_config()
    return list(config) + [f"{s}.{k}" for s in ("model", *SECTIONS) for k in config[s]]


def nearest_key(key: str, known: list[str]) -> str:
    """The known key that `key` most likely means: same last name, else closest spelling."""
    last = key.rsplit(".", 1)[-1]
    same_name = [k for k in known if k.rsplit(".", 1)[-1] == last]
    alike = [k for k in known if k.rsplit(".", 1)[-1].endswith(f"_{last}")]  # dtype, compute_dtype
    return difflib.get_close_matches(key, same_name or alike or known, 1, 0.0)[0]


def check_keys(config) -> None:
    """Raises ConfigError, with the nearest key that exists, for the first key that does not.

    A locked `default_config()` cannot get such a key; one that was built by hand or read from a
    file can.
    """
    known = known_keys()
    for name, value in config.items():
        keys = [name]
        if name == "model" or name in SECTIONS:
            if not hasattr(value, "items"):
                raise ConfigError(f"{name!r} is a section of the configuration, not {value!r}")
            keys += [f"{name}.{key}" for key in value]
        for key in keys:
            if key not in known:
                raise ConfigError(f"unknown key {key!r}; did you mean {nearest_key(key, known)!r}?")


def override(config: ml_collections.ConfigDict, assignment: str) -> None:
    """Applies one "section.key=value" in place; the value is a Python literal or a bare word.

    Raises:
        ConfigError: no "=", an unknown key (the nearest one is named), a value of another type.
    """
    key, equals, text = assignment.removeprefix("--").removeprefix("config.").partition("=")
    if not equals:
        raise ConfigError(f"{assignment!r} is not of the form section.key=value")
    known = known_keys()
    if key not in known or key in SECTIONS or key == "model":
        raise ConfigError(f"unknown key {key!r}; did you mean {nearest_key(key, known)!r}?")
    parent, _, name = key.rpartition(".")
    section = config[parent] if parent else config
    if isinstance(section[name], str):
        value = text
    else:
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (ValueError, SyntaxError):
            value = (text,) if isinstance(section[name], tuple) else text
    try:
        section[name] = value
    except TypeError:
        kind = type(section[name]).__name__
        raise ConfigError(f"{key} must be of type {kind}, not {text!r}") from None


def _tuples(section: dict) -> dict:
    """Lists, which is what JSON and a config file may hold, to tuples, which is what we hold."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}


def _build(cls, section: dict):
    values = _tuples(section)
    if cls is OptimizerConfig and "groups" in values:
        values["groups"] = tuple(_group(g) for g in values["groups"])
    return cls(**values)


def _group(group) -> ParamGroup:
    known = [f.name for f in dataclasses.fields(ParamGroup)]
    for key in group:
        if key not in known:
            near = nearest_key(key, known)
            raise ConfigError(f"unknown key {key!r} in optimizer.groups; did you mean {near!r}?")
    if "pattern" not in group:
        raise ConfigError(f"optimizer.groups: {dict(group)} has no pattern")
    return ParamGroup(**group)


def settings(config) -> Settings:
    """Checks every key and value and returns plain dataclasses. Raises ConfigError."""
    check_keys(config)
    plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    sections = {name: _build(cls, plain.get(name, {})) for name, cls in SECTIONS.items()}
    return Settings(
        seed=plain.get("seed", 0),
        task=plain.get("task", TASKS[0]),
        model=_tuples(plain.get("model", {})),
        **sections,
    )


def as_dict(config: Settings) -> dict[str, Any]:
    """What config.json and checkpoints hold. Reads back to the same settings."""
    return _plain(config)


def differing_keys(ours: dict, theirs: dict) -> dict[str, tuple]:
    """{dotted key: (ours, theirs)} of the leaves in which two `as_dict`s differ."""

    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", _jsonable(value)

    a, b = dict(flat(ours)), dict(flat(theirs))
    return {k: (a.get(k), b.get(k)) for k in sorted(a | b) if a.get(k) != b.get(k)}


def _jsonable(value):
    """Tuples and lists compare equal after a round trip through JSON."""
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    return value
