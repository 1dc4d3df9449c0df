import lzma
import math
import time

import numpy as np
import pytest

from longcat_jax import baselines
from longcat_jax.baselines import SMOOTHING, count_pairs, measure

W = 7


def batches_of(seed: int, count: int, *, rows: int = 3, length: int = 11) -> list[dict]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1)
        segments[-1, -4:] = 0
        tokens = (rng.integers(0, W, (rows, length)) ** 2 % W).astype(np.int32)
        made.append({"tokens": tokens, "segment_ids": segments})
    return made


def pairs_by_hand(batches: list[dict]) -> list[tuple[int, int]]:
    return [
        (int(tokens[t]), int(tokens[t + 1]))
        for batch in batches
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True)
        for t in range(len(tokens) - 1)
        if segments[t] == segments[t + 1] != 0
    ]


def test_counts_equal_a_count_by_hand() -> None:
    batches = batches_of(1, 5)
    dense = np.zeros((W, W), int)
    for previous, following in pairs_by_hand(batches):
        dense[previous, following] += 1
    counts = count_pairs(iter(batches), W)
    everything = np.divmod(np.arange(W * W), W)
    assert counts.of(*everything).reshape(W, W).tolist() == dense.tolist()
    first, second = counts.marginals()
    assert first.tolist() == dense.sum(1).tolist()
    assert second.tolist() == dense.sum(0).tolist()


def test_counting_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = batches_of(2, 9)
    everything = np.divmod(np.arange(W * W), W)
    whole = count_pairs(batches, W).of(*everything)
    monkeypatch.setattr(baselines, "MERGE_PAIRS", 40)
    assert count_pairs(batches, W).of(*everything).tolist() == whole.tolist()
    assert whole.sum() == len(pairs_by_hand(batches))


def test_measures_equal_the_formula() -> None:
    train, held = batches_of(3, 6), batches_of(4, 2)
    token_bytes = np.array([0, 0, 0, 2, 3, 5, 1])
    text = b"some text of the validation part " * 9
    result = measure(train, held, vocab_size=W, token_bytes=token_bytes, text=text)
    seen, asked = pairs_by_hand(train), pairs_by_hand(held)
    size = sum(token_bytes[following] for _, following in asked)

    def bits(k: float, order: int) -> float:
        total = 0.0
        for previous, following in asked:
            context = [pair for pair in seen if order == 1 or pair[0] == previous]
            hits = sum(pair[1] == following for pair in context)
            total -= math.log2((hits + k) / (len(context) + k * W))
        return total / size

    assert result.unigram == pytest.approx(min(bits(k, 1) for k in SMOOTHING), rel=1e-12)
    assert result.bigram == pytest.approx(min(bits(k, 2) for k in SMOOTHING), rel=1e-12)
    assert result.unigram == pytest.approx(bits(result.unigram_k, 1), rel=1e-12)
    assert result.bigram == pytest.approx(bits(result.bigram_k, 2), rel=1e-12)
    assert result.xz == 8 * len(lzma.compress(text, preset=9)) / len(text)


def test_a_bigram_source_is_learned() -> None:
    """Each token has two equally likely successors: 1 bit a token, against log2(W) alone."""
    rng = np.random.default_rng(5)

    def walk(rows: int) -> dict:
        tokens = np.zeros((rows, 400), np.int32)
        for t in range(1, 400):
            tokens[:, t] = (2 * tokens[:, t - 1] + rng.integers(0, 2, rows) + 1) % W
        return {"tokens": tokens, "segment_ids": np.ones((rows, 400), np.int32)}

    ones = np.ones(W, np.int32)
    result = measure([walk(40)], [walk(9)], vocab_size=W, token_bytes=ones, text=b"x")
    assert result.bigram == pytest.approx(1, abs=0.01)
    assert result.unigram > 2


def test_no_text() -> None:
    batches, token_bytes = batches_of(6, 1), np.zeros(W, np.int32)
    with pytest.raises(ValueError, match="the validation data has no text"):
        measure(batches, batches, vocab_size=W, token_bytes=token_bytes, text=b"text")
    with pytest.raises(ValueError, match="the validation data has no text"):
        measure(batches, [], vocab_size=W, token_bytes=token_bytes, text=b"text")


def test_a_million_tokens_in_seconds() -> None:
    rng = np.random.default_rng(7)
    tokens = (4096 * rng.random((1000, 1025)) ** 3).astype(np.int32)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
    held = {key: value[:80] for key, value in batch.items()}
    start = time.perf_counter()
    ones = np.ones(4096, np.int32)
    measure([batch], [held], vocab_size=4096, token_bytes=ones, text=b"x")
    assert time.perf_counter() - start < 5
