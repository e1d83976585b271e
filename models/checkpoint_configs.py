"""config.json of Hugging Face's layouts to our configurations and back.

What a layout cannot say, or says and we don't have, is an error that names it.
"""

import dataclasses
import math
import pathlib
from typing import Any

from tilescan.models.blocks import make_mixer
from tilescan.models.config import LanguageModelConfig
from tilescan.models.weight_names import CheckpointError

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
LAYOUTS = ("gpt2", "llama", "mamba", "mamba2")


def layout(config: LanguageModelConfig) -> str:
    """The only layout that a model may fit, one of LAYOUTS."""
    if config.pattern in (("mamba",), ("mamba2",)):
        return config.pattern[0]
    return "gpt2" if config.position == "learned" else "llama"


def from_hf_config(hf: dict[str, Any], file: pathlib.Path, dtypes) -> LanguageModelConfig:
    """The configuration that config.json describes.

    Args:
      hf: what config.json holds.
      file: named in errors.
      dtypes: dtype and param_dtype.

    Raises:
      CheckpointError: for what is not supported.
      KeyError, ValueError, TypeError, AttributeError: for what is no such configuration.
    """
    kind = hf.get("model_type")
    read = {"gpt2": _from_gpt2, "llama": _from_llama, "mamba": _from_mamba, "mamba2": _from_mamba2}
    if kind not in read:
        raise CheckpointError(
            f"{file}: model_type {kind!r} is not supported; {', '.join(read)} are"
        )
    fields = read[kind](hf, file)
    return LanguageModelConfig(vocab_size=hf["vocab_size"], **fields, **dtypes)


def _refuse(file, hf, **allowed) -> None:
    """Settings that change the maths and that the models here don't have."""
    for key, value in allowed.items():
        if hf.get(key, value) != value:
            raise CheckpointError(f"{file}: {key}={hf[key]!r} is not supported, only {value!r}")


def _from_gpt2(hf, file) -> dict[str, Any]:
    _refuse(file, hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    activation = hf.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"{file}: activation_function={activation!r} is not supported")
    return dict(
        d_model=hf["n_embd"],
        repeats=hf["n_layer"],
        n_heads=hf["n_head"],
        position="learned",
        max_len=hf["n_positions"],
        norm="layernorm",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        mlp=_ACTIVATIONS[activation],
        mlp_dim=hf.get("n_inner") or 4 * hf["n_embd"],
        attention_bias=True,
        mlp_bias=True,
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def _from_llama(hf, file) -> dict[str, Any]:
    _refuse(file, hf, hidden_act="silu", pretraining_tp=1)
    # transformers 5 moved rope_theta and rope_scaling into rope_parameters.
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    return dict(
        d_model=hf["hidden_size"],
        repeats=hf["num_hidden_layers"],
        n_heads=hf["num_attention_heads"],
        n_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim"),
        position="rope",
        rope_theta=theta,
        rope_scaling=_rope_scaling(rope, file),
        max_len=hf.get("max_position_embeddings", 2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        mlp_dim=hf["intermediate_size"],
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


def _from_mamba(hf, file) -> dict[str, Any]:
    rank = hf.get("time_step_rank", "auto")
    return _recurrent(hf, file, "mamba", dt_rank=None if rank == "auto" else rank)


def _from_mamba2(hf, file) -> dict[str, Any]:
    # transformers 5 writes numbers that JSON lacks as {"__float__": "Infinity"}.
    limit = hf.get("time_step_limit", (0.0, math.inf))
    limit = tuple(float(x["__float__"] if isinstance(x, dict) else x) for x in limit)
    fields = _recurrent(
        hf,
        file,
        "mamba2",
        head_dim=hf["head_dim"],
        n_groups=hf["n_groups"],
        dt_limit=None if limit == (0.0, math.inf) else limit,
    )
    heads, inner = hf["num_heads"], hf.get("expand", 2) * hf["hidden_size"]
    if heads * hf["head_dim"] != inner:
        raise CheckpointError(
            f"{file}: num_heads={heads} times head_dim={hf['head_dim']} must be expand * "
            f"hidden_size = {inner}"
        )
    return fields


def _recurrent(hf, file, kind, **options) -> dict[str, Any]:
    _refuse(file, hf, hidden_act="silu")
    options |= dict(
        state_dim=hf["state_size"],
        expand=hf.get("expand", 2),
        conv_width=hf.get("conv_kernel", 4),
        conv_bias=hf.get("use_conv_bias", True),
        use_bias=hf.get("use_bias", False),
    )
    rank = options.get("dt_rank")
    if rank is not None and rank == -(-hf["hidden_size"] // 16):
        options["dt_rank"] = None  # what None stands for
    return dict(
        d_model=hf["hidden_size"],
        repeats=hf["num_hidden_layers"],
        pattern=(kind,),
        position="none",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", kind == "mamba"),
        mixers={kind: options},
    )


def _rope_scaling(rope: dict[str, Any], file) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return dict(kind="linear", factor=rope["factor"])
    if kind == "llama3":
        return dict(
            kind="llama3",
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_len=rope["original_max_position_embeddings"],
        )
    raise CheckpointError(f"{file}: rope type {kind!r} is not supported; linear and llama3 are")


def to_hf_config(config: LanguageModelConfig) -> dict[str, Any]:
    """config.json of the layout that fits; every field must survive the way back."""
    common = dict(vocab_size=config.vocab_size, tie_word_embeddings=config.tie_embeddings)
    kind = layout(config)
    if kind in ("mamba", "mamba2"):
        hf = _to_mamba(config, kind) | common
    elif kind == "gpt2":
        names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()} | {"gelu_tanh": "gelu_new"}
        hf = dict(
            model_type="gpt2",
            architectures=["GPT2LMHeadModel"],
            n_embd=config.d_model,
            n_layer=config.repeats,
            n_head=config.n_heads,
            n_positions=config.max_len,
            n_inner=config.mlp_dim,
            activation_function=names.get(config.mlp, config.mlp),
            layer_norm_epsilon=config.norm_eps,
            **common,
        )
    else:
        rope = dict(rope_type="default", rope_theta=config.rope_theta)
        if config.rope_scaling is not None:
            rope |= dataclasses.asdict(config.rope_scaling)
            rope["rope_type"] = rope.pop("kind")
            rope["original_max_position_embeddings"] = rope.pop("original_max_len")
        hf = dict(
            model_type="llama",
            architectures=["LlamaForCausalLM"],
            hidden_act="silu",
            hidden_size=config.d_model,
            num_hidden_layers=config.repeats,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.mlp_dim,
            max_position_embeddings=config.max_len,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            rope_parameters=rope,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            **common,
        )
    _check_exportable(config, hf)
    return hf


def _to_mamba(config: LanguageModelConfig, kind: str) -> dict[str, Any]:
    mixer = make_mixer(config, kind)
    hf = dict(
        model_type=kind,
        architectures=["MambaForCausalLM" if kind == "mamba" else "Mamba2ForCausalLM"],
        hidden_act="silu",
        hidden_size=config.d_model,
        num_hidden_layers=config.repeats,
        layer_norm_epsilon=config.norm_eps,
        state_size=mixer.state_dim,
        expand=mixer.expand,
        conv_kernel=mixer.conv_width,
        use_conv_bias=mixer.conv_bias,
        use_bias=mixer.use_bias,
    )
    if kind == "mamba":
        return hf | dict(time_step_rank=mixer.rank, intermediate_size=mixer.expand * config.d_model)
    hf |= dict(head_dim=mixer.head_dim, n_groups=mixer.n_groups)
    hf |= dict(num_heads=mixer.expand * config.d_model // mixer.head_dim)
    return hf if mixer.dt_limit is None else hf | dict(time_step_limit=mixer.dt_limit)


# How a model is run is no property of its checkpoint; fields of what its blocks don't have neither.
_FREE = ("remat", "scan_layers", "attention_implementation")
_FREE_OPTIONS = ("chunk", "implementation")
_OF_ATTENTION_AND_MLP = (
    "n_heads", "n_kv_heads", "head_dim", "causal", "mask", "window", "sinks", "rope_theta",
    "rope_scaling", "qk_norm", "attention_scale", "attention_logit_cap", "attention_bias", "mlp",
    "mlp_dim", "mlp_bias", "max_len",
)  # fmt: skip


def _check_exportable(config: LanguageModelConfig, hf: dict[str, Any]) -> None:
    free, kind = _FREE, hf["model_type"]
    if kind in ("mamba", "mamba2"):
        free += _OF_ATTENTION_AND_MLP
        options = dict(config.mixers.get(kind, {}))
        for name in _FREE_OPTIONS:
            options.pop(name, None)
        position = config.position if config.position == "learned" else "none"
        config = dataclasses.replace(config, mixers={kind: options}, position=position)
    dtypes = dict(dtype=config.dtype, param_dtype=config.param_dtype)
    back = from_hf_config(hf, pathlib.Path("config.json"), dtypes)
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(back, field.name)
        if field.name not in free and ours != theirs:
            raise CheckpointError(
                f"the {kind} layout has no place for {field.name}={ours!r} (it means {theirs!r}); "
                f"only {', '.join(LAYOUTS)} models can be exported"
            )
    if not config.scan_layers:
        raise CheckpointError("export needs the stacked parameters of scan_layers=True")
