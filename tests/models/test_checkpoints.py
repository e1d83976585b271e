"""Reading and writing published layouts; what is wrong with a file is said by name."""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_samples import (
    CONFIGS,
    GGUF,
    GPT2,
    LLAMA,
    MAMBA,
    MAMBA2,
    TOKENS,
    random_params,
    rewrite,
    write_gguf,
)

from tilescan.models import LanguageModel
from tilescan.models.checkpoints import load_pretrained, save_pretrained
from tilescan.models.weight_names import CheckpointError


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_loaded(name, tmp_path):
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    save_pretrained(tmp_path, config, params)
    loaded_config, loaded = load_pretrained(tmp_path)
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_lower_precision_is_kept_or_asked_for(tmp_path):
    save_pretrained(tmp_path, LLAMA, random_params(LLAMA))
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    half = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(half, tmp_path / "model.safetensors")
    config, params = load_pretrained(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
    assert config.dtype == jnp.bfloat16
    leaf = params["backbone"]["embed"]["embedding"]
    assert leaf.dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaf, half["model.embed_tokens.weight"])


def test_decays_and_steps_are_read_in_float32(tmp_path):
    save_pretrained(tmp_path, MAMBA2, random_params(MAMBA2))
    _, params = load_pretrained(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
    mixer = params["backbone"]["layers"]["mamba2_0"]["mixer"]
    assert all(mixer[name].dtype == jnp.float32 for name in ("A_log", "dt_bias", "D"))
    assert mixer["in_proj"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "config,changes,message",
    [
        (MAMBA, dict(hidden_act="relu"), "hidden_act='relu' is not supported, only 'silu'"),
        (MAMBA2, dict(num_heads=3), "num_heads=3 times head_dim=8 must be expand .* = 64"),
        (MAMBA2, dict(state_size="x"), "describes no model: .*mamba2.state_dim must be int"),
    ],
)
def test_unsupported_recurrent_configurations_are_refused(config, changes, message, tmp_path):
    save_pretrained(tmp_path, config, random_params(config))
    hf = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | changes))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.slow
def test_fields_of_absent_blocks_and_ways_to_run_stop_no_export(tmp_path):
    """A recurrent model as training configures it: attention's fields have some value."""
    config = dataclasses.replace(
        MAMBA2, position="rope", max_len=77, mixers=dict(mamba2=dict(head_dim=8, chunk=32))
    )
    params = random_params(config)
    save_pretrained(tmp_path, config, params)
    loaded_config, loaded = load_pretrained(tmp_path)
    ours, _ = LanguageModel(config).apply({"params": params}, TOKENS)
    theirs, _ = LanguageModel(loaded_config).apply({"params": loaded}, TOKENS)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    with pytest.raises(CheckpointError, match="mamba2 layout has no place for position='learned'"):
        save_pretrained(tmp_path, dataclasses.replace(config, position="learned"), {})


def test_names_without_prefix_and_buffers_are_understood(tmp_path):
    """As in GPT-2's own files."""
    params = random_params(GPT2)
    save_pretrained(tmp_path, GPT2, params)

    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)

    rewrite(tmp_path, bare)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path)[1], params)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"),
            r"1 tensors are missing: model.layers.1.self_attn.k_proj.weight",
        ),
        (
            lambda t: t.update(strange=np.zeros(3, np.float32)),
            "1 tensors are not of this architecture: strange",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(31, np.float32)}),
            r"'model.norm.weight' has shape \(31,\), but the configuration asks for \(32,\)",
        ),
        (
            lambda t: t.update(
                {"model.layers.0.mlp.up_proj.weight": np.zeros((32, 64), np.float32)}
            ),
            r"up_proj.weight' has shape \(32, 64\), but the configuration asks for \(64, 32\)",
        ),
    ],
    ids=["missing", "extra", "mis-shaped", "transposed"],
)
def test_wrong_tensors_are_named(change, message, tmp_path):
    save_pretrained(tmp_path, LLAMA, random_params(LLAMA))
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path)


def test_truncated_and_absent_files_are_named(tmp_path):
    save_pretrained(tmp_path, LLAMA, random_params(LLAMA))
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for size in (4, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=rf"model.safetensors \({size} bytes\) is trunc"):
            load_pretrained(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="lacks model-1.safetensors, model-2.safetensors"):
        load_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_pretrained(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_pretrained(tmp_path / "folder")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="neither a folder with config.json nor a .gguf"):
        load_pretrained(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            dict(model_type="bert"),
            "model_type 'bert' is not supported; gpt2, llama, mamba, mamba2 are",
        ),
        (dict(hidden_act="relu"), "hidden_act='relu' is not supported, only 'silu'"),
        (
            dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)),
            "rope type 'yarn' is not supported; linear and llama3 are",
        ),
    ],
)
def test_unsupported_configurations_are_refused(changes, message, tmp_path):
    save_pretrained(tmp_path, LLAMA, random_params(LLAMA))
    hf = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | changes))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda hf: hf.pop("hidden_size"), "config.json has no 'hidden_size'"),
        (lambda hf: hf.update(rope_parameters={"rope_type": "linear"}), "has no 'factor'"),
        (lambda hf: hf.update(hidden_size="wide"), "config.json describes no model: "),
        (
            lambda hf: hf.update(num_attention_heads=3),
            "describes no model: .*must divide n_heads=3",
        ),
    ],
)
def test_incomplete_configurations_are_named(change, message, tmp_path):
    save_pretrained(tmp_path, LLAMA, random_params(LLAMA))
    hf = json.loads((tmp_path / "config.json").read_text())
    change(hf)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_json_is_named(text, tmp_path):
    save_pretrained(tmp_path, LLAMA, random_params(LLAMA))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match="index.json has no readable weight_map"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json describes no model"):
        load_pretrained(tmp_path)


def test_older_places_of_rope_settings_are_read(tmp_path):
    """transformers 4 wrote rope_theta and rope_scaling side by side."""
    save_pretrained(tmp_path, LLAMA, random_params(LLAMA))
    hf = json.loads((tmp_path / "config.json").read_text())
    del hf["rope_parameters"]
    hf |= dict(rope_theta=123.0, rope_scaling=dict(type="linear", factor=2.0))
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config, _ = load_pretrained(tmp_path)
    assert config.rope_theta == 123.0
    assert config.rope_scaling.kind == "linear" and config.rope_scaling.factor == 2.0


def test_only_models_that_fit_a_layout_are_exported(tmp_path):
    alibi = dataclasses.replace(LLAMA, position="alibi")
    with pytest.raises(CheckpointError, match="the llama layout has no place for position='alibi'"):
        save_pretrained(tmp_path, alibi, {})
    faded = dataclasses.replace(MAMBA2, mixers=dict(mamba2=dict(head_dim=8, b_scale=0.75)))
    with pytest.raises(CheckpointError, match="mamba2 layout has no place for mixers="):
        save_pretrained(tmp_path, faded, {})
    windowed = dataclasses.replace(LLAMA, pattern=("local_attention:4", "mlp"))
    with pytest.raises(CheckpointError, match="no place for pattern="):
        save_pretrained(tmp_path, windowed, {})


# GGUF


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_files_are_read(tied, tmp_path):
    config = dataclasses.replace(GGUF, tie_embeddings=tied)
    params = random_params(config)
    write_gguf(tmp_path / "m.gguf", config, params)
    loaded_config, loaded = load_pretrained(tmp_path / "m.gguf")
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_quantized_gguf_tensors_come_close(tmp_path):
    params = random_params(GGUF)
    write_gguf(tmp_path / "m.gguf", GGUF, params, quantize=True)
    _, loaded = load_pretrained(tmp_path / "m.gguf")
    largest = jax.tree.map(lambda a, b: np.abs(a - b).max(), loaded, params)
    # Q8_0 rounds to 1/254 of the largest of 32 numbers.
    assert 0 < max(jax.tree.leaves(largest)) < 1.5 / 127


def test_truncated_and_foreign_gguf_files_are_refused(tmp_path):
    file = tmp_path / "m.gguf"
    write_gguf(file, GGUF, random_params(GGUF))
    content = file.read_bytes()
    for size in (10, 500, len(content) // 2, len(content) - 64):
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=rf"m.gguf \({size} bytes\) is truncated or no"):
            load_pretrained(file)
    file.write_bytes(b"no gguf" * 100)
    with pytest.raises(CheckpointError, match="is truncated or no GGUF file"):
        load_pretrained(file)
    writer = gguf.GGUFWriter(file, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'mamba' is not supported; llama is"):
        load_pretrained(file)
