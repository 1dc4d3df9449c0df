"""What a model must beat: unigram, add-k bigram and `xz -9`, in bits per byte of validation text.

The n-gram models are fitted on the very tokens that training saw, and smoothed in their favour: k
is chosen on the validation text itself. They count the targets that the model's loss counts; the
bits of all targets are divided by the bytes of text behind them (0 for an end of document).
"""

import dataclasses
import lzma
from collections.abc import Iterable

import numpy as np

from longcat_jax.data import target_pairs

BASELINES_FILE = "baselines.json"
"""In a workdir: what `longcat evaluate --baselines` found."""
SMOOTHING = tuple(float(k) for k in np.logspace(-5, 1, 25))
"""Values of k tried."""
MERGE_PAIRS = 2**21
"""Pairs sorted into the counts at a time."""


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Bits per byte of validation text, and the k that each n-gram model had."""

    unigram: float
    bigram: float
    xz: float
    unigram_k: float
    bigram_k: float


class PairCounts:
    """How often each (token, next token) occurred, over many batches, in sparse form."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._keys = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)

    def add(self, previous: np.ndarray, following: np.ndarray) -> None:
        """Counts pairs, two int arrays of one length."""
        keys = np.concatenate(
            [self._keys, previous.astype(np.int64) * self._vocab_size + following]
        )
        counts = np.concatenate([self._counts, np.ones(len(previous), np.int64)])
        self._keys, inverse = np.unique(keys, return_inverse=True)
        self._counts = np.bincount(inverse, counts, len(self._keys)).astype(np.int64)

    def of(self, previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        """Counts of the given pairs."""
        if not len(self._keys):
            return np.zeros(len(previous), np.int64)
        keys = previous.astype(np.int64) * self._vocab_size + following
        index = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[index] == keys, self._counts[index], 0)

    def marginals(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts of each token as first and as second of a pair, int64 [vocab_size] each."""
        first, second = np.divmod(self._keys, self._vocab_size)
        size = self._vocab_size
        return tuple(
            np.bincount(tokens, self._counts, size).astype(np.int64) for tokens in (first, second)
        )


def count_pairs(batches: Iterable[dict[str, np.ndarray]], vocab_size: int) -> PairCounts:
    """Counts of all pairs that the loss counts in the batches."""
    counts = PairCounts(vocab_size)
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    size = 0
    for batch in batches:
        pending.append(target_pairs(batch))
        size += len(pending[-1][0])
        if size >= MERGE_PAIRS:
            counts.add(*map(np.concatenate, zip(*pending, strict=True)))
            pending, size = [], 0
    if pending:
        counts.add(*map(np.concatenate, zip(*pending, strict=True)))
    return counts


def _best(
    hits: np.ndarray, totals: np.ndarray | int, vocab_size: int, *, num_bytes: int
) -> tuple[float, float]:
    """(bits per byte, k) of add-k smoothing p = (hits + k) / (totals + k W) at the best k."""
    scores = []
    for k in SMOOTHING:
        bits = -np.log2((hits + k) / (totals + k * vocab_size)).sum()
        scores.append((float(bits) / num_bytes, k))
    return min(scores)


def measure(
    train_batches: Iterable[dict[str, np.ndarray]],
    validation_batches: Iterable[dict[str, np.ndarray]],
    *,
    vocab_size: int,
    token_bytes: np.ndarray,
    text: bytes,
) -> Baselines:
    """Fits the baselines and measures them.

    Args:
      train_batches: those that training saw, steps 0 to steps - 1.
      validation_batches: those that the model is evaluated on.
      vocab_size: W; smoothing spreads over all of it.
      token_bytes: int [>= every target], bytes of text behind each id.
      text: the validation text, for `xz -9`.

    Raises:
      ValueError: no validation text.
    """
    counts = count_pairs(train_batches, vocab_size)
    pairs = [target_pairs(batch) for batch in validation_batches]
    if not pairs or not text:
        raise ValueError("baselines: the validation data has no text")
    previous, following = map(np.concatenate, zip(*pairs, strict=True))
    num_bytes = int(token_bytes[following].sum())
    if not num_bytes:
        raise ValueError("baselines: the validation data has no text")
    first, second = counts.marginals()
    unigram, unigram_k = _best(
        second[following], int(second.sum()), vocab_size, num_bytes=num_bytes
    )
    bigram, bigram_k = _best(
        counts.of(previous, following), first[previous], vocab_size, num_bytes=num_bytes
    )
    packed = len(lzma.compress(text, preset=9))
    return Baselines(unigram, bigram, 8 * packed / len(text), unigram_k, bigram_k)
