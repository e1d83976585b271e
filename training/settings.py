"""The fields of a training run's configuration: what there is to choose, in what unit, and why.

These dataclasses are the only list of fields; `training.config` makes the editable, locked
`ConfigDict` out of them and back.
"""

import dataclasses
import math
import re
from typing import Any

import jax

from tilescan.models import LanguageModelConfig
from tilescan.models.stream_bp import check_streamed
from tilescan.ops.sequence_parallel import layouts
from tilescan.training.config_errors import ConfigError, at_least, one_of
from tilescan.training.schedule_config import ScheduleConfig, check_phases, in_steps

TASKS = ("language_model", "classification")
OPTIMIZERS = ("adamw", "adam", "lion", "sgd")
PACKINGS = ("packed", "whole", "contiguous")
DTYPES = ("float32", "bfloat16")
AUTO = "auto"  # a compute dtype that the devices decide
TRACKERS = ("none", "wandb")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # Names in data.sources (this one needs no download), paths of texts (data.files), or hf:NAME.
    sources: tuple[str, ...] = ("python_stdlib",)
    tokenizer: str = "byte"  # name in data.tokenizers
    seq_len: int = 256  # tokens per row (T)
    batch_size: int = 16  # rows per update, over all devices and microbatches
    packing: str = "packed"  # packed, whole or contiguous: see data.packing
    shuffle: bool = True  # another order of documents in each epoch, from the seed
    fractions: tuple[float, ...] = (0.9, 0.05, 0.05)  # of the documents: train, validation, test
    split_seed: int = 0  # which documents are held out; not the run's seed, so that seeds compare
    # Use only the first so many, of all sources together, or of each where they are split apart.
    max_documents: int | None = None
    eval_stride: int | None = None  # slide windows by so many tokens in evaluations; None: packed
    # Whose validation documents are also evaluated apart; each source is then split by itself.
    eval_sources: tuple[str, ...] = ()
    # A weight of each source, shares of rows or tokens in all: a mixture, in which each source
    # keeps an order of its own. (): the sources are one corpus.
    weights: tuple[float, ...] = ()
    replay: float = 0.0  # share of rows that are of replay_sources, instead of new ones
    replay_sources: tuple[str, ...] = ()  # old data, in their own order from the first
    replay_seed: int | None = None  # of that order; None: the run's. That of the run before: its
    first_batch: int = 0  # of the training data: those before are left out

    def __post_init__(self):
        one_of("data.packing", self.packing, PACKINGS)
        at_least("data", self, 1, "seq_len", "batch_size")
        at_least("data", self, 1, "max_documents", "eval_stride")
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one source of data.sources")
        parts = self.fractions
        if len(parts) != 3 or min(parts) < 0 or not math.isclose(sum(parts), 1):
            raise ConfigError(
                f"data.fractions = {parts} must be three numbers >= 0 with sum 1: of train, "
                "validation and test"
            )
        if not parts[0]:
            raise ConfigError(f"data.fractions = {parts} leaves no documents to train on")
        at_least("data", self, 0, "first_batch", "replay_seed")
        if self.weights and len(self.weights) != len(self.sources):
            raise ConfigError(
                f"data.weights = {self.weights} must be as many as data.sources, "
                f"{len(self.sources)}"
            )
        if self.weights and not min(self.weights) > 0:
            raise ConfigError(
                f"data.weights = {self.weights} must be above 0: leave out a source that has none"
            )
        if not 0 <= self.replay < 1:
            raise ConfigError(f"data.replay = {self.replay} must be a share, in [0, 1)")
        if bool(self.replay) != bool(self.replay_sources):
            raise ConfigError(
                f"data.replay = {self.replay} and data.replay_sources = {self.replay_sources}: "
                "replay needs both a share above 0 and sources"
            )
        if (self.weights or self.replay) and self.packing == "contiguous":
            raise ConfigError(
                "data.packing = 'contiguous' goes on from row to row of a source, which a mixture "
                "(data.weights, data.replay) would interrupt: packing must be packed or whole"
            )
        if self.eval_stride is not None and self.eval_stride > self.seq_len:
            raise ConfigError(
                f"data.eval_stride = {self.eval_stride} must be at most data.seq_len = "
                f"{self.seq_len}: windows with larger gaps would leave tokens out"
            )


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    pattern: str  # regular expression, searched in the parameter's path "a/b/kernel"
    lr_multiplier: float = 1.0  # times the learning rate; 0 freezes
    weight_decay: float | None = None  # None: optimizer.weight_decay


# Decays, step sizes and state matrices of recurrent mixers: small numbers with a meaning, which
# weight decay would pull to another one.
RECURRENCE = (
    r"(^|/)(A_log|A|Lambda|log_A|log_decay|dt_bias|log_dt|log_step|B|P|D)(_re|_im|_real|_imag)?$"
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(ScheduleConfig):
    name: str = "adamw"  # adamw, adam (adamw that must not decay), sgd, lion
    b1: float = 0.9  # decay of the first moment; sgd's momentum
    b2: float = 0.95  # decay of the second moment: language models' habit; optax has 0.999
    eps: float = 1e-8  # added to the root of the second moment
    # Decoupled: p -= learning rate * weight_decay * p. None: 0.1, for adam 0.
    weight_decay: float | None = None
    clip_norm: float = 1.0  # bound on the global norm of the gradient; 0: no clipping
    # The first group that matches a parameter holds. Scales, biases and what a recurrence is made
    # of are not decayed. A rate of its own: ParamGroup(RECURRENCE, 0.1, 0.0) in front.
    groups: tuple[ParamGroup, ...] = (
        ParamGroup(r"(^|/)(scale|bias)$", 1.0, 0.0),
        ParamGroup(RECURRENCE, 1.0, 0.0),
    )

    def __post_init__(self):
        super().__post_init__()
        one_of("optimizer.name", self.name, OPTIMIZERS)
        if self.weight_decay is None:
            object.__setattr__(self, "weight_decay", 0.0 if self.name == "adam" else 0.1)
        at_least("optimizer", self, 0, "weight_decay", "clip_norm", "eps")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} = {getattr(self, name)} must be in [0, 1)")
        for group in self.groups:
            try:
                re.compile(group.pattern)
            except (re.error, TypeError) as error:
                raise ConfigError(
                    f"optimizer.groups: pattern = {group.pattern!r} is not a regular expression: "
                    f"{error}"
                ) from error
        if self.name == "adam" and (self.weight_decay or any(g.weight_decay for g in self.groups)):
            raise ConfigError(
                "optimizer.name = 'adam' does not decay weights: set weight_decay to 0, or name "
                "to 'adamw'"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000  # updates of the parameters
    microbatches: int = 1  # parts of a batch, whose gradients are added up: saves memory
    logit_chunk: int | None = None  # positions whose logits exist at once, on a device; None: all
    # StreamBP: parts of the sequence in layers' backward pass, shared by the devices that share it.
    stream_chunks: int | None = None
    z_loss: float = 0.0  # times log(Z)^2 per token; 1e-4 keeps bf16 logits near 0 (PaLM, section 5)
    log_every: int = 10  # steps between rows of metrics.jsonl
    eval_every: int = 200  # steps between evaluations; step 0 and the last have one too
    eval_early: bool = False  # evaluate after 1, 2, 4, 8, ... steps as well, up to eval_every
    eval_batches: int = 16  # batches per evaluation; 0: all of the validation documents
    checkpoint_every: int = 200  # steps between checkpoints; the last has one too. 0: none
    keep: int = 2  # how many checkpoints stay on disk
    resume_step: int | None = None  # go back to this checkpoint, drop later ones; None: newest
    # A run's work folder, a published checkpoint or "smollm2", whose model and parameters the run
    # starts from.
    start_from: str = ""
    start_step: int | None = None  # which of its checkpoints; None: the newest
    start_optimizer: bool = False  # take its moments as well, while the schedule begins anew
    progress: bool = True  # a bar on a terminal, a line per row of metrics elsewhere
    tensorboard: bool = True  # event files beside metrics.jsonl, not in buckets
    tracker: str = "none"  # or "wandb", Weights & Biases: see training.trackers
    # Each step's norms of the gradient, l1 and l2, before clipping, in gradient_norms.jsonl: for
    # `tilescan refine`.
    gradient_norms: bool = False
    sample_every: int = 0  # steps between texts that the model writes into samples.jsonl; 0: none
    sample_prompt: str = "\n"  # what they begin with
    sample_tokens: int = 64  # that follow the prompt, at most
    sample_temperature: float = 1.0  # 0 takes the likeliest token

    def __post_init__(self):
        one_of("train.tracker", self.tracker, TRACKERS)
        at_least("train", self, 0, "sample_every", "sample_temperature")
        at_least("train", self, 1, "sample_tokens")
        at_least("train", self, 0, "start_step")
        if (self.start_step is not None or self.start_optimizer) and not self.start_from:
            raise ConfigError("train.start_step and train.start_optimizer need train.start_from")
        if not self.sample_prompt:
            raise ConfigError("train.sample_prompt is empty; give it a word at least")
        at_least("train", self, 1, "logit_chunk", "stream_chunks")
        at_least("train", self, 1, "steps", "microbatches", "log_every", "eval_every", "keep")
        at_least("train", self, 0, "z_loss", "eval_batches", "checkpoint_every", "resume_step")


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    # Of the parameters. Moments are always float32, and for bfloat16 so are the master copies that
    # updates are added to (4 bytes more a parameter): small updates are never rounded away.
    param_dtype: str = "float32"
    # Of activations; auto: bfloat16 on accelerators, float32 on CPUs. The loss is always float32.
    compute_dtype: str = AUTO

    def __post_init__(self):
        one_of("precision.param_dtype", self.param_dtype, DTYPES)
        one_of("precision.compute_dtype", self.compute_dtype, (*DTYPES, AUTO))

    def on(self, platform: str) -> "PrecisionConfig":
        """Returns it with what "auto" is on a platform: "cpu", or that of an accelerator."""
        if self.compute_dtype != AUTO:
            return self
        dtype = "float32" if platform == "cpu" else "bfloat16"
        return dataclasses.replace(self, compute_dtype=dtype)


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    n_classes: int | None = None  # task "classification"; None: as many as the data have labels
    pooling: str = "mean"  # of all real tokens; "last": the last one alone

    def __post_init__(self):
        one_of("classifier.pooling", self.pooling, ("mean", "last"))
        at_least("classifier", self, 2, "n_classes")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = -1  # copies of the model; -1: whatever devices the other axes leave
    fsdp: int = 1  # shards of each parameter and its moments; the batch is sharded as well
    sequence: int = 1  # shards of time; model.*_sequence_parallel say how they meet
    tensor: int = 1  # shards of heads, MLP and vocabulary
    parameters_over_sequence: bool = False  # shard parameters and moments over `sequence` as well

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                continue
            if value < 1 and not (value == -1 and field.name == "data"):
                raise ConfigError(
                    f"mesh.{field.name} = {value} must be at least 1 (or -1 for mesh.data)"
                )


SECTIONS = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "precision": PrecisionConfig,
    "classifier": ClassifierConfig,
    "mesh": MeshConfig,
}


def default_max_len(seq_len: int) -> int:
    """Returns model.max_len where it is None: LanguageModelConfig's, or more if rows are longer."""
    return max(LanguageModelConfig.max_len, seq_len)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A checked configuration.

    `model` holds the fields of models.LanguageModelConfig but dtype and param_dtype, which are
    `precision`'s; its vocab_size may be None, which means the tokenizer's, and its max_len, which
    means data.seq_len or the model's own default, whichever is more.
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
    # Runs one after another, each a mapping of "name" and the keys that are its own, e.g.
    # {"data.sources": ("mine.txt",), "train.steps": 500}: see training.stages.
    stages: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        # Fields that one look at the value decides.
        one_of("task", self.task, TASKS)
        if self.seed < 0:
            raise ConfigError(f"seed = {self.seed} must be at least 0")
        tokens = self.data.batch_size * self.data.seq_len
        in_tokens = self.optimizer.phases_in == "tokens"
        object.__setattr__(self, "optimizer", in_steps(self.optimizer, tokens))
        try:
            check_phases(self.optimizer, self.train.steps)
        except ConfigError as error:
            if not in_tokens:
                raise
            raise ConfigError(
                f"{error} (in updates; optimizer.phases_in = 'tokens' are {tokens:,} each)"
            ) from error
        for name in ("logit_chunk", "stream_chunks", "sample_every"):
            if getattr(self.train, name) and self.task != "language_model":
                raise ConfigError(f"train.{name} is for task = 'language_model', not {self.task!r}")
        for name in ("weights", "replay", "eval_sources", "first_batch"):
            if getattr(self.data, name) and self.task != "language_model":
                raise ConfigError(f"data.{name} is for task = 'language_model', not {self.task!r}")
        if self.data.batch_size % self.train.microbatches:
            raise ConfigError(
                f"train.microbatches = {self.train.microbatches} must divide "
                f"data.batch_size = {self.data.batch_size}"
            )

        # The model, and how its sequences are streamed and sharded.
        try:
            model = self._model_config(vocab_size=1, dtype="float32")
            if self.train.stream_chunks:
                check_streamed(model, self.train.stream_chunks, self.mesh.sequence)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model: {error}") from error
        length = self.data.seq_len
        if (self.train.stream_chunks or 0) > length:
            raise ConfigError(
                f"train.stream_chunks = {self.train.stream_chunks} must be at most data.seq_len = "
                f"{length}"
            )
        if self.mesh.sequence > 1:
            try:
                layouts.check(length, self.mesh.sequence, self.balance)
            except ValueError as error:
                raise ConfigError(
                    f"mesh.sequence = {self.mesh.sequence} with data.seq_len = {length}: {error}"
                ) from error

    @property
    def balance(self) -> str:
        """The order of tokens on the devices that share a sequence."""
        return self.model.get("sequence_balance", "contiguous")

    def model_config(self, vocab_size: int) -> LanguageModelConfig:
        """Returns the model's configuration; `vocab_size` is used if config.model has none.

        Where nothing says its dtype, it is the one for this machine's devices.
        """
        precision = self.precision
        if precision.compute_dtype == AUTO:
            precision = precision.on(jax.default_backend())
        return self._model_config(vocab_size, precision.compute_dtype)

    def on(self, platform: str) -> "Settings":
        """Returns the settings with what precision.compute_dtype=auto is on a platform."""
        return dataclasses.replace(self, precision=self.precision.on(platform))

    def _model_config(self, vocab_size: int, dtype: str) -> LanguageModelConfig:
        set_ = self.model.get("vocab_size")
        model = self.model | {"vocab_size": vocab_size if set_ is None else set_}
        if model.get("max_len") is None:
            model["max_len"] = default_max_len(self.data.seq_len)
        return LanguageModelConfig(**model, dtype=dtype, param_dtype=self.precision.param_dtype)
