"""config.json: what one says is used, or refused by name."""

import dataclasses

import pytest
from checkpoint_samples import (
    GPT2,
    LLAMA,
    MAMBA,
    MAMBA2,
    random_params,
    rewrite_config,
)

from tilescan.models.checkpoints import load_pretrained, save_pretrained
from tilescan.models.weight_names import CheckpointError


def refuses(path, message):
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(path)


@pytest.fixture
def llama(tmp_path):
    save_pretrained(tmp_path, LLAMA, random_params(LLAMA))
    return tmp_path


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(hidden_size=32.0), r"hidden_size=32.0: d_model must be int, from 1 to"),
        (dict(rms_norm_eps=None), "rms_norm_eps=None: norm_eps must be a number from 0 to 1"),
        (dict(rms_norm_eps="1e-5"), "rms_norm_eps='1e-5': norm_eps must be a number"),
        (
            dict(tie_word_embeddings="false"),
            "tie_word_embeddings='false': .* true or false",
        ),
        (dict(num_key_value_heads=0), "num_key_value_heads=0: n_kv_heads must be int"),
        (dict(head_dim=True), "head_dim=True: head_dim must be int"),
        (dict(strange=1), "config.json: strange=1 is not known, and may change"),
        (dict(sliding_window=4), "sliding_window=4 is not supported, only None"),
        (dict(quantization_config=dict(bits=4)), "quantization_config=.* is not supported"),
        (dict(auto_map={"AutoModel": "x.y"}), "auto_map=.* is not supported"),
        (dict(model_type=["llama"]), r"model_type \['llama'\] is not supported"),
        (dict(rope_theta=5.0), "rope_theta=5.0: rope_parameters.rope_theta=10000.0 says something"),
        (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_scaling=.* says something else"),
        (dict(rope_parameters=5), "rope_parameters=5: it must be an object"),
        (dict(rope_parameters=dict(factor=2.0)), "rope_parameters.factor=2.0 is not known"),
        (
            dict(rope_parameters=dict(rope_type="linear", type="llama3", factor=2.0)),
            "rope_type='linear': type='llama3' says something else",
        ),
        (
            dict(rope_parameters=dict(rope_type="linear", factor="2")),
            "rope_parameters.factor='2': rope_scaling.factor must be a number",
        ),
        (
            dict(
                rope_parameters=dict(
                    rope_type="llama3", factor=8, low_freq_factor=4, high_freq_factor=4
                )
            ),
            "describes no model: rope_scaling.high_freq_factor=4.0 must be .* above",
        ),
    ],
)
def test_settings_are_checked_by_type_and_by_name(changes, message, llama):
    rewrite_config(llama, lambda hf: hf.update(changes))
    refuses(llama, message)


@pytest.mark.parametrize(
    "config,changes,message",
    [
        (
            MAMBA2,
            dict(time_step_limit=[1.0, 0.5]),
            "time_step_limit=.*mamba2.dt_limit must be two",
        ),
        (MAMBA2, dict(time_step_limit=["0", 1]), "time_step_limit"),
        (MAMBA2, dict(n_groups=3), "describes no model: mamba2: n_groups=3 must divide"),
        (MAMBA2, dict(rms_norm=False), "rms_norm=False is not supported, only True"),
        (MAMBA, dict(time_step_rank=None), "time_step_rank=None: mamba.dt_rank must be int"),
        (MAMBA, dict(d_model=64), "d_model=64: it must be hidden_size = 32"),
        (MAMBA, dict(intermediate_size=65), "intermediate_size=65: it must be expand"),
        (GPT2, dict(hidden_size=64), "n_embd=32: hidden_size=64 says something else"),
        (GPT2, dict(n_inner=0), "n_inner=0: mlp_dim must be int"),
        (GPT2, dict(add_cross_attention=True), "add_cross_attention=True is not supported"),
        (GPT2, dict(activation_function=["gelu"]), "activation_function .* is not supported"),
    ],
)
def test_settings_of_other_layouts_are_checked(config, changes, message, tmp_path):
    save_pretrained(tmp_path, config, random_params(config))
    rewrite_config(tmp_path, lambda hf: hf.update(changes))
    refuses(tmp_path, message)


def test_absent_keys_of_mamba2_have_the_defaults_of_transformers(tmp_path):
    options = dict(head_dim=64, n_groups=8, state_dim=128)
    config = dataclasses.replace(
        MAMBA2, d_model=256, tie_embeddings=False, mixers=dict(mamba2=options)
    )
    save_pretrained(tmp_path, config, random_params(config))
    expected = load_pretrained(tmp_path)[0]
    optional = ("head_dim", "n_groups", "state_size", "expand", "conv_kernel", "use_conv_bias")
    optional += ("use_bias", "tie_word_embeddings", "layer_norm_epsilon", "hidden_act")
    rewrite_config(tmp_path, lambda hf: [hf.pop(key) for key in optional])
    assert load_pretrained(tmp_path)[0] == expected
    rewrite_config(tmp_path, lambda hf: hf.pop("num_heads"))
    refuses(tmp_path, "num_heads=128 times head_dim=64 must be expand .* = 512")
