"""From text to text: a published checkpoint, its tokenizer and sampling, in one call."""

import itertools
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from tilescan.data.sources import fetch
from tilescan.data.tokenizers import GGUFTokenizer, utf8
from tilescan.decoding.arguments import check_max_new_tokens
from tilescan.decoding.filters import check_integer, check_temperature, check_top_k, check_top_p
from tilescan.decoding.folder_tokenizers import load_tokenizer
from tilescan.decoding.pieces import Codec, text_pieces
from tilescan.decoding.sampling import stream
from tilescan.models import LanguageModel
from tilescan.models.checkpoints import load_pretrained
from tilescan.models.mixers import attends

# Checkpoints that data.sources can fetch by name.
PRETRAINED = ("smollm2",)


class Writer(NamedTuple):
    """A model ready to write: what `load_writer` returns.

    ends: the tokens that end a text; None leaves it to the tokenizer (end_ids, or eos_id alone).
    """

    model: LanguageModel
    params: Any
    tokenizer: Codec
    ends: tuple[int, ...] | None = None


class GeneratedText(NamedTuple):
    """The continuation, its number of tokens, and how long prompt and tokens took, in seconds.

    The first token's time holds reading the prompt and compiling; the others' rate is what a
    longer text would run at.
    """

    text: str
    tokens: int
    first_seconds: float
    tokens_per_second: float


def load_writer(path_or_source: str | pathlib.Path, *, dtype: str = "float32") -> Writer:
    """Loads a checkpoint with its tokenizer and the tokens that end its texts.

    These are the end-of-text and end-of-turn tokens that the files name; see
    `folder_tokenizers.read_ends` and `data.tokenizers.GGUFTokenizer`.

    Args:
      path_or_source: "smollm2", a .gguf file, or a folder with config.json, safetensors and
        tokenizer.json (a GPT-2 folder does without the last).
      dtype: of computation and parameters.

    Raises:
      FileNotFoundError: there is no such file, or a folder has no tokenizer.
      ValueError: its tokenizer.json cannot be read.
      CheckpointError: see `load_pretrained`.
    """
    name = str(path_or_source)
    path = fetch(name) if name in PRETRAINED else pathlib.Path(path_or_source)
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {path}: give a folder with config.json, a .gguf file, or the name "
            f"of a source that is fetched: {', '.join(PRETRAINED)}"
        )
    config, params = load_pretrained(path, dtype=dtype, param_dtype=dtype)
    if path.suffix == ".gguf":
        tokenizer = GGUFTokenizer(path)
        ends = tokenizer.end_ids
    else:
        tokenizer, ends = load_tokenizer(path, config.vocab_size)
    return Writer(LanguageModel(config), jax.device_put(params), tokenizer, ends)


def stream_text(
    writer: Writer, prompt: str, *, max_new_tokens: int = 64, seed: int = 0, **sampling: Any
) -> Iterator[str]:
    """Yields pieces of the continuation, one per token, "" while a character is not whole yet.

    Together they are what follows the prompt's text; see `decoding.pieces`. The token that ends the
    text is none of it. `sampling` goes to `decoding.sampling.stream`: temperature, top_k, top_p.

    Raises:
      TypeError, ValueError, FloatingPointError: see `generate_text`.
    """
    ids = _prompt_ids(writer.tokenizer, prompt)
    ends = _ends(writer)
    sampled = stream(
        writer.model,
        writer.params,
        ids[None],
        max_new_tokens=max_new_tokens,
        key=_key(seed),
        eos=ends,
        **sampling,
    )
    text = itertools.takewhile(lambda token: token not in ends, (int(row[0]) for row in sampled))
    yield from text_pieces(writer.tokenizer, ids, text)


def _prompt_ids(tokenizer: Codec, prompt: str) -> np.ndarray:
    utf8(prompt, "prompt")
    ids = tokenizer.encode(prompt, allow_special=True)
    first = getattr(tokenizer, "bos_id", None)
    if first is not None and first not in ids[:1]:
        ids = np.concatenate([[first], ids]).astype(np.int32)
    if not len(ids):
        raise ValueError("prompt is empty; give it a word at least")
    return ids


def _warn_beyond_training(writer: Writer, prompt: str, max_new_tokens: int) -> None:
    """Warns of more tokens than a model with rotary positions was made for."""
    config = writer.model.config
    if config.position != "rope" or not any(map(attends, config.pattern)):
        return
    total = len(_prompt_ids(writer.tokenizer, prompt)) + max_new_tokens
    if total > config.max_len:
        warnings.warn(
            f"prompt and max_new_tokens are {total} tokens, more than the max_len="
            f"{config.max_len} that the model was made for: what it writes after these may be "
            "nonsense",
            stacklevel=3,
        )


def _ends(writer: Writer) -> tuple[int, ...]:
    """The tokens that end a text; those outside its vocabulary end none."""
    ends = writer.ends
    if ends is None:
        eos = writer.tokenizer.eos_id
        ends = getattr(writer.tokenizer, "end_ids", () if eos is None else (eos,))
    return tuple(end for end in ends if end < writer.model.config.vocab_size)


def _key(seed: int) -> jax.Array:
    seed = check_integer("seed", seed)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} must fit into 64 bits: -2**63 to 2**63 - 1")
    return jax.random.key(seed)


def generate_text(
    path_or_source: str | pathlib.Path | Writer | Callable[[], Writer],
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    write: Callable[[str], Any] | None = None,
) -> GeneratedText:
    """Continues a text, as `tilescan generate` does.

    Args:
      path_or_source: see `load_writer`; or what it returned, or a function that returns such.
      prompt: the text to continue; special tokens such as "<|im_start|>" are read as such, and
        the token that begins a text is added where the tokenizer's file says so.
      max_new_tokens: at most so many; fewer if the model ends the text.
      temperature, top_k, top_p: see `decoding.sampling`; temperature 0 is greedy.
      seed: of the random samples.
      write: is called with each new piece of text, e.g. functools.partial(print, end="").

    Raises:
      TypeError, ValueError: see `load_writer` and `decoding.sampling.generate`; a prompt that is
        empty or no Unicode text.
      FloatingPointError: the model's scores hold NaN or inf.
    """
    # What is wrong in itself is said before a model is loaded.
    utf8(prompt, "prompt")
    check_max_new_tokens(max_new_tokens)
    check_temperature(temperature, (1,))
    check_top_k(top_k)
    check_top_p(top_p, (1,))
    _key(seed)
    writer = path_or_source
    if not isinstance(writer, Writer):
        writer = writer() if callable(writer) else load_writer(writer)
    _warn_beyond_training(writer, prompt, max_new_tokens)
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    pieces, times = [], [time.perf_counter()]
    for piece in stream_text(writer, prompt, max_new_tokens=max_new_tokens, seed=seed, **sampling):
        pieces.append(piece)
        times.append(time.perf_counter())
        if write is not None:
            write(piece)
    text = "".join(pieces)
    # The first two steps compile; what follows is the steady rate.
    steady = len(times) - 4
    rate = steady / (times[-2] - times[2]) if steady > 0 else float("nan")
    return GeneratedText(
        text,
        min(len(pieces), max_new_tokens),
        times[1] - times[0] if pieces else float("nan"),
        rate,
    )
