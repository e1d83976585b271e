"""The tokenizer of a checkpoint's folder, and the tokens that end a text of its model.

Read beside the weights: tokenizer.json, tokenizer_config.json, generation_config.json, config.json.
"""

import pathlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Integer

from tilescan.data.tokenizers import TEXT_ENDS, TURN_ENDS, get_tokenizer, utf8
from tilescan.decoding.pieces import Codec
from tilescan.models.checkpoint_errors import CheckpointError, short
from tilescan.models.json_files import read_json


class FolderTokenizer:
    """A folder's tokenizer.json with the encode and decode of data.tokenizers.

    Attributes:
      end_ids: tokens at which a text ends.
      eos_id: the first of them, or None.

    Raises:
      ValueError: if the file cannot be read.
      CheckpointError: see `read_ends`.
    """

    def __init__(self, folder: pathlib.Path, vocab_size: int):
        import tokenizers  # only folders need it

        path = folder / "tokenizer.json"
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
        # Left over from training: they would shorten a prompt, or pad it.
        self._inner.no_truncation()
        self._inner.no_padding()
        self.end_ids = read_ends(folder, self._inner.token_to_id, vocab_size)
        self.eos_id = self.end_ids[0] if self.end_ids else None

    def encode(self, text: str, *, allow_special: bool = False) -> Integer[np.ndarray, " N"]:
        """Returns the int32 ids of a text's tokens.

        Args:
          text: to encode.
          allow_special: whether tokens such as "<|endoftext|>" in it are read as such.

        Raises:
          ValueError: text that UTF-8 can't hold.
        """
        return self._encode(text, allow_special, whole=True)

    def encode_part(self, text: str, *, allow_special: bool = False) -> Integer[np.ndarray, " N"]:
        """Returns the ids of a part of a text: `encode` without what it adds around a whole one."""
        return self._encode(text, allow_special, whole=False)

    def _encode(self, text: str, allow_special: bool, whole: bool) -> Integer[np.ndarray, " N"]:
        utf8(text)
        self._inner.encode_special_tokens = not allow_special
        return np.asarray(self._inner.encode(text, add_special_tokens=whole).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of tokens, special ones included."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(folder: pathlib.Path, vocab_size: int) -> tuple[Codec, tuple[int, ...]]:
    """Returns a folder's tokenizer, and the tokens that end a text of its model.

    Args:
      folder: of a checkpoint; one without tokenizer.json is GPT-2's if its vocabulary is.
      vocab_size: the model's V.

    Raises:
      FileNotFoundError: no tokenizer.
      ValueError, CheckpointError: see `FolderTokenizer`.
    """
    if (folder / "tokenizer.json").exists():
        tokenizer = FolderTokenizer(folder, vocab_size)
        return tokenizer, tokenizer.end_ids
    gpt2 = get_tokenizer("gpt2")
    if vocab_size != gpt2.vocab_size:
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json, and its vocabulary of {vocab_size} is not GPT-2's "
            f"{gpt2.vocab_size}"
        )
    return gpt2, read_ends(folder, {"<|endoftext|>": gpt2.eos_id}.get, vocab_size)


def read_ends(
    folder: pathlib.Path, id_of: Callable[[str], int | None], vocab_size: int
) -> tuple[int, ...]:
    """Returns the tokens that end a text of a folder's model.

    These are: eos_token_id, one or several, of generation_config.json, or of config.json where the
    former has none (as `transformers` reads them); eos_token of tokenizer_config.json; and what
    ends a turn in its chat template. Where none of these says anything: the tokens that are spelled
    like an end (TEXT_ENDS, TURN_ENDS).

    Args:
      folder: of a checkpoint.
      id_of: gives a token's id, or None.
      vocab_size: V; ids outside it end nothing, about which a warning is given.

    Raises:
      CheckpointError: an eos_token_id or eos_token of a wrong type, a file that can't be read.
    """
    declared = []
    for name in ("generation_config.json", "config.json"):
        ids = _eos_ids(folder / name, vocab_size)
        declared = declared or ids
    named, template = _tokenizer_config(folder)
    ends = [*declared]
    if named is not None:
        end = id_of(named)
        if end is None:
            _warn(f"{folder / _CONFIG}: eos_token={short(named)} is not a token of the vocabulary")
        else:
            ends.append(end)
    ends += [id_of(token) for token in TURN_ENDS if token in template]
    ends = [end for end in ends if end is not None]
    if not ends:
        ends = [id_of(token) for token in TEXT_ENDS + TURN_ENDS]
    return tuple(dict.fromkeys(end for end in ends if end is not None and end < vocab_size))


_CONFIG = "tokenizer_config.json"


def _eos_ids(file: pathlib.Path, vocab_size: int) -> list[int]:
    """eos_token_id of a file: those in the vocabulary."""
    if not file.exists():
        return []
    value = read_json(file, "is not a configuration").get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(
            f"{file}: eos_token_id={short(value)} must be an integer, a list of integers or null"
        )
    for i in ids:
        if not 0 <= i < vocab_size:
            _warn(f"{file}: eos_token_id={short(i)} is outside the vocabulary 0..{vocab_size - 1}")
    return [i for i in ids if 0 <= i < vocab_size]


def _warn(message: str) -> None:
    warnings.warn(f"{message}; no text will end with it", stacklevel=2)


def _tokenizer_config(folder: pathlib.Path) -> tuple[str | None, str]:
    """(eos_token or None, the chat templates' text or "")."""
    file = folder / _CONFIG
    config: dict[str, Any] = read_json(file, "is not a configuration") if file.exists() else {}
    token = config.get("eos_token")
    if isinstance(token, dict):  # with flags of how it is split off
        token = token.get("content")
    if not isinstance(token, str | None):
        raise CheckpointError(f"{file}: eos_token={short(token)} must be a token's text or null")
    # One template, or several with names; newer exports have a file for it.
    template = str(config.get("chat_template") or "")
    for path in (folder / "chat_template.jinja", folder / "chat_template.json"):
        if path.is_file():
            template += path.read_text("utf-8", errors="replace")
    return token, template
