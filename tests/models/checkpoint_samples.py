"""Small checkpoints of all layouts, which the tests of checkpoints share."""

import dataclasses
import json
import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from flax.traverse_util import flatten_dict

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.weight_names import file_names, gguf_llama_entries

LLAMA = LanguageModelConfig(
    vocab_size=40, d_model=32, repeats=2, n_heads=4, n_kv_heads=2, mlp_dim=64, max_len=128
)
GPT2 = LanguageModelConfig(
    vocab_size=40,
    d_model=32,
    repeats=2,
    n_heads=4,
    position="learned",
    norm="layernorm",
    mlp="gelu_tanh",
    attention_bias=True,
    mlp_bias=True,
)
MAMBA = LanguageModelConfig(
    vocab_size=40,
    d_model=32,
    repeats=2,
    pattern=("mamba",),
    position="none",
    mixers=dict(mamba=dict(state_dim=4)),
)
MAMBA2 = dataclasses.replace(
    MAMBA, pattern=("mamba2",), mixers=dict(mamba2=dict(state_dim=4, head_dim=8, n_groups=2))
)
CONFIGS = {
    "mamba": MAMBA,
    "mamba-untied-bias-rank": dataclasses.replace(
        MAMBA,
        tie_embeddings=False,
        norm_eps=1e-4,
        mixers=dict(mamba=dict(dt_rank=5, expand=3, conv_width=3, use_bias=True, conv_bias=False)),
    ),
    "mamba2": MAMBA2,
    "mamba2-untied-bias-limit": dataclasses.replace(
        MAMBA2,
        tie_embeddings=False,
        mixers=dict(mamba2=dict(head_dim=16, use_bias=True, dt_limit=(0.1, 2.0))),
    ),
    "llama": LLAMA,
    "llama-untied-bias-scaled": dataclasses.replace(
        LLAMA,
        tie_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        rope_theta=500.0,
        rope_scaling=dict(kind="llama3", factor=8.0),
    ),
    "gpt2": GPT2,
    "gpt2-untied": dataclasses.replace(GPT2, tie_embeddings=False),
}
TOKENS = jnp.arange(12).reshape(2, 6) * 3


def random_params(config):
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32)
    return jax.tree.map(draw, nn.unbox(shapes))


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def rewrite_config(folder, change):
    file = folder / "config.json"
    hf = json.loads(file.read_text())
    change(hf)
    file.write_text(json.dumps(hf))


def write_gguf(path, config, params, quantize=False, change=None):
    """A llama file as llama.cpp's converter writes it (the parts that are read).

    change(writer) adds to it.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.repeats)
    writer.add_context_length(config.max_len)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_token_list([f"token{i}" for i in range(config.vocab_size)])
    if change is not None:
        change(writer)
    flat = {"/".join(p): v for p, v in flatten_dict(params).items()}
    for entry in gguf_llama_entries(config):
        for i in range(config.repeats if entry.per_layer else 1):
            tensor = entry.write([flat[p][i] if entry.per_layer else flat[p] for p in entry.paths])
            if quantize and tensor.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q8_0
                data = gguf.quantize(tensor, kind)
                writer.add_tensor(entry.name.format(i), data, raw_dtype=kind)
            else:
                writer.add_tensor(entry.name.format(i), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF = dataclasses.replace(LLAMA, position="rope_interleaved", rope_theta=100.0, norm_eps=0.5)


# Files as they can be written wrong: bytes from what their headers claim.


def read_raw(file):
    """(header, values) of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(file, header, values, length=None):
    """A safetensors file of any header (an object, or bytes), which may lie about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    file.write_bytes(struct.pack("<Q", length) + text + values)


def retype(file, name, dtype=None, shape=None, values=None):
    """Rewrites one tensor of a safetensors file; its offsets and those after it follow."""
    header, content = read_raw(file)
    parts, at = {}, 0
    tensors = {n: e for n, e in header.items() if n != "__metadata__"}
    for other, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        parts[other] = content[slice(*entry["data_offsets"])]
    if values is not None:
        parts[name] = values
    tensors[name] |= {k: v for k, v in (("dtype", dtype), ("shape", shape)) if v is not None}
    for other, part in parts.items():
        tensors[other]["data_offsets"] = [at, at + len(part)]
        at += len(part)
    write_raw(file, header, b"".join(parts.values()))


GGUF_CODES = dict(u32="I", i32="i", f32="f", bool="?", u64="Q", f64="d")
GGUF_TYPES = dict(u32=4, i32=5, f32=6, bool=7, text=8, list=9, u64=10, f64=12)


def gguf_bytes(metadata, tensors, *, version=3, counts=None, alignment=32):
    """A GGUF file.

    metadata: [(key, type, value)], where a list's value is (type, values); tensors: [(name,
    type's number, shape as numpy has it, values, offset or None)]; counts: what the header claims.
    """
    text = lambda s: struct.pack("<Q", len(s)) + s

    def value(kind, v):
        if kind == "text":
            return text(v.encode())
        if kind == "list":
            of, items = v
            return struct.pack("<IQ", GGUF_TYPES[of], len(items)) + b"".join(
                value(of, item) for item in items
            )
        return struct.pack("<" + GGUF_CODES[kind], v)

    n_tensors, n_keys = counts or (len(tensors), len(metadata))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)
    for key, kind, v in metadata:
        head += text(key.encode()) + struct.pack("<I", GGUF_TYPES[kind]) + value(kind, v)
    at, body = 0, b""
    for name, number, shape, values, offset in tensors:
        head += text(name.encode()) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", number, at if offset is None else offset)
        padded = values + b"\0" * (-len(values) % alignment)
        body, at = body + padded, at + len(padded)
    return head + b"\0" * (-len(head) % alignment) + body


def gguf_parts(config, params):
    """metadata and tensors of a model, as `gguf_bytes` takes them."""
    metadata = [
        ("general.architecture", "text", "llama"),
        ("llama.block_count", "u32", config.repeats),
        ("llama.context_length", "u32", config.max_len),
        ("llama.embedding_length", "u32", config.d_model),
        ("llama.feed_forward_length", "u32", config.mlp_dim),
        ("llama.attention.head_count", "u32", config.n_heads),
        ("llama.attention.head_count_kv", "u32", config.n_kv_heads),
        ("llama.attention.layer_norm_rms_epsilon", "f32", config.norm_eps),
        ("llama.rope.freq_base", "f32", config.rope_theta),
        ("llama.rope.dimension_count", "u32", config.head_dim),
        ("llama.vocab_size", "u32", config.vocab_size),
        ("tokenizer.ggml.tokens", "list", ("text", [f"t{i}" for i in range(config.vocab_size)])),
        ("tokenizer.ggml.eos_token_id", "u32", 2),
    ]
    flat = {"/".join(p): v for p, v in flatten_dict(params).items()}
    tensors = []
    for entry, names in file_names(gguf_llama_entries(config), config.repeats):
        for i, name in enumerate(names):
            tensor = entry.write([flat[p][i] if entry.per_layer else flat[p] for p in entry.paths])
            tensors.append((name, 0, tensor.shape, tensor.tobytes(), None))
    return metadata, tensors
