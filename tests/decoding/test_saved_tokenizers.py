"""Tokenizers written as Hugging Face's files: the same ids, ends and text when they are read."""

import json

import numpy as np
import pytest
import tokenizers
from gguf import GGUFWriter

from tilescan.data import tokenizers as ours
from tilescan.data.tokenizers import ByteTokenizer, GGUFTokenizer, TiktokenTokenizer
from tilescan.decoding.folder_tokenizers import FolderTokenizer
from tilescan.decoding.saved_tokenizers import merges_of, save_tokenizer

TEXT = "the  then, 'There'S 12345\r\n\n naïve ſ's 日本 \U0001f642\x00 <|endoftext|>the--- qxz(qxz"
END = "<|endoftext|>"

# No merges lead to "qxz": it is a token where it is a whole word. Id 263 has no token.
LONGER = [b"th", b"he", b"the", b" the", b"--", b"qxz", "日".encode()[:2]]
RANKS = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(LONGER)}


def by_ranks(folder):
    return TiktokenTokenizer("small", ours._CL100K_PATTERN, RANKS, {END: 264, "<|fim|>": 265})


def by_file(folder, first=False):
    tokens = [END, "<s>", "<|im_end|>"]
    tokens += [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th", "the", "12"]
    writer = GGUFWriter(folder / "toy.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e", "1 2"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(first)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFTokenizer(folder / "toy.gguf")


@pytest.mark.parametrize("make", [lambda folder: ByteTokenizer(), by_ranks, by_file])
def test_ids_ends_and_text_are_the_same(make, tmp_path):
    tokenizer = make(tmp_path)
    save_tokenizer(tmp_path, tokenizer)
    read = FolderTokenizer(tmp_path, tokenizer.vocab_size)
    ids = tokenizer.encode(TEXT)
    np.testing.assert_array_equal(read.encode(TEXT), ids)
    assert read.decode(ids) == tokenizer.decode(ids) == TEXT
    assert read.end_ids == tokenizer.end_ids
    if tokenizer.name != "byte":  # whose end has no spelling
        special = tokenizer.encode(TEXT, allow_special=True)
        np.testing.assert_array_equal(read.encode(TEXT, allow_special=True), special)
        assert len(special) < len(ids)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert inner.token_to_id(config["eos_token"]) == tokenizer.eos_id
    assert inner.token_to_id(config["pad_token"]) == tokenizer.pad_id


def test_a_prompt_begins_as_the_file_said(tmp_path):
    save_tokenizer(tmp_path, by_file(tmp_path, first=True))
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert inner.encode("the").tokens == ["<s>", "the"]


def test_merges_are_those_of_byte_pair_encoding():
    found = merges_of(RANKS)
    assert found[:4] == [(b"t", b"h"), (b"h", b"e"), (b"th", b"e"), (b" ", b"the")]
    assert [a + b for a, b in found] == [token for token in LONGER if token != b"qxz"]


def test_ids_without_a_token_are_no_text():
    tokenizer = by_ranks(None)
    assert tokenizer.decode([104, 263, 105]) == "h\ufffdi"


def test_another_tokenizer_is_refused(tmp_path):
    with pytest.raises(TypeError, match="must be one of data.tokenizers"):
        save_tokenizer(tmp_path, FolderTokenizer)
    assert not list(tmp_path.iterdir())
