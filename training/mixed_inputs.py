"""Training data that are mixtures, and the sources that are evaluated by themselves.

Where a source is one of several parts, or evaluated apart, each source is split by itself, so that
a document has one split whatever else is trained on; without, all are split as one corpus.
"""

import dataclasses
import fractions
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


def is_split_apart(c: Settings) -> bool:
    """Returns whether each source is split by itself: in mixtures, and with data.eval_sources."""
    return is_mixed(c) or bool(c.data.eval_sources)


def split_apart(c: Settings, names: Iterable[str]) -> dict[str, list[Document]]:
    """Returns {split: documents of some sources}, of which each is split by itself.

    data.max_documents is of each source. Where ids are alike, they get their source in front.
    """
    names = tuple(names)
    sources.load_all(names)  # refuses one text under two names
    parts: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    taken: set[str] = set()
    for name in names:
        documents = sources.load(name)[: c.data.max_documents]
        found = pipelines.split_documents(documents, c.data.split_seed, c.data.fractions)
        alike = not taken.isdisjoint(document.id for document in documents)
        for split, own in found.items():
            if alike:
                own = [dataclasses.replace(d, id=f"{name}/{d.id}") for d in own]
            parts[split] += own
        taken.update(document.id for document in documents)
    return parts


def mixed_dataset(
    c: Settings, tokenizer: Tokenizer, shard_index: int = 0, shard_count: int = 1
) -> mixtures.BatchDataset:
    """Returns batches of a mixture of training documents, each source in an order of its own.

    New sources share 1 - data.replay of the rows by data.weights, or are one corpus without them;
    the sources of data.replay_sources are one corpus and have the rest.

    Raises:
      ConfigError: a part without a document to train on.
    """
    options = dict(seq_len=c.data.seq_len, packing=c.data.packing, shuffle=c.data.shuffle)

    def rows(names: Iterable[str], seed: int) -> pipelines.LmRows:
        documents = split_apart(c, names)["train"]
        if not documents:
            raise ConfigError(f"of {', '.join(names)} no document is left to train on")
        return pipelines.LmRows(documents, tokenizer, seed=seed, **options)

    # Old data first: what is first is spread most evenly.
    parts: dict[str, pipelines.LmRows] = {}
    weights: dict[str, fractions.Fraction] = {}
    replay = mixtures.exact(c.data.replay)
    if replay:
        seed = c.seed if c.data.replay_seed is None else c.data.replay_seed
        parts[REPLAY], weights[REPLAY] = rows(c.data.replay_sources, seed), replay
    new = {name: (name,) for name in c.data.sources} if c.data.weights else {}
    new = new or {"+".join(c.data.sources): c.data.sources}
    given = [mixtures.exact(weight) for weight in c.data.weights or (1,)]
    for (name, names), weight in zip(new.items(), given, strict=True):
        parts[name] = rows(names, c.seed)
        weights[name] = weight * (1 - replay) / sum(given)
    return mixtures.mixture_dataset(
        parts,
        weights,
        batch_size=c.data.batch_size,
        shard_index=shard_index,
        shard_count=shard_count,
        first_batch=c.data.first_batch,
    )


def domains(c: Settings, once: Callable[[list[Document]], Any]) -> dict[str, Any]:
    """Returns {"validation/SOURCE": batches} of each source that is evaluated by itself.

    Those are the sources of a mixture, where they have validation documents, and of
    data.eval_sources.

    Raises:
      ConfigError: one of data.eval_sources has no validation documents.
    """
    mixed = (*c.data.sources, *c.data.replay_sources) if is_mixed(c) else ()
    found = {}
    for name in dict.fromkeys((*mixed, *c.data.eval_sources)):
        documents = split_apart(c, (name,))["validation"]
        if documents:
            found[f"validation/{name}"] = once(documents)
        elif name in c.data.eval_sources:
            raise ConfigError(
                f"data.eval_sources: {name} has no document for validation: data.fractions = "
                f"{tuple(c.data.fractions)} needs more, or another source"
            )
    return found
