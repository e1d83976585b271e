"""Logits of published layouts against `transformers`, on random weights.

torch and transformers come from this interpreter, or from the one that TILESCAN_TORCH_PYTHON names.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.checkpoints import load_pretrained, save_pretrained

WORKER = pathlib.Path(__file__).with_name("transformers_worker.py")


def torch_python() -> str:
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return sys.executable
    named = os.environ.get("TILESCAN_TORCH_PYTHON")
    if named is None:
        pytest.skip(
            "torch and transformers are not installed (extra `parity`), and TILESCAN_TORCH_PYTHON "
            "names no interpreter that has them"
        )
    return named


GPT2 = dict(n_embd=48, n_layer=3, n_head=4, n_positions=64, vocab_size=101)
LLAMA = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    vocab_size=101,
    tie_word_embeddings=False,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
MAMBA = dict(hidden_size=48, state_size=6, num_hidden_layers=3, vocab_size=101)
MAMBA2 = MAMBA | dict(head_dim=8, num_heads=12, n_groups=2, chunk_size=16)
CASES = {
    "mamba": ("mamba", MAMBA, "5GB"),
    "mamba-untied-biases-rank": (
        "mamba",
        MAMBA
        | dict(
            tie_word_embeddings=False,
            use_bias=True,
            use_conv_bias=False,
            conv_kernel=3,
            expand=3,
            time_step_rank=5,
            layer_norm_epsilon=1e-3,
        ),
        "5GB",
    ),
    "mamba2": ("mamba2", MAMBA2, "5GB"),
    "mamba2-sharded": ("mamba2", MAMBA2, "60KB"),
    "mamba2-tied-biases-limit": (
        "mamba2",
        MAMBA2
        | dict(
            tie_word_embeddings=True,
            use_bias=True,
            use_conv_bias=False,
            n_groups=1,
            head_dim=48,
            num_heads=2,
            time_step_limit=(0.02, 0.7),
            layer_norm_epsilon=1e-3,
        ),
        "5GB",
    ),
    "gpt2": ("gpt2", GPT2, "5GB"),
    "gpt2-gelu-wide": ("gpt2", GPT2 | dict(activation_function="gelu", n_inner=100), "5GB"),
    "llama-gqa": ("llama", LLAMA, "5GB"),
    "llama-sharded": ("llama", LLAMA, "60KB"),
    "llama-tied-theta-mqa": (
        "llama",
        LLAMA
        | dict(
            tie_word_embeddings=True,
            num_key_value_heads=1,
            rope_parameters=dict(rope_type="default", rope_theta=50.0),
            rms_norm_eps=1e-3,
        ),
        "5GB",
    ),
    "llama-biases-head-dim": (
        "llama",
        LLAMA | dict(attention_bias=True, mlp_bias=True, head_dim=16, num_key_value_heads=6),
        "5GB",
    ),
    "llama3-rope": ("llama", LLAMA | dict(rope_parameters=LLAMA3_ROPE), "5GB"),
    "mamba2-defaults": (
        "mamba2",
        dict(hidden_size=256, num_heads=8, num_hidden_layers=2, vocab_size=101),
        "5GB",
        "float32",
        ("head_dim", "n_groups", "state_size", "expand", "conv_kernel", "use_bias", "use_conv_bias")
        + ("layer_norm_epsilon", "hidden_act", "time_step_limit", "tie_word_embeddings"),
    ),
    "gpt2-float16": ("gpt2", GPT2, "5GB", "float16"),
    "llama-float16": ("llama", LLAMA, "5GB", "float16"),
    "mamba-float16": ("mamba", MAMBA, "5GB", "float16"),
    "mamba2-float16": ("mamba2", MAMBA2, "5GB", "float16"),
}


SMALL = dict(vocab_size=61, d_model=32, repeats=2)
EXPORTED = {
    "exported-llama": LanguageModelConfig(**SMALL, n_heads=4, n_kv_heads=2, mlp_dim=48),
    "exported-mamba": LanguageModelConfig(**SMALL, pattern=("mamba",), position="none"),
    "exported-mamba2": LanguageModelConfig(
        **SMALL, pattern=("mamba2",), position="none", mixers=dict(mamba2=dict(head_dim=16))
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that transformers has to say, from one process (its import takes seconds)."""
    python = torch_python()
    root = tmp_path_factory.mktemp("parity")
    (root / "cases.json").write_text(json.dumps(CASES))
    tokens = np.arange(18).reshape(2, 9) * 3
    for name, config in EXPORTED.items():
        params = nn.unbox(LanguageModel(config).init(jax.random.key(0), tokens)["params"])
        save_pretrained(root / name, config, params)
        np.save(root / name / "tokens.npy", tokens)
    command = [python, str(WORKER), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, folder):
    expected = np.load(folder / case / "expected.npz")
    config, params = load_pretrained(folder / case)
    logits, _ = LanguageModel(config).apply({"params": params}, jnp.asarray(expected["tokens"]))
    error = np.abs(np.asarray(logits) - expected["logits"]).max()
    print(f"{case}: largest error {error:.1e} of logits up to {np.abs(logits).max():.1f}")
    assert error < 1e-4
    assert np.abs(expected["logits"]).max() > 1  # the weights say something


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("float16")])
def test_float16_files_agree_to_the_error_of_float16(case, folder):
    """`transformers` computes them in float16; here `dtype` says what does."""
    expected = np.load(folder / case / "expected.npz")
    error_of_float16 = np.abs(expected["of_dtype"] - expected["logits"]).max()
    assert 1e-3 < error_of_float16 < 1e-2
    for dtype in ("float32", "float16"):
        config, params = load_pretrained(folder / case, dtype=dtype, param_dtype=dtype)
        logits, _ = LanguageModel(config).apply({"params": params}, jnp.asarray(expected["tokens"]))
        error = np.abs(np.asarray(logits, np.float32) - expected["of_dtype"]).max()
        print(f"{case}, {dtype}: {error:.1e}, of float16 itself {error_of_float16:.1e}")
        assert error < 3 * error_of_float16


def test_shards_are_read_through_their_index(folder):
    assert not (folder / "llama-sharded" / "model.safetensors").exists()
    assert len(list((folder / "llama-sharded").glob("model-*.safetensors"))) > 1
    (folder / "llama-gqa" / "model.safetensors").stat()


@pytest.mark.parametrize("case", ["llama-gqa", "mamba", "mamba-untied-biases-rank", "mamba2"])
def test_steps_give_the_same_logits(case, folder):
    """A prompt, then token by token."""
    expected = np.load(folder / case / "expected.npz")
    config, params = load_pretrained(folder / case)
    model, tokens = LanguageModel(config), jnp.asarray(expected["tokens"])
    step, state = jax.jit(model.apply), model.init_state(2, tokens.shape[1])
    for i, j in [(0, 20)] + [(i, i + 1) for i in range(20, 37)]:
        logits, state = step({"params": params}, tokens[:, i:j], state=state)
        np.testing.assert_allclose(logits, expected["logits"][:, i:j], atol=1e-4)


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_are_read_by_transformers(name, folder):
    config, params = load_pretrained(folder / name)
    tokens = jnp.asarray(np.load(folder / name / "tokens.npy"))
    ours, _ = LanguageModel(config).apply({"params": params}, tokens)
    np.testing.assert_allclose(ours, np.load(folder / name / "theirs.npy"), atol=1e-4)
