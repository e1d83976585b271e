"""From text to text: a published checkpoint, its tokenizer and sampling, in one call."""

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from tilescan.data.sources import fetch
from tilescan.data.tokenizers import GGUFTokenizer, get_tokenizer
from tilescan.decoding.sampling import stream
from tilescan.models import LanguageModel
from tilescan.models.checkpoints import load_pretrained

# Checkpoints that data.sources can fetch by name.
PRETRAINED = ("smollm2",)


class Writer(NamedTuple):
    """A model ready to write: what `load_writer` returns."""

    model: LanguageModel
    params: Any
    tokenizer: Any


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
    """Loads a checkpoint with its tokenizer.

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
    tokenizer = _tokenizer(path, config.vocab_size)
    return Writer(LanguageModel(config), jax.device_put(params), tokenizer)


def _tokenizer(path: pathlib.Path, vocab_size: int):
    if path.suffix == ".gguf":
        return GGUFTokenizer(path)
    if (path / "tokenizer.json").exists():
        return _HuggingFaceTokenizer(path / "tokenizer.json")
    gpt2 = get_tokenizer("gpt2")
    if vocab_size != gpt2.vocab_size:
        raise FileNotFoundError(
            f"{path} has no tokenizer.json, and its vocabulary of {vocab_size} is not GPT-2's "
            f"{gpt2.vocab_size}"
        )
    return gpt2


class _HuggingFaceTokenizer:
    """A folder's tokenizer.json behind the encode/decode of data.tokenizers."""

    def __init__(self, path: pathlib.Path):
        import tokenizers  # only folders need it

        try:
            self._inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{path} is no readable tokenizer.json: {error}") from error
        known = ("<|endoftext|>", "</s>", "<|end_of_text|>")
        ids = [i for i in map(self._inner.token_to_id, known) if i is not None]
        self.eos_id = ids[0] if ids else None

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        return np.asarray(self._inner.encode(text).ids, np.int32)

    def decode(self, ids) -> str:
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=False)


def stream_text(
    writer: Writer, prompt: str, *, max_new_tokens: int = 64, seed: int = 0, **sampling
) -> Iterator[str]:
    """Pieces of the continuation, one per token, "" while a character is not whole yet.

    `sampling` goes to `decoding.sampling.stream`: temperature, top_k, top_p.
    """
    tokenizer = writer.tokenizer
    ids = tokenizer.encode(prompt, allow_special=True)
    if not len(ids):
        raise ValueError("prompt is empty; give it a word at least")
    drawn, written = [], 0
    eos = tokenizer.eos_id
    for token in stream(
        writer.model,
        writer.params,
        ids[None],
        max_new_tokens=max_new_tokens,
        key=jax.random.key(seed),
        eos=eos,
        **sampling,
    ):
        if int(token[0]) == eos:
            break
        drawn.append(int(token[0]))
        text = tokenizer.decode(drawn)
        # A character may take several tokens; until it is whole it decodes to U+FFFD.
        whole = not text.endswith("\ufffd")
        yield text[written:] if whole else ""
        written = len(text) if whole else written
    if drawn and not whole:
        yield tokenizer.decode(drawn)[written:]


def generate_text(
    path_or_source: str | pathlib.Path | Writer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    write: Callable[[str], Any] | None = None,
) -> GeneratedText:
    """Continues a text; the function behind `tilescan generate`.

    Args:
      path_or_source: see `load_writer`, or what it returned.
      prompt: the text to continue; special tokens such as "<|im_start|>" are read as such.
      max_new_tokens: at most so many; fewer if the model ends the text.
      temperature, top_k, top_p: see `decoding.sampling`; temperature 0 is greedy.
      seed: of the random draws.
      write: is called with each new piece of text, e.g. functools.partial(print, end="").
    """
    writer = path_or_source if isinstance(path_or_source, Writer) else load_writer(path_or_source)
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
