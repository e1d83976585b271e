"""Metadata of GGUF's llama architecture to our configuration.

Every key is read, is known to be harmless (harmless_keys.py), or is an error that names it.
"""

import pathlib
from typing import Any

import numpy as np

from tilescan.models.checkpoint_errors import CheckpointError
from tilescan.models.config import LanguageModelConfig
from tilescan.models.config_keys import (
    MOST_CHANNELS,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_TOKENS,
    Keys,
)
from tilescan.models.harmless_keys import harmless_gguf
from tilescan.models.stored_tensors import StoredTensor, check_readable

ROPE_FACTORS = "rope_freqs.weight"


def from_gguf(
    metadata: dict[str, Any],
    tensors: dict[str, StoredTensor],
    file: pathlib.Path,
    dtypes: dict[str, Any],
) -> LanguageModelConfig:
    """Returns the configuration that metadata describe.

    Args:
      metadata: by key.
      tensors: of the file. A model is tied if it has no head; "rope_freqs.weight" is what Llama
        3.1's rotary frequencies are divided by.
      file: named in errors.
      dtypes: dtype and param_dtype.

    Raises:
      CheckpointError: for keys that are missing, unknown or not supported, and for values of a
        wrong type, out of bounds or in contradiction to each other.
    """
    keys = Keys(metadata, file)
    kind = keys.get("general.architecture")
    if kind != "llama":
        raise CheckpointError(f"{file}: architecture {kind!r} is not supported; llama is")
    keys.only("general.type", "model")
    keys.only("split.count", 1, 0)
    _refuse_other_functions(keys)

    width = keys.integer("llama.embedding_length", "d_model", MOST_CHANNELS)
    heads = keys.integer("llama.attention.head_count", "n_heads", MOST_HEADS)
    head_dim = keys.integer("llama.attention.key_length", "head_dim", MOST_HEADS, None)
    if head_dim is None:
        if width % heads:
            keys.refuse("llama.attention.head_count", f"n_heads must divide d_model={width}")
        head_dim = width // heads
    keys.equal("llama.attention.value_length", head_dim, "the length of keys")
    keys.equal("llama.rope.dimension_count", head_dim, "the length of keys")

    fields = dict(
        vocab_size=_vocab_size(keys),
        d_model=width,
        repeats=keys.integer("llama.block_count", "repeats", MOST_LAYERS),
        n_heads=heads,
        n_kv_heads=keys.integer("llama.attention.head_count_kv", "n_kv_heads", MOST_HEADS, heads),
        head_dim=head_dim,
        position="rope_interleaved",
        rope_theta=keys.number("llama.rope.freq_base", "rope_theta", 1e-6, 1e30, 10000.0),
        rope_scaling=_rope_scaling(keys, tensors.get(ROPE_FACTORS), head_dim),
        max_len=keys.integer("llama.context_length", "max_len", MOST_TOKENS),
        norm_eps=keys.number("llama.attention.layer_norm_rms_epsilon", "norm_eps", 0.0, 1.0),
        mlp_dim=keys.integer("llama.feed_forward_length", "mlp_dim", MOST_CHANNELS),
        tie_embeddings="output.weight" not in tensors,
    )
    keys.finish(harmless_gguf)
    try:
        return LanguageModelConfig(**fields, **dtypes)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} describes no model: {error}") from error


def _refuse_other_functions(keys: Keys) -> None:
    """What the architecture allows and the models here don't have."""
    for name in ("expert_count", "expert_used_count", "expert_shared_count"):
        keys.only("llama." + name, 0)
    for name in ("sliding_window", "max_alibi_bias", "clamp_kqv", "scale"):
        keys.only("llama.attention." + name, 0)
    keys.only("llama.attention.causal", True)
    keys.only("llama.use_parallel_residual", False)
    keys.only("llama.rope.scaling.attn_factor", 1.0)
    for name in ("logit_scale", "embedding_scale", "residual_scale"):
        keys.only("llama." + name, 1.0, 0)


def _vocab_size(keys: Keys) -> int:
    tokens = keys.get("tokenizer.ggml.tokens", None)
    if tokens is None:
        return keys.integer("llama.vocab_size", "vocab_size", MOST_CHANNELS)
    if not isinstance(tokens, list) or not tokens:
        keys.refuse("tokenizer.ggml.tokens", "it must be a list of tokens")
    keys.equal("llama.vocab_size", len(tokens), "the number of tokenizer.ggml.tokens")
    return len(tokens)


def _rope_scaling(keys: Keys, factors: StoredTensor | None, head_dim: int) -> dict[str, Any] | None:
    """All frequencies divided by one factor, each by its own, or both.

    A factor without a type is linear, as in llama.cpp; 0 stands for none.
    """
    old, new = "llama.rope.scale_linear", "llama.rope.scaling.factor"
    found = [
        keys.number(key, "rope_scaling.factor", 0.0, 1e6) or 1.0
        for key in (old, new)
        if keys.has(key)
    ]
    factor = found[-1] if found else 1.0
    if found and found[0] != factor:
        keys.refuse(old, f"{new}={factor:g} says something else")
    kind = keys.text("llama.rope.scaling.type", ("none", "linear"), "linear")
    if kind == "none" and factor != 1:
        keys.refuse("llama.rope.scaling.type", f"a factor of {factor:g} contradicts it")

    if factors is not None:
        check_readable(ROPE_FACTORS, factors)
        if factors.shape != (head_dim // 2,):
            raise CheckpointError(
                f"{keys.file}: tensor {ROPE_FACTORS!r} has shape {factors.shape}, but the "
                f"configuration asks for {(head_dim // 2,)}"
            )
        values = np.asarray(factors.read(), np.float64)
        if not np.all((values > 0) & np.isfinite(values)):
            raise CheckpointError(
                f"{keys.file}: tensor {ROPE_FACTORS!r} must have positive, finite values"
            )
        return dict(kind="per_frequency", factors=tuple(values.tolist()), factor=factor)
    return None if factor == 1 else dict(kind="linear", factor=factor)
