"""Streamed pieces against the text of all tokens, for decoders that look at what is before."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tilescan.data.tokenizers import get_tokenizer
from tilescan.decoding.pieces import text_pieces

WORDS = ["▁", "▁▁", "▁the", "▁cat", "▁sat", "s", "at", "c", ".", "▁a", "é"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


class Inner:
    """What `text_pieces` needs, of a tokenizer of the library."""

    def __init__(self, model, decoder, **steps):
        self.inner = tokenizers.Tokenizer(model)
        self.inner.decoder = decoder
        for name, step in steps.items():
            setattr(self.inner, name, step)

    def decode(self, ids):
        return self.inner.decode(list(ids), skip_special_tokens=False)

    def ids(self, *tokens):
        return [self.inner.token_to_id(token) for token in tokens]


def bpe(words):
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", *BYTES, *words])}
    return models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)


def llama2():
    """Llama 2's: a space before the text, which the decoder takes away again."""
    return Inner(
        bpe(WORDS),
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )


def metaspace(scheme="always"):
    vocabulary = [("<unk>", 0.0), *((word, -1.0) for word in WORDS)]
    return Inner(
        models.Unigram(vocabulary, 0),
        decoders.Metaspace(prepend_scheme=scheme),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme),
    )


def byte_level():
    words = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words |= {word: 256 + i for i, word in enumerate(["Ġthe", "the", "Ġcat"])}
    return Inner(models.BPE(words, []), decoders.ByteLevel())


def word_pieces():
    words = {word: i for i, word in enumerate(["[UNK]", "the", "cat", "##s", ".", "a"])}
    return Inner(models.WordPiece(words, unk_token="[UNK]"), decoders.WordPiece())


def word_ends():
    words = {word: i for i, word in enumerate(["the</w>", "cat</w>", "c", "at</w>", ".</w>"])}
    return Inner(models.BPE(words, []), decoders.BPEDecoder("</w>"))


def whole_words():
    words = {word: i for i, word in enumerate(["the", "cat", "<unk>"])}
    return Inner(models.WordLevel(words, unk_token="<unk>"), None)


CASES = {
    "llama2": (llama2(), ["▁the"], ["▁cat", "s", "▁sat", "."], [" cat", "s", " sat", "."]),
    "llama2 after <s>": (llama2(), ["<s>", "▁the"], ["▁cat", "."], [" cat", "."]),
    "spaces": (llama2(), ["▁the"], ["▁", "▁cat", "▁▁", "▁a"], [" ", " cat", "  ", " a"]),
    "inside a word": (llama2(), ["▁the", "▁c"[:1], "c"], ["at", "▁a"], ["at", " a"]),
    "bytes": (
        llama2(),
        ["▁the"],
        ["▁", "<0xE2>", "<0x82>", "<0xAC>", "<0xC3>", "<0xA9>", "▁cat"],
        [" ", "", "", "€", "", "é", " cat"],
    ),
    # The library decodes a run of bytes as a whole, or as none if its end is none.
    "bytes after bytes": (
        llama2(),
        ["▁the"],
        ["<0xC3>", "<0xA9>", "<0xE2>", "▁cat", "▁a"],
        ["", "é", "", "\ufffd cat", " a"],
    ),
    "bytes at the end": (llama2(), ["▁the"], ["▁cat", "<0xE2>"], [" cat", "", "\ufffd"]),
    "metaspace": (metaspace(), ["▁the"], ["▁cat", "s", "▁sat", "."], [" cat", "s", " sat", "."]),
    "metaspace, first": (metaspace("first"), ["▁the"], ["▁cat", "s"], [" cat", "s"]),
    "metaspace, never": (metaspace("never"), ["▁the"], ["▁cat", "s"], [" cat", "s"]),
    "metaspaces": (metaspace(), ["▁the"], ["▁▁", "▁", "▁cat"], ["  ", " ", " cat"]),
    "byte level": (
        byte_level(),
        ["the"],
        ["Ġcat", "Ġ", "â", "Ĥ", "¬", "Ġthe"],
        [" cat", " ", "", "", "€", " the"],
    ),
    "word pieces": (word_pieces(), ["the"], ["cat", "##s", "a", "."], [" cat", "s", " a", "."]),
    "goes on with a word": (word_pieces(), ["the", "cat"], ["##s", "a"], ["s", " a"]),
    "ends of words": (word_ends(), ["the</w>"], ["c", "at</w>", "the</w>"], [" c", "at", " the"]),
    "whole words": (whole_words(), ["the"], ["cat", "the"], [" cat", " the"]),
}


@pytest.mark.parametrize("name", CASES)
def test_pieces_are_what_each_token_adds(name):
    tokenizer, prompt, drawn, expected = CASES[name]
    prompt, drawn = tokenizer.ids(*prompt), tokenizer.ids(*drawn)
    assert None not in prompt + drawn
    assert list(text_pieces(tokenizer, np.asarray(prompt), drawn)) == expected
    if "bytes after" not in name:
        whole = tokenizer.decode(prompt + drawn)
        assert tokenizer.decode(prompt) + "".join(expected) == whole


def test_unknown_ids_hide_no_space():
    """Ids beyond the tokenizer's, which padded models draw, decode to nothing."""
    tokenizer = metaspace()
    [the, cat] = tokenizer.ids("▁the", "▁cat")
    assert list(text_pieces(tokenizer, [the], [9_999, cat, 9_999, cat])) == ["", " cat", "", " cat"]


@pytest.mark.parametrize("make", [llama2, metaspace, byte_level, word_pieces])
def test_long_texts_are_decoded_in_windows(make):
    """More tokens than a window, drawn at random: the pieces are the whole text."""
    tokenizer, rng = make(), np.random.default_rng(0)
    words = [i for i in range(tokenizer.inner.get_vocab_size()) if i > 257 or make is not llama2]
    prompt, drawn = rng.choice(words, 70), rng.choice(words, 700)
    lengths = []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids: lengths.append(len(ids)) or decode(ids)
    pieces = list(text_pieces(tokenizer, prompt, drawn))
    assert max(lengths) < 700
    if make is byte_level:  # random bytes are not characters
        assert len(pieces) in (700, 701)
    else:
        assert decode(prompt) + "".join(pieces) == decode([*prompt, *drawn])


def test_bytes_of_the_byte_tokenizer():
    byte = get_tokenizer("byte")
    pieces = list(text_pieces(byte, byte.encode("a "), byte.encode("bé €\U0001f642!")))
    assert pieces == ["b", "", "é", " ", "", "", "€", "", "", "", "\U0001f642", "!"]
    assert list(text_pieces(byte, byte.encode("a"), [])) == []
