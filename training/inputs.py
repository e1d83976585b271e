"""From a configuration to batches and a model: here alone training knows data/ and models/."""

import functools
import itertools
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
from flax import linen as nn

from tilescan.data import pipelines, sources, tokenizers
from tilescan.data.documents import Document
from tilescan.models import LanguageModel, SequenceClassifier
from tilescan.training import mixed_inputs
from tilescan.training.settings import ConfigError, Settings


def pad_rows(batch: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Adds rows that count nothing, so that the last, shorter batch has the shape of the others.

    A classification batch without weights gets them: 1 for its rows, 0 for those added.
    """
    have = len(batch["tokens"])
    if "weights" not in batch:
        batch = batch | {"weights": np.ones(have, np.float32)}
    if have == rows:
        return batch
    return {
        name: np.pad(value, [(0, rows - have)] + [(0, 0)] * (np.ndim(value) - 1))
        for name, value in batch.items()
    }


def eval_batches(dataset: Iterable, rows: int, limit: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of one evaluation, from the start: at most `limit`, or all if it is 0."""
    for batch in itertools.islice(dataset, limit or None):
        yield pad_rows(batch, rows)


def make_datasets(c: Settings, shard_index: int = 0, shard_count: int = 1) -> dict[str, Iterable]:
    """Loads, splits and batches the documents of `c.data`: a shard of each batch's rows.

    "train" repeats without end in an order that the seed gives; "validation" and "test" pass once,
    as do "validation/SOURCE" of sources that are evaluated by themselves.
    """
    # Documents of the three splits.
    if mixed_inputs.is_split_apart(c):
        parts = mixed_inputs.split_apart(c, c.data.sources)
        documents = [document for part in parts.values() for document in part]
    else:
        documents = sources.load_all(c.data.sources)[: c.data.max_documents]
        parts = pipelines.split_documents(
            documents, c.data.split_seed, c.data.fractions, balanced=c.task == "classification"
        )
    if c.task == "classification" and not labels(documents):
        raise ConfigError(
            f"task = 'classification' needs documents with labels; data.sources = "
            f"{c.data.sources} have none"
        )
    _warn_of_empty_parts(parts, c.data.fractions)

    # Batches of each: training shuffles and repeats, the others pass once.
    tokenizer = tokenizers.get_tokenizer(c.data.tokenizer)
    common = dict(
        seq_len=c.data.seq_len,
        batch_size=c.data.batch_size,
        shard_index=shard_index,
        shard_count=shard_count,
    )
    shuffled = dict(seed=c.seed, shuffle=c.data.shuffle)
    if c.task == "classification":
        make = functools.partial(
            pipelines.classification_dataset,
            tokenizer=tokenizer,
            labels=labels(documents),
            **common,
        )
        once = functools.partial(make, seed=0, shuffle=False, num_epochs=1)
        train = make(parts["train"], **shuffled)
    else:
        packing = dict(packing=c.data.packing)
        once = functools.partial(
            pipelines.evaluation_batches,
            tokenizer=tokenizer,
            stride=c.data.eval_stride,
            **packing,
            **common,
        )
        if mixed_inputs.is_mixed(c):
            train = mixed_inputs.mixed_dataset(c, tokenizer, shard_index, shard_count)
        else:
            train = pipelines.lm_dataset(
                parts["train"], tokenizer, first_batch=c.data.first_batch,
                **shuffled, **packing, **common,
            )  # fmt: skip
    held_out = {name: once(parts[name]) for name in ("validation", "test") if parts[name]}
    return {"train": train, **held_out, **mixed_inputs.domains(c, once)}


def _warn_of_empty_parts(parts: dict[str, list], fractions: tuple[float, ...]) -> None:
    """Says which parts were asked for and got no document."""
    shares = dict(zip(("train", "validation", "test"), fractions, strict=True))
    empty = [name for name in ("validation", "test") if shares[name] and not parts[name]]
    if empty:
        count = sum(map(len, parts.values()))
        warnings.warn(
            f"of {count} document(s) none is left for {' and '.join(empty)}: nothing is evaluated "
            f"there; data.fractions={tuple(fractions)} needs more, see data.max_documents",
            stacklevel=3,
        )


def make_model(c: Settings, datasets: dict | None = None) -> nn.Module:
    """Makes the model of `c.model`: a language model or, if the task says so, a classifier."""
    vocab_size = c.model.get("vocab_size")
    if vocab_size is None:
        vocab_size = tokenizers.get_tokenizer(c.data.tokenizer).vocab_size
    config = c.model_config(vocab_size)
    if c.task == "language_model":
        return LanguageModel(config)
    n_classes = c.classifier.n_classes
    found = getattr((datasets or {}).get("train"), "fingerprint", {}).get("labels")
    if n_classes is None:
        if found is None:
            raise ConfigError("classifier.n_classes is needed: the data do not say it")
        n_classes = len(found)
    elif found is not None and n_classes < len(found):
        raise ConfigError(
            f"classifier.n_classes = {n_classes} is below the {len(found)} labels of the data: "
            f"set it to {len(found)} or leave it out"
        )
    return SequenceClassifier(config, n_classes, c.classifier.pooling)


def check_vocabulary(model: nn.Module, dataset: Iterable) -> None:
    """Raises ConfigError if the data's vocabulary, where it is known, exceeds the model's.

    Args:
      dataset: any iterable of batches; those of `data` have a `vocab_size`, and say in their
        `fingerprint` whose it is.
    """
    have, need = _vocab_size(model), getattr(dataset, "vocab_size", None)
    if have is None or need is None or need <= have:
        return
    known = getattr(dataset, "fingerprint", {})
    whose = next((f"{key} {known[key]!r}" for key in ("tokenizer", "task") if key in known), "data")
    raise ConfigError(
        f"model.vocab_size = {have} is below the {need} tokens of the {whose}: ids from {have} on "
        f"would have no embedding. Set model.vocab_size to {need} or more"
    )


def id_limits(model: nn.Module) -> dict[str, int]:
    """Returns how many ids there are of each kind that a batch may hold, as far as models say."""
    sizes = {name: _vocab_size(model) for name in ("tokens", "targets")}
    sizes["labels"] = getattr(model, "n_classes", None)
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def check_ids(batch: dict[str, np.ndarray], limits: dict[str, int]) -> None:
    """Raises ValueError for ids outside [0, limit) in a batch on the host.

    Targets and labels of weight 0 are not looked at. On devices such ids would give NaN.
    """
    for name, size in limits.items():
        ids = batch.get(name)
        if ids is None or not np.issubdtype(ids.dtype, np.integer):
            continue
        low, high = ids.min(initial=0), ids.max(initial=0)
        if (low < 0 or high >= size) and name != "tokens" and "weights" in batch:
            counted = ids[np.asarray(batch["weights"]) != 0]
            low, high = counted.min(initial=0), counted.max(initial=0)
        if low < 0 or high >= size:
            key = "classifier.n_classes" if name == "labels" else "model.vocab_size"
            raise ValueError(
                f"{name} of a batch run from {low} to {high}, but the model has ids 0 to "
                f"{size - 1} ({key} = {size})"
            )


def _vocab_size(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "vocab_size", None)


def labels(documents: Iterable[Document]) -> tuple[str, ...]:
    """Returns the classes of a corpus, in the order of their numbers."""
    return tuple(sorted({document.label for document in documents} - {None}))
