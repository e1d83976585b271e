"""Folders of safetensors: what they hold is used, or refused by name, in bounded time."""

import dataclasses
import json
import os
import time
import tracemalloc

import jax
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_samples import (
    GPT2,
    LLAMA,
    MAMBA,
    random_params,
    read_raw,
    retype,
    rewrite,
    write_raw,
)

from tilescan.models.checkpoints import load_pretrained, save_pretrained
from tilescan.models.positions import rope_frequencies
from tilescan.models.safetensors_files import INDEX
from tilescan.models.weight_names import CheckpointError

UNTIED = dataclasses.replace(LLAMA, tie_embeddings=False)


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
    with pytest.raises(ValueError, match="param_dtype='int8' is not a floating type") as error:
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
    refuses(llama, "folder is not a file")
    (llama / INDEX).unlink()
    (llama / "model.safetensors").mkdir()
    refuses(llama, "model.safetensors is not a file")
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


@pytest.mark.slow
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
