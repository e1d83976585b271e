"""Mixtures of corpora, row by row: which source each row is of is a function of the row's number.

    parts = {name: LmRows(documents[name], tokenizer, seq_len=512, seed=0) for name in documents}
    batches = mixture_dataset(parts, weights={"old": 0.25, "new": 0.75}, batch_size=8)

Each source's rows come in its own order, as they would without the others, from its first; only
which rows are its own depends on the weights. Sources are spread evenly: of any n rows in a row a
source of share p has n p to within one for two sources, so a batch of 8 with a quarter of old rows
has 2 of them. A mixture has no state but the number of the next step: it is resumed, and shared by
hosts, as any other data set is.

Replay of old data while new data are trained on is a mixture too: a share x of old rows replaces as
many new ones, so that the steps cost the same (Ibrahim et al. 2024, arXiv 2403.08763, section 3).
"""

import fractions
from collections.abc import Mapping

import numpy as np

from tilescan.data.batches import Batch, BatchDataset, check_sizes, host_rows
from tilescan.data.pipelines import LmRows


def exact(weight: float | fractions.Fraction) -> fractions.Fraction:
    """Returns a number as it is written: 0.1 is a tenth."""
    return weight if isinstance(weight, fractions.Fraction) else fractions.Fraction(str(weight))


class Shares:
    """Which source a row is of, by shares of rows.

    Args:
      weights: {source: its weight}, above 0; shares of rows, or tokens of each source, in any unit.
        The first is spread most evenly.

    Raises:
      ValueError: no weights, or one that is not above 0 and finite.
    """

    def __init__(self, weights: Mapping[str, float | fractions.Fraction]):
        if not weights:
            raise ValueError("weights is empty: a mixture needs at least one source")
        for name, weight in weights.items():
            if not 0 < weight < np.inf:
                raise ValueError(f"weights[{name!r}]={weight} must be above 0 and finite")
        found = [exact(weight) for weight in weights.values()]
        self.names = list(weights)
        self.shares = {n: float(w / sum(found)) for n, w in zip(weights, found, strict=True)}
        # Of the rows that no earlier source has, the share that is each source's.
        self._of_rest = [w / sum(found[i:]) for i, w in enumerate(found)]

    def place(self, row: int) -> tuple[str, int]:
        """Returns the source of a row, and how many rows of that source came before."""
        for name, share in zip(self.names, self._of_rest, strict=True):
            before = row * share.numerator // share.denominator
            if (row + 1) * share.numerator // share.denominator > before:
                return name, before
            row -= before
        raise AssertionError("the last source has all that is left")


def mixture_dataset(
    parts: Mapping[str, LmRows],
    weights: Mapping[str, float | fractions.Fraction],
    *,
    batch_size: int,
    shard_index: int = 0,
    shard_count: int = 1,
    first_batch: int = 0,
) -> BatchDataset:
    """Makes endless batches of a mixture, as `pipelines.lm_dataset` makes those of one corpus.

    Args:
      parts: {source: its rows}, of one tokenizer and length. A source that is read to its end
        begins another epoch, in another order where it is shuffled.
      weights: {source: its weight}, see `Shares`.
      batch_size: B of all hosts together.
      shard_index, shard_count: of this host.
      first_batch: the number of the first batch; those before are left out.

    Raises:
      ValueError: parts and weights of different names, parts of different tokenizers or lengths, or
        sizes that `lm_dataset` refuses.
    """
    if set(parts) != set(weights):
        raise ValueError(f"parts are of {sorted(parts)}, weights of {sorted(weights)}")
    shares = Shares(weights)
    one = next(iter(parts.values()))
    for name, rows in parts.items():
        for field in ("seq_len", "tokenizer", "vocab_size"):
            if getattr(rows, field) != getattr(one, field):
                raise ValueError(
                    f"parts[{name!r}] has {field} {getattr(rows, field)!r}, and "
                    f"{next(iter(parts))!r} has {getattr(one, field)!r}: a batch needs one"
                )
    check_sizes(one.seq_len, batch_size, 0, shard_index, shard_count, None)
    if first_batch < 0:
        raise ValueError(f"first_batch={first_batch} must be at least 0")

    def make(step: int) -> Batch:
        places = [
            shares.place(row)
            for row in host_rows(step + first_batch, batch_size, shard_index, shard_count)
        ]
        batch: Batch = {}
        for name in {name for name, _ in places}:
            at = [i for i, (of, _) in enumerate(places) if of == name]
            found = parts[name].batch([places[i][1] for i in at])
            for key, values in found.items():
                shape = (len(places), *values.shape[1:])
                batch.setdefault(key, np.empty(shape, values.dtype))[at] = values
        return batch

    fingerprint = {
        "batch_size": batch_size,
        "first_batch": first_batch,
        "weights": [[name, shares.shares[name]] for name in shares.names],
        **{f"source {name}": dict(rows.fingerprint) for name, rows in parts.items()},
    }
    return BatchDataset(make, None, fingerprint, one.vocab_size)
