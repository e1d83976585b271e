"""What a language model is made of, as one frozen value that says what is wrong with it."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax.core import FrozenDict

from tilescan.models import mixer_options
from tilescan.models.layers import MLP_KINDS, NORMS
from tilescan.models.mixers import MIXERS, OTHER_BLOCKS
from tilescan.models.positions import POSITION_KINDS, RopeScaling
from tilescan.ops import masks
from tilescan.ops.sequence_parallel.kinds import BALANCES, kinds
from tilescan.spelling import did_you_mean

HEADS = 8  # where a model doesn't say
REMAT_KINDS = ("none", "full", "dots", "dots_no_batch", "offload")


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Fields of `LanguageModel` and `SequenceClassifier`.

    Attributes:
      vocab_size, d_model: V and E.
      pattern: names of blocks (of `models.mixers`: keys of MIXERS, OTHER_BLOCKS) that repeat
        `repeats` times.
      repeats: how often; these layers are one `nn.scan` unless `scan_layers` is False.
      mixers: options of recurrent blocks, {"mamba2": {"state_dim": 64}}: attributes of their
        modules. Those that have their default value are left out.
      input_features: F of inputs [B, T, F] of real numbers, which a linear map takes to E in
        place of an embedding; None for tokens.
      n_heads, n_kv_heads, head_dim: H (default 8, or the most below it that E, G and `position`
        allow), G (default H) and D (default E / H).
      causal: False lets "attention" see the whole text and "local_attention" both sides.
      mask: what a query of "attention" sees, instead of Causal() or Full().
      window: "local_attention": a query sees itself and the window - 1 tokens before it.
      sinks: "local_attention": the first tokens, which everybody behind them sees too.
      position: a kind of POSITION_KINDS. Rotary angles hold to any length; "alibi" loses precision
        beyond some hundred thousand tokens (`models.positions.alibi_bias`).
      rope_theta, rope_scaling: base of the rotary frequencies, and their stretching: a
        RopeScaling or a mapping of its fields.
      qk_norm: RMSNorm of queries and keys.
      attention_scale, attention_logit_cap: of the attention logits; default D ** -0.5, none.
      attention_bias, mlp_bias: whether linear maps have biases.
      mlp, mlp_dim: a key of MLP_KINDS and its width (default 4 E, gated 8/3 E rounded up to 64).
      norm, norm_eps, post_norm: a key of NORMS; post_norm adds one behind each block, before
        the residual sum.
      tie_embeddings: the head is the transposed embedding.
      embed_scale, logit_scale, logit_cap: factors of embeddings and logits; soft cap of logits.
      max_len: rows of learned positions; what the model is meant to read at most.
      dtype, param_dtype: of the computation and of the parameters.
      remat: what the backward pass computes again: "none", "full" (all but each repeat's
        input), "dots" (all but matmuls), "dots_no_batch" (all but matmuls with weights), "offload"
        (as "full", with the inputs kept in the host's memory).
      scan_layers: False unrolls the repeats: slower to compile, same numbers.
      attention_implementation: of `ops.attention`, or a function in its place: see `Attention`.
      sequence_parallel: how mixers work where the mesh in use splits the sequence: a setting of
        `ops.sequence_parallel.kinds`, such as "ring", "ulysses+chain" or "log_step".
      sequence_balance: the order of the tokens then: a name of `ops.sequence_parallel.BALANCES`.

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
    mask: masks.Mask | None = None
    window: int | None = None
    sinks: int = 0
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
    sequence_parallel: str = "ring"
    sequence_balance: str = "contiguous"

    def __post_init__(self):
        set_ = lambda name, value: object.__setattr__(self, name, value)
        for name in ("dtype", "param_dtype"):
            set_(name, _float_dtype(name, getattr(self, name)))
        pattern = self.pattern
        set_("pattern", (pattern,) if isinstance(pattern, str) else tuple(pattern))
        set_("rope_scaling", RopeScaling.of(self.rope_scaling))
        for name in ("vocab_size", "d_model", "repeats", "max_len"):
            _positive(name, getattr(self, name))
        if self.n_heads is None:
            follows = self._attends and self.head_dim is None
            n_heads = default_heads(self.d_model, self.n_kv_heads, self.position)
            set_("n_heads", n_heads if follows else HEADS)
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

    def _validate(self):
        for name in ("n_kv_heads", "head_dim", "mlp_dim"):
            _positive(name, getattr(self, name))
        if not self.pattern:
            raise ValueError("pattern is empty; for example ('attention', 'mlp')")
        for block in self.pattern:
            _one_of("a block of pattern", block, [*OTHER_BLOCKS, *MIXERS])
        object.__setattr__(self, "mixers", mixer_options.checked(self.mixers, MIXERS))
        if self.input_features is not None:
            _positive("input_features", self.input_features)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}: every group of "
                "query heads shares one key-value head"
            )
        _one_of("position", self.position, POSITION_KINDS)
        _one_of("mlp", self.mlp, MLP_KINDS)
        _one_of("norm", self.norm, NORMS)
        _one_of("remat", self.remat, REMAT_KINDS)
        kinds(self.sequence_parallel)
        _one_of("sequence_balance", self.sequence_balance, BALANCES)
        recurrent = [block for block in self.pattern if block in MIXERS]
        if recurrent and self.sequence_balance != "contiguous":
            raise ValueError(
                f"sequence_balance={self.sequence_balance!r} moves tokens, and {recurrent[0]!r} in "
                "pattern reads them in their order; use sequence_balance='contiguous'"
            )
        if self._attends and self.position.startswith("rope") and self.head_dim % 2:
            raise ValueError(
                f"position={self.position!r} turns pairs of channels, but "
                f"head_dim={self.head_dim} is odd (d_model={self.d_model}, n_heads={self.n_heads})"
            )
        for name in ("attention_logit_cap", "logit_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive, or None for no cap")
        if "local_attention" in self.pattern and self.window is None:
            raise ValueError("'local_attention' in pattern needs window, e.g. window=256")
        if self.window is not None:
            _positive("window", self.window)
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be 0 or more")
        if self.sinks and not self.causal:
            raise ValueError(f"sinks={self.sinks} needs causal=True")
        if self.mask is not None and not isinstance(self.mask, masks.Mask):
            raise ValueError(
                f"mask must be a mask of ops.masks, e.g. masks.Causal(), got {self.mask!r}"
            )
        if self.mask is not None and masks.segments_of(self.mask) is not None:
            raise ValueError("mask can't hold Segments: segment_ids are an argument of the model")

    @property
    def _attends(self) -> bool:
        return any("attention" in block for block in self.pattern)

    @property
    def attention_mask(self) -> masks.Mask:
        """What "attention" sees."""
        if self.mask is not None:
            return self.mask
        return masks.Causal() if self.causal else masks.Full()

    @property
    def local_mask(self) -> masks.Mask:
        """What "local_attention" sees."""
        if self.sinks:
            return masks.Lambda(self.sinks, self.window)
        return masks.SlidingWindow(self.window - 1, 0 if self.causal else self.window - 1)

    @property
    def n_blocks(self) -> int:
        return len(self.pattern) * self.repeats


def default_heads(d_model: int, n_kv_heads: int | None, position: str) -> int:
    """Returns the heads of a model that doesn't say how many: at most HEADS.

    They divide d_model, are a multiple of n_kv_heads, and leave pairs of channels to rope; HEADS
    itself where no number does all that.
    """

    def fits(n: int) -> bool:
        pairs = str(position).startswith("rope")
        return not (d_model % n or n % (n_kv_heads or 1) or (pairs and d_model // n % 2))

    return next(filter(fits, range(HEADS, 0, -1)), HEADS)


def _float_dtype(name: str, value: Any) -> jnp.dtype:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}={value!r} is no floating type; e.g. 'float32' or 'bfloat16'")
    return dtype


def _positive(name: str, value: int) -> None:
    if value is None or value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        hint = did_you_mean(value, known)
        raise ValueError(f"{name} is {value!r}, which is unknown; {hint}known: {', '.join(known)}")
