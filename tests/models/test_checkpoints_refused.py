"""What a checkpoint says is used, or refused by name: one test per way to say something wrong."""

import dataclasses
import json
import os
import time
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_samples import (
    GGUF,
    GPT2,
    LLAMA,
    MAMBA,
    MAMBA2,
    TOKENS,
    gguf_bytes,
    gguf_parts,
    random_params,
    read_raw,
    retype,
    rewrite,
    rewrite_config,
    write_gguf,
    write_raw,
)

from tilescan.models import LanguageModel
from tilescan.models.checkpoints import load_pretrained, save_pretrained
from tilescan.models.positions import rope_frequencies
from tilescan.models.safetensors_files import INDEX
from tilescan.models.weight_names import CheckpointError

UNTIED = dataclasses.replace(LLAMA, tie_embeddings=False)


def logits(config, params):
    return jax.jit(LanguageModel(config).apply)({"params": params}, TOKENS)[0]


def refuses(path, message):
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(path)


@pytest.fixture
def llama(tmp_path):
    save_pretrained(tmp_path, LLAMA, random_params(LLAMA))
    return tmp_path


# Tied heads


def test_a_tied_file_may_hold_either_of_both_or_the_same_twice(llama):
    expected = load_pretrained(llama)[1]
    both = lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]})
    rewrite(llama, both)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(llama)[1], expected)
    rewrite(llama, lambda t: t.pop("model.embed_tokens.weight"))
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(llama)[1], expected)


@pytest.mark.parametrize("config", [LLAMA, GPT2, MAMBA], ids=["llama", "gpt2", "mamba"])
def test_a_tied_file_with_another_head_is_refused(config, tmp_path):
    save_pretrained(tmp_path, config, random_params(config))
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": np.ones((40, 32), np.float32)}))
    refuses(tmp_path, "model.safetensors: tensor 'lm_head.weight' differs from .* ties them")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": np.ones((4, 32), np.float32)}))
    refuses(tmp_path, "'lm_head.weight' differs")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_an_untied_file_needs_both(name, tmp_path):
    save_pretrained(tmp_path, UNTIED, random_params(UNTIED))
    rewrite(tmp_path, lambda t: t.pop(name))
    refuses(tmp_path, f"1 tensors are missing: {name}")


# Dtypes and buffers


@pytest.mark.parametrize(
    "dtype,size",
    [("I8", 1), ("U8", 1), ("I32", 4), ("I64", 8), ("BOOL", 1), ("C64", 8), ("F8_E4M3", 1)]
    + [("F8_E5M2", 1), ("F8_E8M0", 1)],
)
def test_tensors_that_are_no_plain_floats_are_refused(dtype, size, llama):
    name = "model.layers.0.mlp.up_proj.weight"
    retype(llama / "model.safetensors", name, dtype, values=bytes(64 * 32 * size))
    refuses(llama, rf"model.safetensors: tensor '{name}' has type {dtype}: only F64, F32, F16")


def test_a_head_of_integers_is_named_before_it_is_compared(llama):
    rewrite(llama, lambda t: t.update({"lm_head.weight": np.zeros((40, 32), np.int8)}))
    refuses(llama, "'lm_head.weight' has type I8")


def test_values_beyond_the_range_of_param_dtype_are_refused(llama):
    def change(tensors):
        tensors["model.norm.weight"][3] = 1e5

    rewrite(llama, change)
    load_pretrained(llama, param_dtype="bfloat16")
    with pytest.raises(CheckpointError, match="'model.norm.weight' has values beyond .* float16"):
        load_pretrained(llama, param_dtype="float16")
    with pytest.raises(ValueError, match="param_dtype='int8' is no floating type") as error:
        load_pretrained(llama, param_dtype="int8")
    assert not isinstance(error.value, CheckpointError)


def test_rotary_buffers_must_be_those_of_the_configuration(llama):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    frequencies = rope_frequencies(8).astype(np.float16)
    rewrite(llama, lambda t: t.update({name: frequencies}))
    load_pretrained(llama)
    rewrite(llama, lambda t: t.update({name: frequencies / 4}))
    refuses(llama, f"tensor '{name}' holds other rotary frequencies")
    rewrite(llama, lambda t: t.update({"strange.inv_freq": t.pop(name)}))
    refuses(llama, "1 tensors are not of this architecture: strange.inv_freq")


def test_a_tensor_with_and_without_prefix_is_refused(tmp_path):
    save_pretrained(tmp_path, GPT2, random_params(GPT2))
    rewrite(tmp_path, lambda t: t.update({"ln_f.bias": np.zeros(32, np.float32)}))
    refuses(tmp_path, "'transformer.ln_f.bias' is there twice")


# Folders


def shard(folder):
    """Two shards and their index in place of the file; returns the map."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        safetensors.numpy.save_file({n: tensors[n] for n in some}, folder / file)
    where = {n: file for file, some in parts.items() for n in some}
    write_index(folder, where)
    return where


def write_index(folder, where, **others):
    index = dict(metadata=dict(total_size=1), weight_map=where, **others)
    (folder / INDEX).write_text(json.dumps(index))


def add_to_shard(folder, file, name, tensor):
    tensors = safetensors.numpy.load_file(folder / file)
    safetensors.numpy.save_file(tensors | {name: tensor}, folder / file)


def test_shards_that_agree_with_their_index_are_read(llama):
    expected = load_pretrained(llama)[1]
    shard(llama)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(llama)[1], expected)


def test_stale_copies_and_unlisted_tensors_of_shards_are_refused(llama):
    where = shard(llama)
    name = "model.norm.weight"
    (other,) = {"a.safetensors", "b.safetensors"} - {where[name]}
    add_to_shard(llama, other, name, np.ones(32, np.float32))
    refuses(llama, rf"{other} holds tensor '{name}', but .*index.json assigns it to {where[name]}")
    write_index(llama, {n: file for n, file in where.items() if n != name})
    refuses(llama, rf"safetensors holds tensor '{name}', but .*index.json doesn't list it")


def test_an_index_that_its_shards_contradict_is_refused(llama):
    where = shard(llama)
    write_index(llama, where | {"strange": "a.safetensors"})
    refuses(llama, "index.json assigns tensor 'strange' to a.safetensors, which does not hold it")
    write_index(llama, where, extra=1)
    refuses(llama, "index.json: extra=1 is not known")


@pytest.mark.parametrize(
    "name",
    ["/etc/hostname", "../a.safetensors", "sub/a.safetensors", "sub\\a", "C:a", "..", ".", "", "\0"]
    + ["x" * 300, 3, None, True, ["a.safetensors"], {"a": 1}],
)
def test_shards_that_are_no_files_of_the_folder_are_refused(name, llama):
    where = shard(llama)
    write_index(llama, where | {"model.norm.weight": name})
    refuses(llama, r"index.json has no readable weight_map: tensor 'model.norm.weight' must be in")


@pytest.mark.parametrize("where", [None, [], {}, "a", 3])
def test_a_weight_map_that_is_no_object_is_refused(where, llama):
    shard(llama)
    write_index(llama, where)
    refuses(llama, "index.json has no readable weight_map: it must be an object")


def test_folders_in_place_of_files_are_named(llama):
    where = shard(llama)
    (llama / "folder").mkdir()
    write_index(llama, where | {"model.norm.weight": "folder"})
    refuses(llama, "folder is no file")
    (llama / INDEX).unlink()
    (llama / "model.safetensors").mkdir()
    refuses(llama, "model.safetensors is no file")
    (llama / "config.json").unlink()
    (llama / "config.json").mkdir()
    refuses(llama, "config.json can't be read")


def test_a_file_beside_an_index_that_does_not_name_it_is_refused(llama):
    content = (llama / "model.safetensors").read_bytes()
    where = shard(llama)
    (llama / "model.safetensors").write_bytes(content)
    refuses(llama, "holds model.safetensors beside model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="index.json of another checkpoint"):
        save_pretrained(llama, LLAMA, random_params(LLAMA))
    write_index(llama, dict.fromkeys(where, "model.safetensors"))
    load_pretrained(llama)


def test_adapters_and_other_formats_are_refused(llama):
    (llama / "adapter_config.json").write_text("{}")
    refuses(llama, "adapter_config.json: adapters are not read")
    (llama / "adapter_config.json").unlink()
    file = llama / "model.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file, {"format": "tf"})
    refuses(llama, "__metadata__.format='tf' is not supported")


def test_absent_files_are_both_kinds_of_error(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model.safetensors"):
        load_pretrained(llama)
    refuses(llama, "lacks model.safetensors")


# Bounded time and memory


def damaged(folder):
    """Writes files that claim more than they hold, one after the other."""
    file, config = folder / "model.safetensors", folder / "config.json"
    good, text = file.read_bytes(), config.read_text()
    header, values = read_raw(file)
    name = "model.norm.weight"
    for length in (0, 1, len(good) - 7, 2**31, 2**62, 2**64 - 1):
        write_raw(file, header, values, length)
        yield "model.safetensors"
    hole = {n: dict(e) for n, e in header.items()}
    last = max((n for n in hole if "_" not in n[:2]), key=lambda n: hole[n]["data_offsets"])
    hole[last]["data_offsets"] = [x + 2**40 for x in hole[last]["data_offsets"]]
    write_raw(file, hole, values)
    yield "model.safetensors"
    os.truncate(file, 2**40 + len(good))
    yield "model.safetensors"
    for text_ in (b"[" * 10**6, b'{"a":' + b"[" * 10**6, b'{"a":' * 10**5, b"\xff\xfe", b"{}"):
        write_raw(file, text_, b"")
        yield "model.safetensors"
    twice = json.dumps(header).encode()
    write_raw(file, twice[:-1] + b', "' + name.encode() + b'": {}}', values)
    yield "model.safetensors"
    for shape in ([1] * 1000, [32] + [1] * 999, [2**40, 0], [32, 2**62], [-1], [32.0], []):
        file.write_bytes(good)
        retype(file, name, shape=shape)
        yield "model.safetensors"
    file.write_bytes(good)
    deep = '{"a":' + "[" * 3000 + "]" * 3000 + "}"
    for bad in ("[" * 10**6, deep, '{"a":' * 10**5, '{"model_type"', "\0", "x" * 2**26):
        config.write_text(bad)
        yield "config.json"
    config.write_text('{"hidden_size": ' + "9" * 5000 + "}")
    yield "config.json"
    config.write_text(text.replace('"hidden_size": 32', '"hidden_size": 32, "hidden_size": 64'))
    yield "config.json"
    for key, value in (
        ("num_hidden_layers", 10**8),
        ("num_hidden_layers", 2**16),
        ("hidden_size", 2**62),
        ("hidden_size", 2**24),
        ("vocab_size", 2**24),
        ("intermediate_size", 2**24),
        ("num_attention_heads", 2**16),
        ("head_dim", 2**16),
    ):
        config.write_text(json.dumps(json.loads(text) | {key: value}))
        yield ""
    file.unlink()
    config.write_text(text)
    (folder / INDEX).write_text('{"weight_map":' + "[" * 10**6)
    yield INDEX


def test_damaged_files_end_in_bounded_time_and_memory(llama):
    """Each within seconds and 100 MB: a config of 32 MB is the largest thing that is read."""
    load_pretrained(llama)
    for i, file in enumerate(damaged(llama)):
        tracemalloc.start()
        began = time.monotonic()
        with pytest.raises(CheckpointError) as error:
            load_pretrained(llama)
        took, (_, peak) = time.monotonic() - began, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert str(llama / file) in str(error.value), (i, str(error.value))
        assert len(str(error.value)) < 1000, i
        print(f"{i} {took:.2f} s {peak / 1e6:.0f} MB: {str(error.value)[-150:]}")
        assert took < 10 and peak < 100e6, (i, took, peak)


# config.json


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


# GGUF


def write(path, metadata, tensors, **options):
    path.write_bytes(gguf_bytes(metadata, tensors, **options))
    return path


@pytest.fixture(scope="module")
def parts():
    return gguf_parts(GGUF, random_params(GGUF))


def test_rope_freqs_divide_the_frequencies(tmp_path, parts):
    """What converters of Llama 3.1 write in place of its settings."""
    metadata, tensors = parts
    scaled = dataclasses.replace(
        GGUF, rope_scaling=dict(kind="llama3", factor=8.0, original_max_len=32)
    )
    plain = rope_frequencies(8, GGUF.rope_theta)
    factors = (plain / rope_frequencies(8, GGUF.rope_theta, scaled.rope_scaling)).astype("float32")
    assert factors.min() == 1 and factors.max() > 2
    extra = ("rope_freqs.weight", 0, (4,), factors.tobytes(), None)
    config, params = load_pretrained(write(tmp_path / "m.gguf", metadata, [*tensors, extra]))
    assert config.rope_scaling.factors == tuple(factors.tolist())
    np.testing.assert_allclose(logits(config, params), logits(scaled, params), atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        [("llama.rope.scale_linear", "f32", 4.0)],
        [("llama.rope.scaling.factor", "f32", 4.0)],
        [("llama.rope.scaling.factor", "f32", 4.0), ("llama.rope.scaling.type", "text", "linear")],
        [("llama.rope.scaling.factor", "f32", 4.0), ("llama.rope.scale_linear", "f32", 4.0)],
    ],
)
def test_linear_scaling_is_read_with_and_without_its_type(more, tmp_path, parts):
    metadata, tensors = parts
    config, _ = load_pretrained(write(tmp_path / "m.gguf", metadata + more, tensors))
    assert config == dataclasses.replace(GGUF, rope_scaling=dict(kind="linear", factor=4.0))


@pytest.mark.parametrize("key", ["llama.rope.scale_linear", "llama.rope.scaling.factor"])
def test_a_factor_of_nought_is_none(key, tmp_path, parts):
    metadata, tensors = parts
    more = [(key, "f32", 0.0), ("llama.rope.scaling.type", "text", "none")]
    assert load_pretrained(write(tmp_path / "m.gguf", metadata + more, tensors))[0] == GGUF


ONE = ("list", ("u32", [4, 4]))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"llama.attention.head_count": ONE}, r"llama.attention.head_count=\[4, 4\]: n_heads must"),
        ({"llama.attention.head_count_kv": ONE}, r"head_count_kv=\[4, 4\]: n_kv_heads must be int"),
        ({"llama.feed_forward_length": ONE}, "feed_forward_length=.*mlp_dim must be int"),
        ({"llama.block_count": ("f32", 2.0)}, "block_count=2.0: repeats must be int"),
        ({"llama.block_count": ("text", "2")}, "block_count='2': repeats must be int"),
        ({"llama.block_count": ("bool", True)}, "block_count=True"),
        ({"llama.block_count": ("i32", -2)}, "block_count=-2"),
        ({"llama.block_count": ("u32", 10**8)}, "block_count=100000000"),
        ({"llama.block_count": ("u32", 65000)}, "tensors are too few for the 65000 layers"),
        ({"llama.embedding_length": ("u64", 2**62)}, "embedding_length=4611686018427387904"),
        ({"llama.attention.layer_norm_rms_epsilon": ("f32", np.nan)}, "epsilon=nan: norm_eps must"),
        ({"llama.rope.freq_base": ("text", "x")}, "freq_base='x': rope_theta must be a number"),
        ({"llama.rope.dimension_count": ("u32", 4)}, "dimension_count=4: it must be the length"),
        ({"llama.vocab_size": ("u32", 41)}, "vocab_size=41: it must be the number of tokenizer"),
        ({"tokenizer.ggml.tokens": ("u32", 40)}, "tokens=40: it must be a list"),
        (
            {"llama.rope.scaling.type": ("text", "yarn")},
            "scaling.type 'yarn' is not supported",
        ),
        (
            {"llama.rope.scaling.type": ("text", "none"), "llama.rope.scale_linear": ("f32", 2.0)},
            "a factor of 2 contradicts it",
        ),
        (
            {"llama.rope.scaling.factor": ("f32", 4.0), "llama.rope.scale_linear": ("f32", 2.0)},
            "scale_linear=2.0: llama.rope.scaling.factor=4 says something else",
        ),
        ({"llama.rope.scaling.factor": ("f32", -4.0)}, "factor=-4.0: .* must be a number from 0"),
        ({"llama.expert_count": ("u32", 8)}, "llama.expert_count=8 is not supported"),
        ({"llama.attention.scale": ("f32", 0.5)}, "llama.attention.scale=0.5 is not supported"),
        ({"llama.strange": ("u32", 8)}, "llama.strange=8 is not known"),
        ({"general.type": ("text", "adapter")}, "general.type='adapter' is not supported"),
        ({"split.count": ("u32", 2)}, "split.count=2 is not supported"),
        ({"general.alignment": ("u32", 33)}, "general.alignment=33 must be a power of two"),
    ],
)
def test_metadata_are_checked_by_type_and_by_name(change, message, tmp_path, parts):
    metadata, tensors = parts
    metadata = [(key, *change.get(key, (kind, value))) for key, kind, value in metadata]
    known = {key for key, _, _ in metadata}
    metadata += [(key, *value) for key, value in change.items() if key not in known]
    refuses(write(tmp_path / "m.gguf", metadata, tensors), f"m.gguf.*{message}")


@pytest.mark.parametrize("kind", ["I8", "I32", "F64", "IQ1_M", "TQ1_0", None])
def test_gguf_types_are_read_or_named(kind, tmp_path, parts):
    metadata, tensors = parts
    number = 99 if kind is None else gguf.GGMLQuantizationType[kind].value
    block, size = (1, 4) if kind is None else gguf.GGML_QUANT_SIZES[kind_of(number)]
    width = -(-32 // block) * block
    name = "blk.1.ffn_up.weight"
    values = bytes(64 * width // block * size)
    tensors = [t if t[0] != name else (name, number, (64, width), values, None) for t in tensors]
    refuses(write(tmp_path / "m.gguf", metadata, tensors), f"m.gguf: tensor '{name}' has ")


def kind_of(number):
    return gguf.GGMLQuantizationType(number)


@pytest.mark.parametrize(
    "tensor,message",
    [
        (("rope_freqs.weight", 0, (3,), bytes(12), None), r"has shape \(3,\), but .* \(4,\)"),
        (("rope_freqs.weight", 0, (4,), bytes(16), None), "must have positive, finite values"),
        (("rope_freqs.weight", 26, (4,), bytes(16), None), "has type I32"),
        (("blk.0.rope_freqs.weight", 0, (4,), bytes(16), None), "not of this architecture: blk.0"),
        (("a", 0, (4,), bytes(16), 0), "tensor 'a' of 16 bytes can't be at 0"),
        (("a", 0, (4,), bytes(16), 2**62), "can't be at"),
        (("a", 0, (2**62, 2**62), bytes(16), None), "can't be at"),
        (("a", 0, (1,) * 1000, bytes(4), None), "tensor 'a' has 1000 dimensions"),
        (("a", 2, (31,), bytes(18), None), "rows of tensor 'a' are no whole blocks of Q4_0"),
        (
            ("output_norm.weight", 0, (32,), bytes(128), None),
            "'output_norm.weight' stands there",
        ),
    ],
)
def test_gguf_tensors_are_checked_before_they_are_read(tensor, message, tmp_path, parts):
    metadata, tensors = parts
    refuses(write(tmp_path / "m.gguf", metadata, [*tensors, tensor]), f"m.gguf.*{message}")


def test_gguf_headers_that_lie_end_in_bounded_time_and_memory(tmp_path, parts):
    metadata, tensors = parts
    good = gguf_bytes(metadata, tensors)
    tokens = good.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    huge = (2**62).to_bytes(8, "little")
    bad = [
        gguf_bytes(metadata, tensors, counts=(2**60, 3)),
        gguf_bytes(metadata, tensors, counts=(3, 2**60)),
        gguf_bytes(metadata, tensors, version=1),
        gguf_bytes(metadata, tensors, version=3 << 24),
        gguf_bytes([*metadata, metadata[1]], tensors),
        good[:tokens] + huge + good[tokens + 8 :],
        good[: tokens - 4] + b"\0\0\0\0" + huge + good[tokens + 8 :],
        good[:24] + huge + good[32:],
        b"",
    ]
    bad += [good[:size] for size in range(0, len(good), len(good) // 40)]
    for i, content in enumerate(bad):
        (tmp_path / "m.gguf").write_bytes(content)
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=r"m.gguf \(\d+ bytes\) is truncated or no GGUF"):
            load_pretrained(tmp_path / "m.gguf")
        assert tracemalloc.get_traced_memory()[1] < 20e6, i
        tracemalloc.stop()


def test_files_of_the_published_writer_are_read_the_same(tmp_path, parts):
    params = random_params(GGUF)
    write_gguf(tmp_path / "a.gguf", GGUF, params, change=lambda w: w.add_rope_dimension_count(8))
    write(tmp_path / "b.gguf", *parts)
    a, b = (load_pretrained(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert a[0] == b[0] == GGUF
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])
