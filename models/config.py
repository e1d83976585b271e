"""What a language model is made of, as one frozen value that says what is wrong with it."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax.core import FrozenDict

from tilescan.models import mixer_options
from tilescan.models.layers import MLP_KINDS, NORMS
from tilescan.models.mixers import (
    MIXERS,
    MODEL_FIELDS,
    attends,
    base_name,
    is_recurrent,
    named_options,
)
from tilescan.models.positions import POSITION_KINDS, RopeScaling
from tilescan.ops import masks
from tilescan.ops.sequence_parallel.kinds import (
    ATTENTION_KINDS,
    BALANCES,
    SCAN_KINDS,
    TPU_ATTENTION_KINDS,
)
from tilescan.spelling import did_you_mean

HEADS = 8  # where a model doesn't say
REMAT_KINDS = ("none", "full", "dots", "dots_no_batch", "offload")


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Fields of `LanguageModel` and `SequenceClassifier`.

    Attributes:
      vocab_size, d_model: V and E.
      pattern: blocks that repeat `repeats` times: names of MIXERS in `models.mixers`, or variants
        of them such as "local_attention:512" (window 512) or "attention:global".
      repeats: how often; these layers are one `nn.scan` unless `scan_layers` is False.
      mixers: options of blocks, {"mamba2": {"state_dim": 64}, "local_attention": {"window": 512}}:
        attributes of their modules. Those of "attention:global" are what "attention" has, changed
        by mixers["attention:global"]. Those that have their default value are left out.
      input_features: F of inputs [B, T, F] of real numbers, which a linear map takes to E in
        place of an embedding; None for tokens.
      n_heads, n_kv_heads, head_dim: H (default 8, or the most below it that E, G and `position`
        allow), G (default H) and D (default E / H). These and the following fields of attention
        are those of every attention block without an option of its own in `mixers` (where they
        are called `scale`, `logit_cap`, `use_bias` and `implementation`); of a block with n_heads
        of its own, G and D default to that H and to E / H.
      causal: False lets "attention" see all tokens and "local_attention" both sides.
      position: a kind of POSITION_KINDS. Rotary angles hold to any length; "alibi" loses precision
        beyond some hundred thousand tokens (`models.positions.alibi_bias`).
      rope_theta, rope_scaling: base of the rotary frequencies, and their scaling: a
        RopeScaling or a mapping of its fields.
      qk_norm: RMSNorm of queries and keys.
      attention_scale, attention_logit_cap: of the attention logits; default D ** -0.5, none.
      attention_bias, mlp_bias: whether linear maps have biases.
      attention_implementation: of `ops.attention`, or a function in its place: see `Attention`.
      mlp, mlp_dim: a key of MLP_KINDS and its width (default 4 E, gated 8/3 E rounded up to 64), of
        every "mlp" without `kind` and `dim` of its own in `mixers`.
      norm, norm_eps, post_norm: a key of NORMS; post_norm adds one after each block, before
        the residual sum.
      tie_embeddings: the head is the transposed embedding.
      embed_scale, logit_scale, logit_cap: factors of embeddings and logits; soft cap of logits.
      max_len: rows of learned positions; what the model is meant to read at most.
      dtype, param_dtype: of the computation and of the parameters.
      remat: what the backward pass computes again: "none", "full" (all but each repeat's
        input), "dots" (all but matmuls), "dots_no_batch" (all but matmuls with weights), "offload"
        (as "full", with the inputs kept in the host's memory).
      scan_layers: False unrolls the repeats: slower to compile, same numbers.
      attention_sequence_parallel: how attention works where the mesh in use shards the sequence: a
        name of ATTENTION_KINDS or TPU_ATTENTION_KINDS in `ops.sequence_parallel.kinds`.
      scan_sequence_parallel: how recurrent mixers do: a name of SCAN_KINDS there.
      sequence_balance: the order of the tokens then: a name of BALANCES there.

    Raises:
      ValueError: for values that don't fit; the message says what would.
    """

    vocab_size: int
    d_model: int = 512
    pattern: tuple[str, ...] = ("attention", "mlp")
    repeats: int = 6
    mixers: Mapping[str, Mapping[str, Any]] = FrozenDict()
    input_features: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    causal: bool = True
    position: str = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_logit_cap: float | None = None
    attention_bias: bool = False
    mlp: str = "swiglu"
    mlp_dim: int | None = None
    mlp_bias: bool = False
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    post_norm: bool = False
    tie_embeddings: bool = True
    embed_scale: float | None = None
    logit_scale: float | None = None
    logit_cap: float | None = None
    max_len: int = 1024
    dtype: Any = "float32"
    param_dtype: Any = "float32"
    remat: str = "none"
    scan_layers: bool = True
    attention_implementation: str | Callable | None = None
    attention_sequence_parallel: str = ATTENTION_KINDS[0]
    scan_sequence_parallel: str = SCAN_KINDS[0]
    sequence_balance: str = "contiguous"

    def __post_init__(self):
        set_ = lambda name, value: object.__setattr__(self, name, value)
        for name in ("dtype", "param_dtype"):
            set_(name, _float_dtype(name, getattr(self, name)))
        pattern = self.pattern
        set_("pattern", (pattern,) if isinstance(pattern, str) else tuple(pattern))
        set_("rope_scaling", RopeScaling.of(self.rope_scaling))
        self._check_pattern()
        set_("mixers", mixer_options.checked(self.mixers, self.pattern))
        for name in ("vocab_size", "d_model", "repeats", "max_len"):
            _positive(name, getattr(self, name))
        if self.n_heads is None:
            names = ("d_model", "pattern", "n_kv_heads", "head_dim", "position")
            set_("n_heads", default_heads(*(getattr(self, name) for name in names)))
        _positive("n_heads", self.n_heads)
        if self.n_kv_heads is None:
            set_("n_kv_heads", self.n_heads)
        if self.head_dim is None:
            if self.d_model % self.n_heads and self._attends:
                raise ValueError(
                    f"n_heads={self.n_heads} does not divide d_model={self.d_model}; choose one "
                    "that does, or set head_dim"
                )
            set_("head_dim", max(1, self.d_model // self.n_heads))
        if self.mlp_dim is None:
            _one_of("mlp", self.mlp, MLP_KINDS)
            gated = MLP_KINDS[self.mlp][1]
            set_("mlp_dim", -(-8 * self.d_model // (3 * 64)) * 64 if gated else 4 * self.d_model)
        self._validate()

    def _check_pattern(self) -> None:
        if not self.pattern:
            raise ValueError("pattern is empty; for example ('attention', 'mlp')")
        for block in self.pattern:
            _one_of("a block of pattern", base_name(block), MIXERS)
            if block.endswith(":"):
                raise ValueError(
                    f"{block!r} in pattern has no variant after the colon; e.g. 'attention', "
                    "'attention:global' or 'local_attention:512'"
                )

    def _validate(self) -> None:
        for name in ("n_kv_heads", "head_dim", "mlp_dim"):
            _positive(name, getattr(self, name))
        if self.input_features is not None:
            _positive("input_features", self.input_features)
        _one_of("norm", self.norm, NORMS)
        _one_of("remat", self.remat, REMAT_KINDS)
        kinds = ATTENTION_KINDS + TPU_ATTENTION_KINDS
        _one_of("attention_sequence_parallel", self.attention_sequence_parallel, kinds)
        _one_of("scan_sequence_parallel", self.scan_sequence_parallel, SCAN_KINDS)
        _one_of("sequence_balance", self.sequence_balance, BALANCES)
        recurrent = [block for block in self.pattern if is_recurrent(block)]
        if recurrent and self.sequence_balance != "contiguous":
            raise ValueError(
                f"sequence_balance={self.sequence_balance!r} moves tokens, and {recurrent[0]!r} in "
                "pattern reads them in their order; use sequence_balance='contiguous'"
            )
        for name in ("norm_eps", "rope_theta", "attention_scale", "embed_scale", "logit_scale"):
            _finite(name, getattr(self, name))
        if self.logit_cap is not None and not self.logit_cap > 0:
            raise ValueError(f"logit_cap={self.logit_cap} must be positive, or None for no cap")
        # The model's own values, then those of blocks with others.
        _one_of("position", self.position, POSITION_KINDS)
        model = {name: getattr(self, field) for name, field in MODEL_FIELDS["attention"].items()}
        _check_attention(model, self, rotates=False)
        _one_of("mlp", self.mlp, MLP_KINDS)
        for block in dict.fromkeys(self.pattern):
            options = self.options(block)
            own = {base_name(block), block} & set(self.mixers) or named_options(block)
            try:
                if attends(block):
                    _check_attention(options, self, rotates=True)
                elif base_name(block) == "mlp":
                    _one_of("kind", options["kind"], MLP_KINDS)
                    _positive("dim", options["dim"])
            except ValueError as error:
                raise ValueError(f"mixers: of {block!r}, {error}") from error if own else error
            if base_name(block) == "local_attention" and options.get("window") is None:
                raise ValueError(
                    f"{block!r} in pattern needs window, e.g. 'local_attention:256', or "
                    f"mixers={{{block!r}: {{'window': 256}}}}"
                )

    def options(self, block: str) -> dict[str, Any]:
        """Returns what a block's mixer is made with: the model's fields, then `mixers`.

        Args:
          block: a name that pattern can hold, such as "attention" or "local_attention:512".
        """
        base = base_name(block)
        fields = MODEL_FIELDS.get(base, {})
        of_model = {name: getattr(self, field) for name, field in fields.items()}
        own = {**self.mixers.get(base, {}), **named_options(block), **self.mixers.get(block, {})}
        if "head_dim" in fields and own.get("n_heads"):
            of_model["n_kv_heads"] = own["n_heads"]
            of_model["head_dim"] = max(1, self.d_model // own["n_heads"])
            if self.d_model % own["n_heads"] and "head_dim" not in own:
                raise ValueError(
                    f"mixers: of {block!r}, n_heads={own['n_heads']} does not divide "
                    f"d_model={self.d_model}; choose one that does, or set head_dim"
                )
        return of_model | own

    @property
    def _attends(self) -> bool:
        return any(map(attends, self.pattern))

    @property
    def n_blocks(self) -> int:
        """How many residual blocks there are, over all repeats."""
        return len(self.pattern) * self.repeats


def default_heads(
    d_model: int,
    pattern: Iterable[str],
    n_kv_heads: int | None,
    head_dim: int | None,
    position: str,
) -> int:
    """Returns the heads of a model that doesn't say how many: at most HEADS.

    They divide d_model, are a multiple of n_kv_heads, and leave pairs of channels to rope; HEADS
    itself where no number does all that, where head_dim is given, and without attention.
    """
    if head_dim is not None or not any(map(attends, pattern)):
        return HEADS

    def fits(n: int) -> bool:
        pairs = str(position).startswith("rope")
        return not (d_model % n or n % (n_kv_heads or 1) or (pairs and d_model // n % 2))

    return next(filter(fits, range(HEADS, 0, -1)), HEADS)


def _check_attention(options: Mapping[str, Any], config: Any, rotates: bool) -> None:
    """Raises ValueError for options of an attention block that don't fit.

    Args:
      options: of the block, or the model's fields by the names of options.
      config: of the model.
      rotates: whether rotary positions would turn something.
    """
    get = options.get
    for name in ("n_heads", "n_kv_heads", "head_dim"):
        _positive(name, get(name))
    if get("n_heads") % get("n_kv_heads"):
        raise ValueError(
            f"n_kv_heads={get('n_kv_heads')} must divide n_heads={get('n_heads')}: every group of "
            "query heads shares one key-value head"
        )
    position, head_dim = get("position"), get("head_dim")
    if position != config.position:
        _one_of("position", position, [kind for kind in POSITION_KINDS if kind != "learned"])
    if rotates and position.startswith("rope") and head_dim % 2:
        raise ValueError(
            f"position={position!r} turns pairs of channels, but head_dim={head_dim} is odd "
            f"(d_model={config.d_model}, n_heads={get('n_heads')})"
        )
    if get("logit_cap") is not None and not get("logit_cap") > 0:
        raise ValueError(
            f"attention_logit_cap={get('logit_cap')} must be positive, or None for no cap"
        )
    if get("window") is not None:
        _positive("window", get("window"))
    if get("sinks", 0) < 0:
        raise ValueError(f"sinks={get('sinks')} must be 0 or more")
    if get("sinks", 0) and not get("causal"):
        raise ValueError(f"sinks={get('sinks')} needs causal=True")
    if get("mask") is not None and masks.segments_of(get("mask")) is not None:
        raise ValueError("mask can't hold Segments: segment_ids are an argument of the model")


def _float_dtype(name: str, value: Any) -> jnp.dtype:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}={value!r} is not a floating type; e.g. 'float32' or 'bfloat16'")
    return dtype


def _positive(name: str, value: int) -> None:
    if not isinstance(value, numbers.Integral):
        raise ValueError(f"{name}={value!r} must be an integer")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def _finite(name: str, value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be a finite number")


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        hint = did_you_mean(value, known)
        raise ValueError(f"{name} is {value!r}, which is unknown; {hint}known: {', '.join(known)}")
