"""Published checkpoints: folders of Hugging Face (GPT-2, Llama, Mamba, Mamba-2), GGUF llama files.

config, params = load_pretrained("SmolLM2-135M-Instruct.Q4_1.gguf")
logits, _ = LanguageModel(config).apply({"params": params}, tokens)

Every key of config.json and of GGUF metadata, and every tensor, is used, is known to leave the
logits as they are, or is refused by name; checks come before anything is allocated.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from tilescan.models import weight_names
from tilescan.models.checkpoint_configs import from_hf_config, layout
from tilescan.models.checkpoint_errors import CheckpointError, MissingFileError
from tilescan.models.checkpoint_exports import to_hf_config
from tilescan.models.config import LanguageModelConfig
from tilescan.models.gguf_configs import ROPE_FACTORS, from_gguf
from tilescan.models.gguf_files import read_gguf
from tilescan.models.json_files import read_json
from tilescan.models.language_model import LanguageModel
from tilescan.models.positions import rope_frequencies
from tilescan.models.safetensors_files import INDEX, read_folder
from tilescan.models.stored_tensors import StoredTensor, merge_tied_head, read_params

_ENTRIES = {
    "gpt2": weight_names.gpt2_entries,
    "llama": weight_names.llama_entries,
    "mamba": weight_names.mamba_entries,
    "mamba2": weight_names.mamba_entries,
}
# Of a folder beside config.json: weights to add to those of the model.
_ADAPTER = "adapter_config.json"


def load_pretrained(
    path: str | pathlib.Path, *, dtype: Any = "float32", param_dtype: Any = "float32"
) -> tuple[LanguageModelConfig, dict[str, Any]]:
    """Reads a checkpoint.

    The file's own dtype decides nothing: float16 and bfloat16 weights are converted to
    `param_dtype` and computed with in `dtype`, both float32 unless asked for otherwise. (Logits are
    then more exact than those of `transformers`, which computes in float16 what is stored so: the
    two agree to float16's rounding.)

    Args:
      path: a folder with config.json and model.safetensors (or its shards and their index), or
        a .gguf file of the llama architecture (quantized tensors are dequantized).
      dtype: of the computation.
      param_dtype: of the parameters.

    Returns:
      The configuration and the parameters, as `LanguageModel.apply({"params": params}, ...)`
      takes them.

    Raises:
      MissingFileError: if there is no such file, or one of its shards is absent; it is a
        CheckpointError and a FileNotFoundError.
      CheckpointError: for an unsupported architecture, a truncated file, keys that are unknown, of
        a wrong type or out of bounds, and missing, unknown, unreadable and mis-shaped tensors, by
        name.
      ValueError: if a dtype is not a floating type.
    """
    opened = open_pretrained(path, dtype=dtype, param_dtype=param_dtype)
    return opened.config, opened.read_params()


class Opened(NamedTuple):
    """A checkpoint of which only the description is read.

    config: of the model. metadata: of a GGUF file, by key; else None. read_params: returns the
    parameters, in arrays that JAX on a CPU takes as they are.
    """

    config: LanguageModelConfig
    metadata: dict[str, Any] | None
    read_params: Callable[[], dict[str, Any]]


def open_pretrained(
    path: str | pathlib.Path, *, dtype: Any = "float32", param_dtype: Any = "float32"
) -> Opened:
    """Reads what a checkpoint says about its model; arguments and errors as `load_pretrained`.

    Programs can be compiled by it while the parameters are read.
    """
    path = pathlib.Path(path)
    dtypes = dict(dtype=dtype, param_dtype=param_dtype)
    LanguageModelConfig(vocab_size=1, **dtypes)  # a wrong dtype is not a fault of the checkpoint
    if path.is_dir():
        return _open_folder(path, dtypes)
    if not path.exists():
        raise MissingFileError(
            f"no checkpoint at {path}: a folder with config.json or a .gguf file is needed"
        )
    if path.suffix == ".gguf" and path.is_file():
        return _open_gguf(path, dtypes)
    raise CheckpointError(f"{path} is neither a folder with config.json nor a .gguf file")


def save_pretrained(path: str | pathlib.Path, config: LanguageModelConfig, params: Any) -> None:
    """Writes config.json and model.safetensors in the layout of Hugging Face that fits.

    Raises:
      CheckpointError: if the model is not a GPT-2, Llama, Mamba or Mamba-2, or if the folder holds
        shards, whose index would contradict the file.
    """
    path = pathlib.Path(path)
    hf = to_hf_config(config)
    if (path / INDEX).exists():
        raise CheckpointError(f"{path} holds {INDEX} of another checkpoint; take another folder")
    flat = {"/".join(k): np.asarray(v) for k, v in flatten_dict(nn.unbox(params)).items()}
    tensors = {}
    for entry, names in weight_names.file_names(_ENTRIES[hf["model_type"]](config), config.repeats):
        for i, name in enumerate(names):
            values = [flat[p][i] if entry.per_layer else flat[p] for p in entry.paths]
            tensors[name] = entry.write(values)
    path.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


def _open_folder(path: pathlib.Path, dtypes) -> Opened:
    file = path / "config.json"
    config = from_hf_config(read_json(file, "describes no model"), file, dtypes)
    if (path / _ADAPTER).exists():
        raise CheckpointError(
            f"{path / _ADAPTER}: adapters are not read; merge them into the model's weights"
        )
    return Opened(config, None, lambda: _read_folder(path, config))


def _read_folder(path: pathlib.Path, config: LanguageModelConfig) -> dict[str, Any]:
    kind = layout(config)
    stored, source = read_folder(path, lambda name: weight_names.is_buffer(kind, name))
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if weight_names.is_buffer(kind, name):
            _check_buffer(config, kind, name, tensor)
            continue
        ours = weight_names.canonical(kind, name)
        if ours in tensors:
            raise CheckpointError(
                f"{tensor.file}: tensor {ours!r} is there twice, with and without prefix"
            )
        tensors[ours] = tensor
    entries = _ENTRIES[kind](config)
    if config.tie_embeddings:
        merge_tied_head(tensors, weight_names.embedding_name(entries), "lm_head.weight")
    return _params(config, entries, tensors, source, path / "config.json")


def _check_buffer(config, kind: str, name: str, tensor: StoredTensor) -> None:
    """Refuses rotary frequencies that are not those of config.json; float16 rounds them."""
    if kind != "llama":
        return
    plain = rope_frequencies(config.head_dim, config.rope_theta)
    scaled = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    if not tensor.unreadable and tensor.shape == plain.shape:
        values = np.asarray(tensor.read(), np.float64)
        if any(np.allclose(values, known, rtol=1e-2, atol=1e-7) for known in (plain, scaled)):
            return
    raise CheckpointError(
        f"{tensor.file}: tensor {name!r} holds other rotary frequencies than config.json says"
    )


def _open_gguf(path: pathlib.Path, dtypes) -> Opened:
    file = read_gguf(path)
    config = from_gguf(file.metadata, file.tensors, path, dtypes)
    tensors = {name: t for name, t in file.tensors.items() if name != ROPE_FACTORS}
    entries = weight_names.gguf_llama_entries(config)
    read = functools.partial(_params, config, entries, tensors, path, path)
    return Opened(config, file.metadata, read)


def _params(config, entries, tensors, source, file) -> dict[str, Any]:
    def leaves() -> dict[str, jax.ShapeDtypeStruct]:
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        try:
            abstract = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)
        except ValueError as error:
            raise CheckpointError(f"{file} describes no model: {error}") from error
        flat = flatten_dict(nn.unbox(abstract)["params"])
        return {"/".join(path): leaf for path, leaf in flat.items()}

    params = read_params(config, entries, leaves, tensors, str(source))
    return unflatten_dict({tuple(path.split("/")): value for path, value in params.items()})
