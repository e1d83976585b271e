"""Mutations of valid checkpoints, systematically: each is refused, naming the file, or changes
nothing in the logits."""

import dataclasses
import functools
import itertools
import json
import math
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_samples import (
    CONFIGS,
    GGUF,
    TOKENS,
    gguf_bytes,
    gguf_parts,
    random_params,
    read_raw,
    retype,
    write_raw,
)

from tilescan.models import LanguageModel
from tilescan.models.checkpoints import load_pretrained, save_pretrained
from tilescan.models.harmless_keys import HARMLESS
from tilescan.models.safetensors_files import INDEX
from tilescan.models.weight_names import CheckpointError

FAMILIES = {
    "gpt2": "gpt2-untied",
    "llama": "llama-untied-bias-scaled",
    "mamba": "mamba-untied-bias-rank",
    "mamba2": "mamba2-untied-bias-limit",
}
# Wrong wherever one number of a model stands.
BAD = [
    None, "text", "32", True, -1, 0.5, 32.0, math.nan, math.inf, -math.inf, 2**62, -(2**62), 1e300,
    10**400, [], [1], {}, {"a": 1},
]  # fmt: skip
# Numbers of many right values: another one is another model, not a wrong file.
REALS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor")
REALS += ("layer_norm_epsilon", "rms_norm_eps")
BAD_REAL = [v for v in BAD if v not in (0.5, 32.0, 2**62)]


class Checkpoint:
    """A valid checkpoint, and what becomes of a changed one."""

    def __init__(self, path, config=None, params=None):
        self.path = path
        if config is not None:
            save_pretrained(path, config, params)
        self.config, self.params = load_pretrained(path)

    @functools.cached_property
    def logits(self):
        return self.compute(self.config, self.params)

    def compute(self, config, params):
        return jax.jit(LanguageModel(config).apply)({"params": params}, TOKENS)[0]

    def ends_well(self, path, what):
        """Returns whether the changed checkpoint was refused."""
        try:
            config, params = load_pretrained(path)
        except CheckpointError as error:
            assert str(path) in str(error) and len(str(error)) < 1000, (what, str(error))
            return True
        same = jax.tree.map(np.array_equal, params, self.params)
        if config != self.config or not all(jax.tree.leaves(same)):
            np.testing.assert_array_equal(self.compute(config, params), self.logits, str(what))
        return False


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=() if kind in ("llama", "mamba2") else pytest.mark.slow)
        for kind in FAMILIES
    ],
)
def family(request, tmp_path_factory):
    config = CONFIGS[FAMILIES[request.param]]
    path = tmp_path_factory.mktemp(request.param)
    return request.param, Checkpoint(path, config, random_params(config))


def sparsely(quick):
    """Takes every so-manieth mutation, some of each kind; all of them in the slow suite."""
    return pytest.mark.parametrize("every", [quick, pytest.param(1, marks=pytest.mark.slow)])


def mutated_configs(kind, hf):
    """(what, config.json) with one wrong value, key by key, and with keys that nobody knows."""
    for key, value in hf.items():
        if key in HARMLESS[kind]:
            continue
        for inner in value if isinstance(value, dict) else ():
            bad = BAD_REAL if inner in REALS else BAD
            yield from (
                ((key, inner, v), hf | {key: value | {inner: v}}) for v in bad if v != value[inner]
            )
        if isinstance(value, dict):
            yield from (((key, v), hf | {key: v}) for v in (1, "text", True, [1], {"a": 1}))
            continue
        bad = BAD_REAL if key in REALS else BAD
        yield from (((key, v), hf | {key: v}) for v in bad)
    for key in ("strange", "sliding_window", "quantization_config", "num_experts", "auto_map", ""):
        yield from (((key, v), hf | {key: v}) for v in (1, "text", {"a": 1}))


@sparsely(5)
def test_wrong_values_of_config_json(family, every):
    kind, checkpoint = family
    file = checkpoint.path / "config.json"
    good = file.read_text()
    refused = total = 0
    for what, hf in itertools.islice(mutated_configs(kind, json.loads(good)), None, None, every):
        file.write_text(json.dumps(hf))
        refused += checkpoint.ends_well(checkpoint.path, what)
        total += 1
    file.write_text(good)
    # null for what has a default, and bounds of the text's length, change nothing.
    print(f"{kind}: {refused} of {total} refused")
    assert total > 150 // every and refused >= total - 10


WRONG_TENSORS = {
    "int8": ("I8", 1, None),
    "uint8": ("U8", 1, None),
    "int32": ("I32", 4, None),
    "bool": ("BOOL", 1, None),
    "complex": ("C64", 8, None),
    "float8": ("F8_E4M3", 1, None),
    "another axis": ("F32", 4, lambda s: [*s, 1]),
    "many axes": ("F32", 4, lambda s: [1] * 1000 + s),
    "a row more": ("F32", 4, lambda s: [s[0] + 1, *s[1:]]),
    "transposed": ("F32", 4, lambda s: s[::-1] if s[::-1] != s else [1, *s]),
    "empty": ("F32", 4, lambda s: [0, *s[1:]]),
    "flat": ("F32", 4, lambda s: [math.prod(s)] if len(s) > 1 else [1, *s]),
}


def wrong_tensor(file, name, how):
    dtype, size, reshape = WRONG_TENSORS[how]
    shape = read_raw(file)[0][name]["shape"]
    shape = shape if reshape is None else reshape(shape)
    retype(file, name, dtype, shape, bytes(size * math.prod(shape)))


def names_of(file):
    return [name for name in read_raw(file)[0] if name != "__metadata__"]


@sparsely(4)
def test_wrong_tensors(family, every):
    """All dtypes and shapes, each on another tensor; and every tensor lost or renamed."""
    _, checkpoint = family
    file = checkpoint.path / "model.safetensors"
    good = file.read_bytes()
    names = names_of(file)
    for i, how in enumerate(WRONG_TENSORS):
        wrong_tensor(file, names[i % len(names)], how)
        assert checkpoint.ends_well(checkpoint.path, how)
        file.write_bytes(good)
    tensors = safetensors.numpy.load_file(file)
    changes = []
    for name in names:
        without = {n: t for n, t in tensors.items() if n != name}
        changes += [without, without | {name + "s": tensors[name]}, tensors | {name + "_": t0}]
    for changed in changes[::every]:
        safetensors.numpy.save_file(changed, file)
        assert checkpoint.ends_well(checkpoint.path, set(changed) ^ set(names))
    file.write_bytes(good)


t0 = np.zeros(3, np.float32)


@pytest.mark.slow
def test_wrong_tensors_everywhere(family):
    _, checkpoint = family
    file = checkpoint.path / "model.safetensors"
    good = file.read_bytes()
    for name in names_of(file):
        for how in WRONG_TENSORS:
            wrong_tensor(file, name, how)
            assert checkpoint.ends_well(checkpoint.path, (name, how))
            file.write_bytes(good)


@sparsely(3)
def test_damaged_headers(family, every):
    """Bytes of the header flipped, and the file truncated."""
    _, checkpoint = family
    file = checkpoint.path / "model.safetensors"
    good = file.read_bytes()
    header, values = read_raw(file)
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    for at in rng.choice(len(text), 150 // every, replace=False):
        flipped = bytearray(text)
        flipped[at] ^= int(rng.integers(1, 128))
        write_raw(file, bytes(flipped), values)
        checkpoint.ends_well(checkpoint.path, at)
    for size in rng.choice(len(good) - 1, 40 // every, replace=False):
        file.write_bytes(good[:size])
        assert checkpoint.ends_well(checkpoint.path, size)
    file.write_bytes(good)


def test_wrong_indexes(family, tmp_path):
    kind, checkpoint = family
    if kind != "llama":
        pytest.skip("an index is the same in all layouts")
    shutil.copytree(checkpoint.path, tmp_path, dirs_exist_ok=True)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = list(tensors)
    where = {n: f"{i % 2}.safetensors" for i, n in enumerate(names)}
    for shard in ("0.safetensors", "1.safetensors"):
        some = {n: t for n, t in tensors.items() if where[n] == shard}
        safetensors.numpy.save_file(some, tmp_path / shard)
    other = {"0.safetensors": "1.safetensors", "1.safetensors": "0.safetensors"}
    indexes = {"good": {"weight_map": where}, "metadata": {"metadata": 1, "weight_map": where}}
    values = [None, 1, True, [], {}, "", ".", "..", "/", "../0.safetensors", "0.safetensors/", "2"]
    for i, name in enumerate(names):
        indexes[f"{name} moved"] = {"weight_map": where | {name: other[where[name]]}}
        indexes[f"{name} lost"] = {"weight_map": {n: s for n, s in where.items() if n != name}}
        bad = values[i % len(values)]
        indexes[f"{name} in {bad!r}"] = {"weight_map": where | {name: bad}}
    for bad in (None, 1, True, "text", [], {}, [where]):
        indexes[f"weight_map {bad!r}"] = {"weight_map": bad}
    indexes |= {"strange": {"weight_map": where, "strange": 1}, "empty": {}}
    for what, index in indexes.items():
        (tmp_path / INDEX).write_text(json.dumps(index))
        assert checkpoint.ends_well(tmp_path, what) == (what not in ("good", "metadata"))


# GGUF


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory):
    config = dataclasses.replace(GGUF, tie_embeddings=False)
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    parts = gguf_parts(config, random_params(config))
    path.write_bytes(gguf_bytes(*parts))
    return Checkpoint(path), *parts


@pytest.mark.slow
def test_wrong_gguf_metadata(llama_gguf):
    checkpoint, metadata, tensors = llama_gguf
    numbers = [("f32", 2.0), ("u64", 2**63)]
    bad = numbers + [
        ("f32", math.nan), ("f32", -math.inf), ("f64", 1e300), ("bool", True), ("text", "2"),
        ("i32", -1), ("list", ("u32", [4, 4])), ("list", ("u32", [])), ("list", ("text", ["a"])),
    ]  # fmt: skip
    real, harmless = "llama.rope.freq_base", "tokenizer.ggml.eos_token_id"
    cases = []
    for i, (key, _, _) in enumerate(metadata):
        cases += [
            (key, [*metadata[:i], (key, *value), *metadata[i + 1 :]])
            for value in bad
            if key != real or value not in numbers
        ]
    more = ["strange", "llama.strange", "llama.rope.scaling.type", "llama.attention.key_length"]
    more += ["llama.rope.scaling.yarn_log_multiplier", "llama.expert_count", "split.count"]
    more += ["general.type", "general.alignment", "llama.attention.sliding_window"]
    cases += [(key, [*metadata, (key, *value)]) for key in more for value in bad]
    for key, changed in cases:
        checkpoint.path.write_bytes(gguf_bytes(changed, tensors))
        assert checkpoint.ends_well(checkpoint.path, changed) or key == harmless, changed
    checkpoint.path.write_bytes(gguf_bytes(metadata, tensors))


def test_wrong_gguf_tensors(llama_gguf):
    checkpoint, metadata, tensors = llama_gguf
    changes = [
        lambda n, k, s, v, o: (n, 24, s, v[: len(v) // 4], o),  # I8
        lambda n, k, s, v, o: (n, 26, s, v, o),  # I32
        lambda n, k, s, v, o: (n, 99, s, v, o),
        lambda n, k, s, v, o: (n, 2, s, v, o),  # Q4_0: smaller
        lambda n, k, s, v, o: (n, 28, s, v, o),  # F64: larger
        lambda n, k, s, v, o: (n, k, (*s, 1), v, o),
        lambda n, k, s, v, o: (n, k, (1,) * 5, v, o),
        lambda n, k, s, v, o: (n, k, (s[0] + 1, *s[1:]), v, o),
        lambda n, k, s, v, o: (n, k, (2**40, 2**40), v, o),
        lambda n, k, s, v, o: (n, k, (0, *s[1:]), b"", o),
        lambda n, k, s, v, o: (n, k, s, v, 64),
        lambda n, k, s, v, o: (n, k, s, v, 2**63),
        lambda n, k, s, v, o: (n + "s", k, s, v, o),
        lambda n, k, s, v, o: (tensors[0][0], k, s, v, o),
    ]
    for i, change in enumerate(changes):
        at = 1 + i % (len(tensors) - 1)
        changed = [*tensors[:at], change(*tensors[at]), *tensors[at + 1 :]]
        checkpoint.path.write_bytes(gguf_bytes(metadata, changed))
        assert checkpoint.ends_well(checkpoint.path, (i, tensors[at][0]))
    for at in range(len(tensors)):
        checkpoint.path.write_bytes(gguf_bytes(metadata, tensors[:at] + tensors[at + 1 :]))
        if tensors[at][0] != "output.weight":  # a model without is tied
            assert checkpoint.ends_well(checkpoint.path, at)
    checkpoint.path.write_bytes(gguf_bytes(metadata, tensors))
