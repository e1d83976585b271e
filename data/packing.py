"""From documents of tokens to rows of batches.

A *layout* answers one question: which pieces of which documents stand in row r? Everything else
(tokens, targets, weights, segment ids, positions) follows from the pieces. A layout is a pure
function of (corpus, seed, row), so a pipeline's whole state is the number of the next step.

- `PackedLayout`: an epoch's documents, shuffled, one after another, split into rows of T. No token
  is lost and only the epoch's last row has padding. A document may go over a row's edge; the next
  row starts a segment of its own, for rows are independent.
- `WholeLayout`: documents stay whole where they fit; best-fit decreasing keeps the padding small. A
  document longer than T is split into full rows and a rest.
- `ContiguousLayout`: B lanes; in each lane one whole document after another, and row s+1 of a lane
  goes on where its row s stopped, with the position carried on. For truncated backpropagation and
  long contexts: carry the model's state from step to step.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import heapq
from collections.abc import Sequence

import numpy as np

from tilescan.data.documents import Document
from tilescan.data.tokenizers import Tokenizer

BATCH_DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a document inside a row.

    Attributes:
        document: its index in the corpus.
        begin: its first token in the document.
        length: tokens.
        position: position of the first token; begin where state is carried, else 0.
        segment: segment id in the row, from 1.
        context: leading tokens that are only context: their weights are 0.
    """

    document: int
    begin: int
    length: int
    position: int
    segment: int
    context: int = 0


class TokenizedCorpus:
    """All documents' tokens in one array, an end-of-document token after each.

    Args:
        documents: at least one.
        tokenizer: see `data.tokenizers`.

    Raises:
        ValueError: no documents, two with one id, a text that is not Unicode, or ids outside
            the tokenizer's vocabulary.
        TypeError: ids that are not integers.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer):
        if not documents:
            raise ValueError("documents is empty: a data set needs at least one document")
        ids = [document.id for document in documents]
        if len(set(ids)) != len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"documents holds the id {twice!r} more than once")
        eos = np.asarray([tokenizer.eos_id], np.int32)
        parts = []
        for document in documents:
            try:
                parts += [tokenizer.encode(document.text), eos]
            except ValueError as error:  # not Unicode text
                raise ValueError(f"document {document.id!r}: {error}") from error
        self.tokens = _checked_ids(np.concatenate(parts), tokenizer)
        self.lengths = np.asarray([len(part) + 1 for part in parts[::2]], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self.pad_id = tokenizer.pad_id
        self.ids = ids

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Tokens in all, with the end-of-document tokens."""
        return int(self.tokens.size)

    @functools.cached_property
    def digest(self) -> str:
        """Identifies documents, their order and their tokens."""
        digest = hashlib.blake2b(self.tokens.tobytes(), digest_size=16)
        digest.update(self.lengths.tobytes())
        digest.update("\0".join(self.ids).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def fill(self, rows: Sequence[Sequence[Piece]], seq_len: int) -> dict[str, np.ndarray]:
        """Turns rows of pieces into a batch of arrays [B, T]; what no piece covers is padding.

        The target of a token is the next token of its document. A document's last token has none:
        its weight is 0, as is padding's.
        """
        batch = {
            name: np.zeros((len(rows), seq_len), dtype) for name, dtype in BATCH_DTYPES.items()
        }
        batch["tokens"][:] = self.pad_id
        batch["targets"][:] = self.pad_id
        for row, pieces in enumerate(rows):
            column = 0
            for piece in pieces:
                self._fill_piece(batch, row, column, piece)
                column += piece.length
        return batch

    def _fill_piece(self, batch: dict[str, np.ndarray], row: int, column: int, piece: Piece):
        """Writes a piece into a row of the batch, from a column on."""
        cells = (row, slice(column, column + piece.length))
        first = int(self.starts[piece.document]) + piece.begin
        batch["tokens"][cells] = self.tokens[first : first + piece.length]
        batch["segment_ids"][cells] = piece.segment
        batch["positions"][cells] = np.arange(piece.position, piece.position + piece.length)
        left = int(self.lengths[piece.document]) - piece.begin - 1  # tokens that have a successor
        known = min(piece.length, left)
        batch["targets"][row, column : column + known] = self.tokens[first + 1 : first + 1 + known]
        batch["weights"][row, column + piece.context : column + known] = 1.0


def _checked_ids(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Returns a tokenizer's ids as int32; raises if one, or padding, is outside the vocabulary."""
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"tokenizer {tokenizer.name!r}: encode must give integers, got {ids.dtype}")
    low, high = (int(f([f(ids), tokenizer.pad_id])) for f in (np.min, np.max))
    if low < 0 or high >= tokenizer.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name!r}: ids run from {low} to {high}, with padding's, but its "
            f"vocab_size is {tokenizer.vocab_size}"
        )
    return ids.astype(np.int32)


def epoch_order(count: int, shuffle: bool, seed: int, *key: int) -> np.ndarray:
    """Returns 0..count-1 in order, or in an order of its own for each (seed, key).

    Sorts raw bits: NumPy keeps the bits of a bit generator the same in all versions and on all
    machines, but not what Generator.permutation makes of them.
    """
    if not shuffle:
        return np.arange(count)
    bits = np.random.Philox(np.random.SeedSequence((seed, *key))).random_raw(count)
    return np.argsort(bits, kind="stable")


class PackedLayout:
    """Documents one after another, split into rows. See the module's docstring."""

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int, shuffle: bool):
        self.lengths, self.seq_len, self.seed, self.shuffle = lengths, seq_len, seed, shuffle
        self.total = int(lengths.sum())
        self.rows_per_epoch = -(-self.total // seq_len)
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        documents = epoch_order(len(self.lengths), self.shuffle, self.seed, 0, epoch)
        ends = np.cumsum(self.lengths[documents])
        rows = epoch_order(self.rows_per_epoch, self.shuffle, self.seed, 1, epoch)
        return documents, ends, rows

    def pieces(self, epoch: int, row: int) -> list[Piece]:
        """Returns the pieces of a row, which is counted within its epoch."""
        documents, ends, rows = self._epoch(epoch)
        position = int(rows[row]) * self.seq_len
        stop = min(position + self.seq_len, self.total)
        slot = int(np.searchsorted(ends, position, side="right"))
        pieces = []
        while position < stop:
            document, end = int(documents[slot]), int(ends[slot])
            length = min(end, stop) - position
            begin = position - (end - int(self.lengths[document]))
            pieces.append(Piece(document, begin, length, 0, len(pieces) + 1))
            position, slot = position + length, slot + 1
        return pieces


class WholeLayout:
    """Documents whole where they fit. See the module's docstring."""

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int, shuffle: bool):
        self.seed, self.shuffle = seed, shuffle
        self._bins = _best_fit(lengths, seq_len)
        self.rows_per_epoch = len(self._bins)
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: epoch_order(self.rows_per_epoch, shuffle, seed, 1, epoch)
        )

    def pieces(self, epoch: int, row: int) -> list[Piece]:
        """Returns the pieces of a row, which is counted within its epoch."""
        return self._bins[int(self._epoch(epoch)[row])]


def _best_fit(lengths: np.ndarray, seq_len: int) -> list[list[Piece]]:
    """Packs by best-fit decreasing: a piece goes where least room is left (Johnson et al. 1974)."""
    parts = []
    for document, length in enumerate(lengths.tolist()):
        parts += [(document, b, min(seq_len, length - b)) for b in range(0, length, seq_len)]
    parts.sort(key=lambda part: (-part[2], part[0], part[1]))
    bins: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (free cells, bin), sorted
    for document, begin, length in parts:
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            bins.append([])
            free, index = seq_len, len(bins) - 1
        else:
            free, index = room.pop(at)
        bins[index].append(Piece(document, begin, length, 0, len(bins[index]) + 1))
        if free > length:
            bisect.insort(room, (free - length, index))
    return bins


class ContiguousLayout:
    """B lanes of whole documents. See the module's docstring.

    The next document of the (endlessly repeated) shuffled corpus goes to the lane that is shortest.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        seq_len: int,
        seed: int,
        shuffle: bool,
        lanes: int,
        num_epochs: int | None,
    ):
        self.lengths, self.seq_len, self.seed, self.shuffle = lengths, seq_len, seed, shuffle
        self.num_epochs = num_epochs
        self._epoch = 0
        self._queue: list[int] = []  # rest of the epoch, the next document last
        self._heap = [(0, lane) for lane in range(lanes)]
        self._lanes: list[tuple[list[int], list[int]]] = [([], []) for _ in range(lanes)]

    def _place_next(self) -> bool:
        """Puts one more document into a lane; returns False when the last epoch is over."""
        if not self._queue:
            if self._epoch == self.num_epochs:
                return False
            order = epoch_order(len(self.lengths), self.shuffle, self.seed, 0, self._epoch)
            self._queue = order[::-1].tolist()
            self._epoch += 1
        document = self._queue.pop()
        end, lane = self._heap[0]
        end += int(self.lengths[document])
        documents, ends = self._lanes[lane]
        documents.append(document)
        ends.append(end)
        heapq.heapreplace(self._heap, (end, lane))
        return True

    def steps(self) -> int:
        """Returns the steps until the longest lane ends; needs a finite number of epochs."""
        while self._place_next():
            pass
        return -(-max(end for end, _ in self._heap) // self.seq_len)

    def pieces(self, lane: int, step: int) -> list[Piece]:
        """Returns the pieces of a lane's row of a step; documents are placed as far as needed."""
        position, stop = step * self.seq_len, (step + 1) * self.seq_len
        while self._heap[0][0] < stop and self._place_next():
            pass
        documents, ends = self._lanes[lane]
        slot = bisect.bisect_right(ends, position)
        pieces = []
        while position < stop and slot < len(ends):
            document, end = documents[slot], ends[slot]
            length = min(end, stop) - position
            begin = position - (end - int(self.lengths[document]))
            pieces.append(Piece(document, begin, length, begin, slot + 1))
            position, slot = position + length, slot + 1
        return pieces


def strided_pieces(lengths: np.ndarray, seq_len: int, stride: int) -> list[list[Piece]]:
    """Returns overlapping windows for evaluation: every target is scored once.

    A window starts every `stride` tokens of a document; of each but the first only the targets that
    no earlier window scored count, so each has at least seq_len - stride tokens of context.
    """
    rows = []
    for document, length in enumerate(lengths.tolist()):
        scored, begin = 0, 0
        while scored < length - 1:  # the last token has no target to score
            end = min(begin + seq_len, length)
            rows.append([Piece(document, begin, end - begin, 0, 1, context=scored - begin)])
            scored, begin = end, begin + stride
    return rows
