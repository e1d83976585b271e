"""Published checkpoints: folders of Hugging Face (GPT-2, Llama, Mamba, Mamba-2), GGUF llama files.

config, params = load_pretrained("SmolLM2-135M-Instruct.Q4_1.gguf")
logits, _ = LanguageModel(config).apply({"params": params}, tokens)
"""

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

from tilescan.models import weight_names
from tilescan.models.checkpoint_configs import from_hf_config, layout, to_hf_config
from tilescan.models.config import LanguageModelConfig
from tilescan.models.language_model import LanguageModel
from tilescan.models.weight_names import CheckpointError

# Buffers that older exports store beside the weights: masks and rotary tables.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", "rope_freqs.weight")
_ENTRIES = {
    "gpt2": weight_names.gpt2_entries,
    "llama": weight_names.llama_entries,
    "mamba": weight_names.mamba_entries,
    "mamba2": weight_names.mamba_entries,
}


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
    """Writes config.json and model.safetensors in the layout of Hugging Face that fits.

    Raises:
      CheckpointError: if the model is no GPT-2, Llama, Mamba or Mamba-2.
    """
    path = pathlib.Path(path)
    hf = to_hf_config(config)
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
        config = from_hf_config(json.loads(file.read_text()), file, dtypes)
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

    entries = _ENTRIES[layout(config)](config)
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
    leaves = {"/".join(path): leaf for path, leaf in flat.items()}
    params = weight_names.read_params(config, entries, leaves, names, read, source)
    return unflatten_dict({tuple(path.split("/")): value for path, value in params.items()})
