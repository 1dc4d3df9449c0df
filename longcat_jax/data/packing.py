"""Documents laid end to end and cut into rows of fixed length, with random access to any row.

The documents form a ring of tokens. Row i is T + 1 of them from `phase + i * T` on: neighbouring
rows share a token, the last target of one and the first input of the next, so each token of a
document but its first is a target once an epoch, but for up to T at the end of the ring that fill
no row (others each epoch, as the phase moves). Each piece of a document is a segment of its own,
with positions from 0; attention and targets never cross a segment's edge.
"""

from collections.abc import Iterator, Sequence

import numpy as np

KEYS = ("tokens", "segment_ids", "positions")


class PackedRows:
    """Rows of a source.

    Args:
      documents: random access to int32 token arrays.
      lengths: their lengths, int [documents], each > 0.
      length: T + 1, tokens in a row.
    """

    def __init__(
        self, documents: Sequence[np.ndarray], lengths: np.ndarray, *, length: int
    ) -> None:
        assert len(documents) == len(lengths) > 0 and length >= 2
        self._documents, self._length = documents, length
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._last: tuple[int, np.ndarray] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in the ring."""
        return int(self._ends[-1])

    @property
    def full_rows(self) -> int:
        """Rows of an epoch of training: as many as share no target; at least one."""
        return max(1, self.num_tokens // (self._length - 1))

    @property
    def covering_rows(self) -> int:
        """Rows that hold every target once if the last is padded, for `row(i, wrap=False)`."""
        return max(1, -(-(self.num_tokens - 1) // (self._length - 1)))

    def _document(self, index: int) -> np.ndarray:
        # Neighbouring rows mostly read the same document.
        if self._last is None or self._last[0] != index:
            self._last = index, self._documents[index]
        return self._last[1]

    def row(self, index: int, *, phase: int = 0, wrap: bool = True) -> np.ndarray:
        """int32 [3, T + 1] in the order of KEYS; segments count from 1.

        Args:
          index: which row.
          phase: token of the ring with which row 0 begins.
          wrap: go on with the first document after the last; otherwise what is left is token 0 in
            segment 0.
        """
        start = phase + index * (self._length - 1)
        room = self._length if wrap else min(self._length, self.num_tokens - start)
        start %= self.num_tokens
        document = int(np.searchsorted(self._ends, start, side="right"))
        offset = start - (int(self._ends[document - 1]) if document else 0)
        row = np.zeros((len(KEYS), self._length), np.int32)
        filled = segment = 0
        while filled < room:
            piece = self._document(document)[offset : offset + room - filled]
            segment += 1
            stop = filled + len(piece)
            row[0, filled:stop] = piece
            row[1, filled:stop] = segment
            row[2, filled:stop] = np.arange(len(piece))
            filled, offset, document = stop, 0, (document + 1) % len(self._ends)
        return row


def to_batch(rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Rows [3, T + 1] as a batch: each of KEYS int32 [rows, T + 1]."""
    return {key: np.stack([row[i] for row in rows]) for i, key in enumerate(KEYS)}


def pack_all(packed: PackedRows, *, rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of all documents in order; the last row and batch are filled up with segment 0."""
    for first in range(0, packed.covering_rows, rows):
        last = min(first + rows, packed.covering_rows)
        batch = [packed.row(index, wrap=False) for index in range(first, last)]
        batch += [np.zeros_like(batch[0])] * (rows - len(batch))
        yield to_batch(batch)


def target_pairs(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(input token, target token) of every position that the loss counts, int32 [pairs] each.

    Token t+1 is the target of t where both are in the same segment and that isn't 0.
    """
    tokens, segments = batch["tokens"], batch["segment_ids"]
    counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return tokens[:, :-1][counted], tokens[:, 1:][counted]
