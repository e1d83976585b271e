"""Our configurations to config.json of Hugging Face's layouts.

What a layout cannot say is an error that names it.
"""

import dataclasses
import pathlib
from typing import Any

from tilescan.models.blocks import make_mixer
from tilescan.models.checkpoint_configs import ACTIVATIONS, LAYOUTS, from_hf_config, layout
from tilescan.models.checkpoint_errors import CheckpointError
from tilescan.models.config import LanguageModelConfig


def to_hf_config(config: LanguageModelConfig) -> dict[str, Any]:
    """Returns config.json of the layout that fits.

    Raises:
      CheckpointError: a field of the configuration for which the layout has no place, by name.
    """
    common = dict(vocab_size=config.vocab_size, tie_word_embeddings=config.tie_embeddings)
    kind = layout(config)
    if kind in ("mamba", "mamba2"):
        hf = _to_mamba(config, kind) | common
    elif kind == "gpt2":
        names = {ours: theirs for theirs, ours in ACTIVATIONS.items()} | {"gelu_tanh": "gelu_new"}
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
            rope_parameters=_rope_parameters(config),
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            **common,
        )
    _check_exportable(config, hf)
    return hf


def _rope_parameters(config: LanguageModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = dict(rope_type="default", rope_theta=config.rope_theta)
    scaling = config.rope_scaling
    if scaling is None:
        return rope
    rope |= dict(rope_type=scaling.kind, factor=scaling.factor)
    if scaling.kind == "llama3":
        rope |= dict(
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.original_max_len,
        )
    return rope


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


# How a model is run is not a property of its checkpoint; nor are fields of blocks it doesn't have.
_FREE = (
    "remat", "scan_layers", "attention_implementation", "attention_sequence_parallel",
    "scan_sequence_parallel", "sequence_balance",
)  # fmt: skip
_FREE_OPTIONS = ("chunk", "implementation")
_OF_ATTENTION_AND_MLP = (
    "n_heads", "n_kv_heads", "head_dim", "causal", "rope_theta", "rope_scaling", "qk_norm",
    "attention_scale", "attention_logit_cap", "attention_bias", "mlp", "mlp_dim", "mlp_bias",
    "max_len",
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
