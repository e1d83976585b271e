"""Training data that are mixtures, and the sources that are evaluated by themselves."""

from collections.abc import Callable, Iterable
from typing import Any

from tilescan.data import mixtures, pipelines, sources
from tilescan.data.documents import Document
from tilescan.data.tokenizers import Tokenizer
from tilescan.training.settings import ConfigError, Settings

REPLAY = "replay"  # the part of a mixture that is old data


def is_mixed(c: Settings) -> bool:
    """Returns whether a run trains on a mixture, by data.weights or data.replay."""
    return bool(c.data.weights or c.data.replay)


def mixed_dataset(
    c: Settings, tokenizer: Tokenizer, shard_index: int = 0, shard_count: int = 1
) -> mixtures.BatchDataset:
    """Returns batches of a mixture of training documents, each source in an order of its own.

    New sources share 1 - data.replay of the rows by data.weights, or are one corpus without them;
    the sources of data.replay_sources are one corpus and have the rest.
    """
    options = dict(seq_len=c.data.seq_len, packing=c.data.packing, shuffle=c.data.shuffle)

    def rows(names: Iterable[str], seed: int) -> pipelines.LmRows:
        return pipelines.LmRows(split_of(c, tuple(names), "train"), tokenizer, seed=seed, **options)

    new = {name: (name,) for name in c.data.sources} if c.data.weights else {}
    new = new or {"+".join(c.data.sources): c.data.sources}
    weights = dict(zip(new, c.data.weights or (1.0,), strict=True))
    parts = {name: rows(names, c.seed) for name, names in new.items()}
    if c.data.replay:
        total = sum(weights.values())
        weights = {name: w * (1 - c.data.replay) / total for name, w in weights.items()}
        seed = c.seed if c.data.replay_seed is None else c.data.replay_seed
        parts[REPLAY], weights[REPLAY] = rows(c.data.replay_sources, seed), c.data.replay
    return mixtures.mixture_dataset(
        parts,
        weights,
        batch_size=c.data.batch_size,
        shard_index=shard_index,
        shard_count=shard_count,
        first_batch=c.data.first_batch,
    )


def split_of(c: Settings, names: tuple[str, ...], split: str) -> list[Document]:
    """Returns the documents of a split of some sources, together.

    Raises:
      ConfigError: none of them is in the split.
    """
    documents = sources.load_all(names)[: c.data.max_documents]
    found = pipelines.split_documents(documents, c.data.split_seed, c.data.fractions)[split]
    if not found:
        raise ConfigError(
            f"of the {len(documents)} document(s) of {', '.join(names)} none is for {split}: "
            f"data.fractions = {tuple(c.data.fractions)} needs more"
        )
    return found


def domains(c: Settings, once: Callable[[list[Document]], Any]) -> dict[str, Any]:
    """Returns {"validation/SOURCE": batches} of each source that is evaluated by itself.

    Those are the sources of a mixture and of data.eval_sources.
    """
    mixed = (*c.data.sources, *c.data.replay_sources) if is_mixed(c) else ()
    names = dict.fromkeys((*mixed, *c.data.eval_sources))
    return {f"validation/{name}": once(split_of(c, (name,), "validation")) for name in names}
