"""Windows of long documents as rows of any length, for models that are read beyond their training.

rows = document_windows("python_stdlib", least=4096)
batch = rows("test", count=64, length=4096, key=(0,))
"""

from collections.abc import Callable

import numpy as np

from tilescan.data import sources, splits, tokenizers
from tilescan.data.batches import Batch

# rows(split, count, length, key) -> tokens, targets and weights [count, length]
Rows = Callable[[str, int, int, tuple[int, ...]], Batch]


def document_windows(source: str, least: int) -> Rows:
    """Returns a function that makes rows of a source's documents, in bytes, split by document.

    Every window of a split that is long enough is as likely as any other, given the seed `key`.
    The function raises ValueError where no document is longer than the rows.

    Args:
      source: name of a built-in source.
      least: documents have more bytes than that; shorter ones are left out.
    """
    tokenizer, parts = tokenizers.get_tokenizer("byte"), {}
    for split, documents in splits.split_documents(sources.load(source)).items():
        encoded = [tokenizer.encode(document.text) for document in documents]
        parts[split] = [text for text in encoded if len(text) > least]

    def rows(split: str, count: int, length: int, key: tuple[int, ...]) -> Batch:
        rng = np.random.default_rng(key)
        long = [text for text in parts[split] if len(text) > length]
        if not long:
            raise ValueError(f"{source!r} has no document of more than {length} bytes in {split!r}")
        # A document's share is its number of windows.
        shares = np.asarray([len(text) - length for text in long], float)
        windows = []
        for index in rng.choice(len(long), count, p=shares / shares.sum()):
            start = rng.integers(0, len(long[index]) - length)
            windows.append(long[index][start : start + length + 1])
        windows = np.stack(windows).astype(np.int32)
        weights = np.ones((count, length), np.float32)
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:], "weights": weights}

    return rows
