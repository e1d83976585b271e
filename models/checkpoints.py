"""Published checkpoints: GPT-2 and Llama folders of Hugging Face, and GGUF llama files.

config, params = load_pretrained("SmolLM2-135M-Instruct.Q4_1.gguf")
logits, _ = LanguageModel(config).apply({"params": params}, tokens)
"""

import dataclasses
import json
import pathlib
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from models import weight_names
from models.config import LanguageModelConfig
from models.language_model import LanguageModel
from models.weight_names import CheckpointError

# Buffers that older exports store beside the weights: masks and rotary tables.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", "rope_freqs.weight")


def load_pretrained(
    path: str | pathlib.Path, *, dtype: Any = "float32", param_dtype: Any = "float32"
) -> tuple[LanguageModelConfig, dict[str, Any]]:
    """Reads a checkpoint.

    Args:
      path: a folder with config.json and model.safetensors (or its shards and their index), or
        a .gguf file of the llama architecture (quantised tensors are dequantised).
      dtype: of the computation.
      param_dtype: of the parameters.

    Returns:
      The configuration and the parameters, as `LanguageModel.apply({"params": params}, ...)`
      takes them.

    Raises:
      FileNotFoundError: if there is no such file, or one of its shards is absent.
      CheckpointError: for an unsupported architecture, a truncated file, or missing, unknown and
        mis-shaped tensors, by name.
    """
    path = pathlib.Path(path)
    dtypes = dict(dtype=dtype, param_dtype=param_dtype)
    if path.is_dir():
        return _load_folder(path, dtypes)
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {path}: a folder with config.json or a .gguf file is needed"
        )
    if path.suffix == ".gguf":
        return _load_gguf(path, dtypes)
    raise CheckpointError(f"{path} is neither a folder with config.json nor a .gguf file")


def save_pretrained(path: str | pathlib.Path, config: LanguageModelConfig, params) -> None:
    """Writes config.json and model.safetensors in Hugging Face's layout of GPT-2 or Llama.

    Raises:
      CheckpointError: if the model is neither of the two.
    """
    path = pathlib.Path(path)
    hf = _to_hf_config(config)
    flat = {"/".join(k): np.asarray(v) for k, v in flatten_dict(nn.unbox(params)).items()}
    tensors = {}
    for entry, names in weight_names.file_names(_ENTRIES[hf["model_type"]](config), config.repeats):
        for i, name in enumerate(names):
            values = [flat[p][i] if entry.per_layer else flat[p] for p in entry.paths]
            tensors[name] = entry.write(values)
    path.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


# Hugging Face folders


def _load_folder(path: pathlib.Path, dtypes):
    file = path / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{path} has no config.json")
    try:
        config = _from_hf_config(json.loads(file.read_text()), file, dtypes)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{file} has no {error.args[0]!r}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} describes no model: {error}") from error
    shards = _shards(path)
    where = {}
    for shard in shards:
        with _open(shard) as opened:
            for name in opened.keys():
                if not name.endswith(_BUFFERS):
                    where[_canonical(name)] = (shard, name)
    if config.tie_embeddings:
        where.pop("lm_head.weight", None)  # some exports store the tied matrix twice
    opened = {shard: _open(shard) for shard in shards}

    def read(name):
        shard, stored = where[name]
        return np.asarray(opened[shard].get_tensor(stored))

    entries = _ENTRIES["gpt2" if config.position == "learned" else "llama"](config)
    return config, _read(config, entries, set(where), read, str(path))


def _canonical(name: str) -> str:
    """GPT-2's own files lack the prefix that `transformers` writes."""
    return "transformer." + name if name.startswith(("wte.", "wpe.", "h.", "ln_f.")) else name


def _shards(path: pathlib.Path) -> list[pathlib.Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} has no readable weight_map: {error!r}") from error
    else:
        names = ["model.safetensors"]
    absent = [name for name in names if not (path / name).exists()]
    if absent:
        raise FileNotFoundError(f"{path} lacks {', '.join(absent)}")
    return [path / name for name in names]


def _open(shard: pathlib.Path):
    try:
        return safetensors.safe_open(shard, framework="numpy")
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{shard} ({shard.stat().st_size} bytes) is truncated or no safetensors file: {error}"
        ) from error


_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_ENTRIES = {"gpt2": weight_names.gpt2_entries, "llama": weight_names.llama_entries}


def _from_hf_config(hf: dict[str, Any], file: pathlib.Path, dtypes) -> LanguageModelConfig:
    kind = hf.get("model_type")
    if kind == "gpt2":
        fields = _from_gpt2(hf, file)
    elif kind == "llama":
        fields = _from_llama(hf, file)
    else:
        raise CheckpointError(f"{file}: model_type {kind!r} is not supported; gpt2 and llama are")
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


def _to_hf_config(config: LanguageModelConfig) -> dict[str, Any]:
    """config.json of the layout that fits; every field must survive the way back."""
    common = dict(vocab_size=config.vocab_size, tie_word_embeddings=config.tie_embeddings)
    if config.position == "learned":
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


def _check_exportable(config: LanguageModelConfig, hf: dict[str, Any]) -> None:
    dtypes = dict(dtype=config.dtype, param_dtype=config.param_dtype)
    back = _from_hf_config(hf, pathlib.Path("config.json"), dtypes)
    # How a model is run is no property of its checkpoint.
    free = ("remat", "scan_layers", "attention_implementation")
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(back, field.name)
        if field.name not in free and ours != theirs:
            raise CheckpointError(
                f"the {hf['model_type']} layout has no place for {field.name}={ours!r} (it means "
                f"{theirs!r}); only GPT-2 and Llama models can be exported"
            )
    if not config.scan_layers:
        raise CheckpointError("export needs the stacked parameters of scan_layers=True")


# GGUF


def _load_gguf(path: pathlib.Path, dtypes):
    try:
        reader = gguf.GGUFReader(path)
        tensors = {t.name: t for t in reader.tensors if not t.name.endswith(_BUFFERS)}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no GGUF file: {error}"
        ) from error
    config = _from_gguf(reader, path, tied="output.weight" not in tensors, dtypes=dtypes)

    def read(name):
        tensor = tensors[name]
        return gguf.dequantize(tensor.data, tensor.tensor_type)

    entries = weight_names.gguf_llama_entries(config)
    return config, _read(config, entries, set(tensors), read, str(path))


def _from_gguf(reader, path, *, tied: bool, dtypes) -> LanguageModelConfig:
    def get(key, default=None):
        field = reader.get_field(key)
        if field is None:
            if default is None:
                raise CheckpointError(f"{path}: the field {key!r} is missing")
            return default
        return field.contents()

    kind = get("general.architecture")
    if kind != "llama":
        raise CheckpointError(f"{path}: architecture {kind!r} is not supported; llama is")
    if get("llama.rope.scaling.type", "none") != "none":
        raise CheckpointError(f"{path}: scaled rotary positions are not supported in GGUF files")
    heads, width = get("llama.attention.head_count"), get("llama.embedding_length")
    return LanguageModelConfig(
        vocab_size=len(get("tokenizer.ggml.tokens")),
        d_model=width,
        repeats=get("llama.block_count"),
        n_heads=heads,
        n_kv_heads=get("llama.attention.head_count_kv", heads),
        head_dim=get("llama.rope.dimension_count", width // heads),
        position="rope_interleaved",
        rope_theta=get("llama.rope.freq_base", 10000.0),
        max_len=get("llama.context_length"),
        norm_eps=get("llama.attention.layer_norm_rms_epsilon"),
        mlp_dim=get("llama.feed_forward_length"),
        tie_embeddings=tied,
        **dtypes,
    )


def _read(config, entries, names, read, source) -> dict[str, Any]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    abstract = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)
    flat = flatten_dict(nn.unbox(abstract)["params"])
    shapes = {"/".join(path): leaf.shape for path, leaf in flat.items()}
    params = weight_names.read_params(config, entries, shapes, names, read, source)
    return unflatten_dict({tuple(path.split("/")): value for path, value in params.items()})
