"""Writes a tokenizer of `data.tokenizers` into a checkpoint's folder, in Hugging Face's files.

`tokenizers.Tokenizer.from_file` and `transformers.AutoTokenizer` read them, and so does
`decoding.folder_tokenizers`; the ids are the same.
"""

import json
import pathlib
import typing

from tilescan.data.tokenizers import (
    TEXT_ENDS,
    ByteTokenizer,
    GGUFTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)

if typing.TYPE_CHECKING:
    import tokenizers

_PAD = "<|pad|>"


def save_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
      folder: of a checkpoint.
      tokenizer: one of `data.tokenizers`.
    """
    inner = as_tokenizers(tokenizer)
    text_of = inner.id_to_token
    # AutoTokenizer takes a class by the model's type where none is named.
    config: dict = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token=text_of(tokenizer.eos_id),
        pad_token=text_of(tokenizer.pad_id),
        clean_up_tokenization_spaces=False,
    )
    first = getattr(tokenizer, "bos_id", None)
    if first is not None:
        config["bos_token"] = text_of(first)
    inner.save(str(folder / "tokenizer.json"))
    ends = list(tokenizer.end_ids)
    generation = dict(eos_token_id=ends if len(ends) > 1 else ends[0])
    for name, content in (("tokenizer_config", config), ("generation_config", generation)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def as_tokenizers(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
    """Returns a tokenizer as one of the library `tokenizers`.

    Raises:
      TypeError: it is none of `data.tokenizers`.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return _of_bytes()
    if isinstance(tokenizer, TiktokenTokenizer):
        return _of_ranks(tokenizer)
    if isinstance(tokenizer, GGUFTokenizer):
        return _of_gguf(tokenizer)
    raise TypeError(
        f"tokenizer must be one of data.tokenizers, whose files are known; got {type(tokenizer)}"
    )


def _of_bytes() -> "tokenizers.Tokenizer":
    """A vocabulary of bytes to which every character falls back."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {f"<0x{i:02X}>": i for i in range(256)}
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens([TEXT_ENDS[0], _PAD])
    return inner


def _of_ranks(tokenizer: TiktokenTokenizer) -> "tokenizers.Tokenizer":
    """The tokens by rank, merged in that order; a word that is a token is taken whole."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    character = _byte_characters()
    spell = lambda token: "".join(character[byte] for byte in token)
    vocabulary = {spell(token): rank for token, rank in tokenizer.ranks.items()}
    merges = [(spell(a), spell(b)) for a, b in merges_of(tokenizer.ranks)]
    bpe = models.BPE(vocabulary | tokenizer.special, merges, ignore_merges=True)
    inner = Tokenizer(bpe)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(tokenizer.special))
    return inner


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns the two tokens that each longer token is merged from, by rank.

    These are what byte-pair encoding with the tokens of lower rank leaves of it; where it leaves
    more than two, no sequence of merges gives the token.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            lowest = min(joined)
            if lowest >= rank:
                break
            i = joined.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _byte_characters() -> list[str]:
    """The printable characters that stand for bytes in GPT-2's vocabulary, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _of_gguf(tokenizer: GGUFTokenizer) -> "tokenizers.Tokenizer":
    """The tokenizer of a GGUF file; prompts begin as the file says."""
    from tokenizers import Tokenizer, processors

    inner = Tokenizer.from_str(tokenizer.bpe.to_str())
    if tokenizer.bos_id is not None:
        first = inner.id_to_token(tokenizer.bos_id)
        inner.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokenizer.bos_id)]
        )
    return inner
