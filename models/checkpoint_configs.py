"""config.json of Hugging Face's layouts to our configurations.

Every key is read, is known to be harmless (harmless_keys.py), or is an error that names it.
"""

import math
import pathlib
from typing import Any

from tilescan.models.checkpoint_errors import CheckpointError, short
from tilescan.models.config import LanguageModelConfig
from tilescan.models.config_keys import (
    MOST_CHANNELS,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_TOKENS,
    REQUIRED,
    Keys,
)
from tilescan.models.harmless_keys import HARMLESS

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
LAYOUTS = ("gpt2", "llama", "mamba", "mamba2")
# Other names that `transformers` takes for GPT-2's keys.
_GPT2_NAMES = dict(
    hidden_size="n_embd",
    max_position_embeddings="n_positions",
    num_attention_heads="n_head",
    num_hidden_layers="n_layer",
)


def layout(config: LanguageModelConfig) -> str:
    """Returns the only layout that a model may fit, one of LAYOUTS."""
    if config.pattern in (("mamba",), ("mamba2",)):
        return config.pattern[0]
    return "gpt2" if config.position == "learned" else "llama"


def from_hf_config(
    hf: dict[str, Any], file: pathlib.Path, dtypes: dict[str, Any]
) -> LanguageModelConfig:
    """Returns the configuration that config.json describes.

    Args:
      hf: what config.json holds.
      file: named in errors.
      dtypes: dtype and param_dtype.

    Raises:
      CheckpointError: for keys that are missing, unknown or not supported, and for values of a
        wrong type, out of bounds or in contradiction to each other.
    """
    keys = Keys(hf, file)
    read = {"gpt2": _from_gpt2, "llama": _from_llama, "mamba": _from_mamba, "mamba2": _from_mamba2}
    kind = keys.text("model_type", read, None)
    # Weights that are not plain numbers, other blocks, and code of the model's own.
    keys.only("quantization_config", None)
    keys.only("quantization", None)
    keys.only("compression_config", None)
    keys.only("auto_map", None)
    keys.only("pruned_heads", {}, None)
    keys.only("is_encoder_decoder", False)
    keys.only("add_cross_attention", False)
    keys.only("cross_attention_hidden_size", None)
    fields = read[kind](keys)
    keys.finish(HARMLESS[kind].__contains__)
    try:
        return LanguageModelConfig(**fields, **dtypes)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} describes no model: {error}") from error


def _from_gpt2(keys: Keys) -> dict[str, Any]:
    keys.rename(_GPT2_NAMES)
    keys.only("scale_attn_weights", True)
    keys.only("scale_attn_by_inverse_layer_idx", False)
    width = keys.integer("n_embd", "d_model", MOST_CHANNELS)
    return dict(
        vocab_size=keys.integer("vocab_size", "vocab_size", MOST_CHANNELS),
        d_model=width,
        repeats=keys.integer("n_layer", "repeats", MOST_LAYERS),
        n_heads=keys.integer("n_head", "n_heads", MOST_HEADS),
        position="learned",
        max_len=keys.integer("n_positions", "max_len", MOST_CHANNELS, 1024),
        norm="layernorm",
        norm_eps=_eps(keys, "layer_norm_epsilon", 1e-5),
        mlp=ACTIVATIONS[keys.text("activation_function", ACTIVATIONS, "gelu_new")],
        mlp_dim=keys.integer("n_inner", "mlp_dim", MOST_CHANNELS, None) or 4 * width,
        attention_bias=True,
        mlp_bias=True,
        tie_embeddings=keys.flag("tie_word_embeddings", "tie_embeddings", True),
    )


def _from_llama(keys: Keys) -> dict[str, Any]:
    keys.only("hidden_act", "silu")
    keys.only("pretraining_tp", 1, None)
    keys.only("rope_interleaved", False)
    keys.only("sliding_window", None)
    keys.only("use_sliding_window", False)
    keys.only("partial_rotary_factor", 1.0, None)
    heads = keys.integer("num_attention_heads", "n_heads", MOST_HEADS)
    max_len = keys.integer("max_position_embeddings", "max_len", MOST_TOKENS, 2048)
    theta, scaling = _rope(keys, max_len)
    return dict(
        vocab_size=keys.integer("vocab_size", "vocab_size", MOST_CHANNELS),
        d_model=keys.integer("hidden_size", "d_model", MOST_CHANNELS),
        repeats=keys.integer("num_hidden_layers", "repeats", MOST_LAYERS),
        n_heads=heads,
        n_kv_heads=keys.integer("num_key_value_heads", "n_kv_heads", MOST_HEADS, None) or heads,
        head_dim=keys.integer("head_dim", "head_dim", MOST_HEADS, None),
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        max_len=max_len,
        norm_eps=_eps(keys, "rms_norm_eps", 1e-6),
        mlp_dim=keys.integer("intermediate_size", "mlp_dim", MOST_CHANNELS),
        attention_bias=keys.flag("attention_bias", "attention_bias", False),
        mlp_bias=keys.flag("mlp_bias", "mlp_bias", False),
        tie_embeddings=keys.flag("tie_word_embeddings", "tie_embeddings", False),
    )


def _from_mamba(keys: Keys) -> dict[str, Any]:
    rank = None
    if keys.get("time_step_rank", "auto") != "auto":
        rank = keys.integer("time_step_rank", "mamba.dt_rank", MOST_CHANNELS)
    sizes = dict(vocab_size=50280, hidden_size=768, num_hidden_layers=32, state_size=16)
    fields = _recurrent(keys, "mamba", sizes, tied=True, dt_rank=rank)
    if rank == -(-fields["d_model"] // 16):
        fields["mixers"]["mamba"]["dt_rank"] = None  # what None stands for
    return fields


def _from_mamba2(keys: Keys) -> dict[str, Any]:
    sizes = dict(vocab_size=32768, hidden_size=4096, num_hidden_layers=64, state_size=128)
    head_dim = keys.integer("head_dim", "mamba2.head_dim", MOST_CHANNELS, 64)
    fields = _recurrent(
        keys,
        "mamba2",
        sizes,
        tied=False,
        head_dim=head_dim,
        n_groups=keys.integer("n_groups", "mamba2.n_groups", MOST_HEADS, 8),
        dt_limit=_step_limits(keys),
    )
    heads = keys.integer("num_heads", "the number of heads", MOST_CHANNELS, 128)
    inner = fields["mixers"]["mamba2"]["expand"] * fields["d_model"]
    if heads * head_dim != inner:
        raise CheckpointError(
            f"{keys.file}: num_heads={heads} times head_dim={head_dim} must be expand * "
            f"hidden_size = {inner}"
        )
    return fields


def _recurrent(keys: Keys, kind: str, sizes, *, tied: bool, **options) -> dict[str, Any]:
    """What Mamba and Mamba-2 share; absent keys have the defaults of `transformers`."""
    keys.only("hidden_act", "silu")
    keys.only("rms_norm", True)
    keys.only("ssm_cfg", {}, None, {"layer": "Mamba2"} if kind == "mamba2" else None)
    width = keys.integer("hidden_size", "d_model", MOST_CHANNELS, sizes["hidden_size"])
    layers = keys.integer("num_hidden_layers", "repeats", MOST_LAYERS, sizes["num_hidden_layers"])
    expand = keys.integer("expand", f"{kind}.expand", MOST_HEADS, 2)
    # Converters leave the names of the first implementation beside these.
    keys.equal("d_model", width, "hidden_size")
    keys.equal("n_layer", layers, "num_hidden_layers")
    keys.equal("numb_hidden_layers", layers, "num_hidden_layers")
    keys.equal("intermediate_size", expand * width, "expand * hidden_size")
    keys.equal("d_inner", expand * width, "expand * hidden_size")
    options |= dict(
        state_dim=keys.integer("state_size", f"{kind}.state_dim", MOST_HEADS, sizes["state_size"]),
        expand=expand,
        conv_width=keys.integer("conv_kernel", f"{kind}.conv_width", MOST_HEADS, 4),
        conv_bias=keys.flag("use_conv_bias", f"{kind}.conv_bias", True),
        use_bias=keys.flag("use_bias", f"{kind}.use_bias", False),
    )
    return dict(
        vocab_size=keys.integer("vocab_size", "vocab_size", MOST_CHANNELS, sizes["vocab_size"]),
        d_model=width,
        repeats=layers,
        pattern=(kind,),
        position="none",
        norm_eps=_eps(keys, "layer_norm_epsilon", 1e-5),
        tie_embeddings=keys.flag("tie_word_embeddings", "tie_embeddings", tied),
        mixers={kind: options},
    )


def _eps(keys: Keys, key: str, default: float) -> float:
    return keys.number(key, "norm_eps", 0.0, 1.0, default)


def _step_limits(keys: Keys) -> tuple[float, float] | None:
    """Bounds of Mamba-2's step sizes; None for those that bound nothing."""
    key = "time_step_limit"
    limit = keys.get(key, (0.0, math.inf))
    if not isinstance(limit, list | tuple) or len(limit) != 2:
        keys.refuse(key, "mamba2.dt_limit must be two numbers")
    # transformers 5 writes numbers that JSON lacks as {"__float__": "Infinity"}.
    infinite = {"__float__": "Infinity"}
    low, high = (math.inf if x == infinite else x for x in limit)
    if any(type(x) not in (int, float) for x in (low, high)) or not 0 <= low <= high:
        keys.refuse(key, "mamba2.dt_limit must be two numbers, 0 <= low <= high")
    return None if (low, high) == (0.0, math.inf) else (float(low), float(high))


def _rope(keys: Keys, max_len: int) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling.

    transformers 5 moved both into rope_parameters; what stands in two places must be the same.
    """
    where = "rope_parameters"
    new, old = keys.get("rope_parameters", None), keys.get("rope_scaling", None)
    if new and old and new != old:
        keys.refuse("rope_scaling", f"rope_parameters={short(new)} says something else")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            keys.refuse(key, "it must be an object or null")
    if not new and old:
        where = "rope_scaling"
    rope = Keys(new or old or {}, keys.file, where)
    rope.rename({"type": "rope_type"})
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(
            f"{keys.file}: rope type {short(kind)} is not supported; linear and llama3 are"
        )

    def number(key: str, ours: str, default: Any = REQUIRED) -> float:
        return rope.number(key, f"rope_scaling.{ours}", 1e-6, 1e6, default)

    scaling = None
    if kind == "linear":
        scaling = dict(kind="linear", factor=number("factor", "factor"))
    elif kind == "llama3":
        key = "original_max_position_embeddings"
        scaling = dict(
            kind="llama3",
            factor=number("factor", "factor"),
            low_freq_factor=number("low_freq_factor", "low_freq_factor"),
            high_freq_factor=number("high_freq_factor", "high_freq_factor"),
            original_max_len=rope.integer(
                key, "rope_scaling.original_max_len", MOST_TOKENS, max_len
            ),
        )
    rope.only("partial_rotary_factor", 1.0, None)
    thetas = [
        place.number("rope_theta", "rope_theta", 1e-6, 1e30)
        for place in (rope, keys)
        if place.has("rope_theta")
    ]
    if len(set(thetas)) > 1:
        keys.refuse("rope_theta", f"{where}.rope_theta={thetas[0]!r} says something else")
    # Earlier exports of ours had llama3's keys, too, and linear scaling reads none of them.
    unread = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rope.finish((unread if kind == "linear" else ()).__contains__)
    return (thetas[0] if thetas else 10000.0), scaling
