"""GGUF files: what one says is used, or refused by name."""

import dataclasses
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
from checkpoint_samples import (
    GGUF,
    TOKENS,
    gguf_bytes,
    gguf_parts,
    random_params,
    write_gguf,
)

from tilescan.models import LanguageModel
from tilescan.models.checkpoints import load_pretrained
from tilescan.models.positions import rope_frequencies
from tilescan.models.weight_names import CheckpointError


def logits(config, params):
    return jax.jit(LanguageModel(config).apply)({"params": params}, TOKENS)[0]


def refuses(path, message):
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(path)


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
        (("a", 2, (31,), bytes(18), None), "rows of tensor 'a' are not whole blocks of Q4_0"),
        (
            ("output_norm.weight", 0, (32,), bytes(128), None),
            "'output_norm.weight' stands there",
        ),
    ],
)
def test_gguf_tensors_are_checked_before_they_are_read(tensor, message, tmp_path, parts):
    metadata, tensors = parts
    refuses(write(tmp_path / "m.gguf", metadata, [*tensors, tensor]), f"m.gguf.*{message}")


@pytest.mark.slow
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
