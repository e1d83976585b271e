"""A model ready to write: its parameters, tokenizer, ends and chat template, from files."""

import concurrent.futures
import pathlib
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Integer

from tilescan.data.sources import fetch
from tilescan.data.tokenizers import GGUFTokenizer, utf8
from tilescan.decoding import continuation
from tilescan.decoding.chat_templates import ChatTemplate, folder_template, gguf_template
from tilescan.decoding.continuation import Sampling
from tilescan.decoding.folder_tokenizers import load_tokenizer
from tilescan.decoding.pieces import Codec
from tilescan.decoding.reader import Reader
from tilescan.models import LanguageModel
from tilescan.models.checkpoints import open_pretrained
from tilescan.models.language_model import abstract_params
from tilescan.models.mixers import attends

# Checkpoints that data.sources can fetch by name.
PRETRAINED = ("smollm2",)


class Writer(NamedTuple):
    """A model ready to write: what `load_writer` returns.

    ends: the tokens that end a text; None leaves it to the tokenizer (end_ids, or eos_id alone).
    template: of the checkpoint's conversations, if it has one.
    """

    model: LanguageModel
    params: Any
    tokenizer: Codec
    ends: tuple[int, ...] | None = None
    template: ChatTemplate | None = None


class GeneratedText(NamedTuple):
    """The continuation, its number of tokens, and how long prompt and tokens took, in seconds.

    The first token's time holds reading the prompt and compiling; the others' rate is what a
    longer text would run at.
    """

    text: str
    tokens: int
    first_seconds: float
    tokens_per_second: float


def load_writer(
    path_or_source: str | pathlib.Path,
    *,
    dtype: str = "float32",
    prepare: Callable[[Writer], Callable[[], Any]] | None = None,
) -> Writer:
    """Loads a checkpoint with its tokenizer, the tokens that end its texts, and its chat template.

    The ends are the end-of-text and end-of-turn tokens that the files name; see
    `folder_tokenizers.read_ends` and `data.tokenizers.GGUFTokenizer`.

    Quantized weights are dequantized once, as they are read: XLA on CPUs has fast products in
    float32 alone. One token's products with the 106 million weights of SmolLM2-135M's layers take,
    on two cores, 24 ms in float32, 32 from q8_0 and 49 from q4_1 dequantized in the step, and 41 in
    bfloat16, at its best; a bfloat16 model takes 95 ms a token where float32 takes 40.

    Args:
      path_or_source: "smollm2", a .gguf file, or a folder with config.json, safetensors and
        tokenizer.json (a GPT-2 folder does without the last).
      dtype: of computation and parameters.
      prepare: is called before the parameters are read, with a writer whose parameters are shapes;
        what it returns is called in a thread while they are read: `compile_ahead`, say.

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
    opened = open_pretrained(path, dtype=dtype, param_dtype=dtype)
    if opened.metadata is not None:
        tokenizer = GGUFTokenizer(path, opened.metadata)
        ends, template = tokenizer.end_ids, gguf_template(opened.metadata, name)
    else:
        tokenizer, ends = load_tokenizer(path, opened.config.vocab_size)
        template = folder_template(path)
    model = LanguageModel(opened.config)
    writer = Writer(model, None, tokenizer, ends, template)
    if prepare is None:
        return writer._replace(params=jax.device_put(opened.read_params()))
    action = prepare(writer._replace(params=abstract_params(opened.config)))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        prepared = pool.submit(action)
        writer = writer._replace(params=jax.device_put(opened.read_params()))
        prepared.result()
    return writer


def compile_ahead(
    writer: Writer,
    length: int,
    tokens: int,
    sampling: Sampling,
    *,
    batch: int = 1,
    packed: bool = False,
) -> None:
    """Compiles what continuing prompts will call.

    Args:
      writer: its parameters may be shapes alone.
      length: of the prompt, in tokens.
      tokens: of prompt and continuation.
      sampling: how tokens will be chosen.
      batch: how many prompts at a time.
      packed: whether they are padded.
    """
    Reader(writer.model, writer.params).compile_ahead(batch, tokens, length, packed)
    vocab_size = writer.model.config.vocab_size
    continuation.compile_ahead(vocab_size, batch, sampling, ends_of(writer))


def prompt_ids(tokenizer: Codec, prompt: str) -> Integer[np.ndarray, " N"]:
    """Returns a prompt's int32 ids, with the token that begins a text where the file says so.

    Raises:
      TypeError, ValueError: a prompt that is empty or no Unicode text.
    """
    utf8(prompt, "prompt")
    ids = tokenizer.encode(prompt, allow_special=True)
    first = getattr(tokenizer, "bos_id", None)
    if first is not None and first not in ids[:1]:
        ids = np.concatenate([[first], ids]).astype(np.int32)
    if not len(ids):
        raise ValueError("prompt is empty; give it a word at least")
    return np.asarray(ids, np.int32)


def ends_of(writer: Writer) -> tuple[int, ...]:
    """Returns the tokens that end a text; those outside its vocabulary end none."""
    ends = writer.ends
    if ends is None:
        eos = writer.tokenizer.eos_id
        ends = getattr(writer.tokenizer, "end_ids", () if eos is None else (eos,))
    return tuple(end for end in ends if end < writer.model.config.vocab_size)


def warn_beyond_training(writer: Writer, tokens: int) -> None:
    """Warns of more tokens than a model with rotary positions was made for."""
    config = writer.model.config
    if config.position != "rope" or not any(map(attends, config.pattern)):
        return
    if tokens > config.max_len:
        warnings.warn(
            f"prompt and max_new_tokens are {tokens} tokens, more than the max_len="
            f"{config.max_len} that the model was made for: what it writes after these may be "
            "nonsense",
            stacklevel=3,
        )


def timed(
    pieces: Iterable[str], began: float, most: int, write: Callable[[str], Any] | None
) -> GeneratedText:
    """Returns pieces of a text, one for each token, as a whole, and how long they took.

    Args:
      pieces: see `decoding.pieces`.
      began: when the first was asked for, by time.perf_counter.
      most: of how many tokens they can be.
      write: is called with each piece.
    """
    parts, times = [], [began]
    for piece in pieces:
        parts.append(piece)
        times.append(time.perf_counter())
        if write is not None:
            write(piece)
    # The first two steps compile; what follows is the steady rate.
    steady = len(times) - 4
    rate = steady / (times[-2] - times[2]) if steady > 0 else float("nan")
    first = times[1] - times[0] if parts else float("nan")
    return GeneratedText("".join(parts), min(len(parts), most), first, rate)
