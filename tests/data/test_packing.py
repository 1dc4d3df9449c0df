import numpy as np
import pytest

from longcat_jax.data.packing import PackedRows, pack_all, target_pairs, to_batch


def documents_of(seed: int) -> list[np.ndarray]:
    """Documents whose tokens are all different: 1000 x number + place."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([rng.integers(1, 60, 17), [2, 7, 7, 190]])
    return [1000 * (i + 1) + np.arange(n, dtype=np.int32) for i, n in enumerate(lengths)]


def pack(documents: list[np.ndarray], length: int) -> PackedRows:
    return PackedRows(documents, np.array([len(d) for d in documents]), length=length)


@pytest.mark.parametrize(("seed", "length"), [(0, 2), (1, 8), (2, 20), (3, 333), (4, 5000)])
def test_segments_put_together_are_the_documents(seed: int, length: int) -> None:
    documents = documents_of(seed)
    restored: list[int] = []
    for batch in pack_all(pack(documents, length), rows=3):
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            row = tokens[segments > 0].tolist()
            # A row's first token is the last one of the row before.
            assert not restored or not row or restored[-1] == row[0]
            restored += row[1:] if restored else row
    assert restored == np.concatenate(documents).tolist()


@pytest.mark.parametrize(("seed", "length"), [(0, 2), (1, 8), (2, 20), (3, 333)])
def test_every_token_but_the_first_is_a_target_once(seed: int, length: int) -> None:
    documents = documents_of(seed)
    pairs = [target_pairs(batch) for batch in pack_all(pack(documents, length), rows=4)]
    previous, following = map(np.concatenate, zip(*pairs, strict=True))
    assert sorted(following) == sorted(t for document in documents for t in document[1:])
    np.testing.assert_array_equal(previous + 1, following)  # so none crosses documents


@pytest.mark.parametrize("phase", [0, 1, 5, 6])
def test_a_training_epoch_repeats_no_target_and_misses_less_than_a_row(phase: int) -> None:
    documents, length = documents_of(5), 8
    packed = pack(documents, length)
    batch = to_batch([packed.row(i, phase=phase) for i in range(packed.full_rows)])
    previous, following = target_pairs(batch)
    assert (batch["segment_ids"] > 0).all()
    np.testing.assert_array_equal(previous + 1, following)
    assert len(set(following.tolist())) == len(following)
    missing = sum(len(d) - 1 for d in documents) - len(following)
    assert 0 <= missing < length


def test_segments_and_positions_restart_with_each_document() -> None:
    documents = documents_of(6)
    batch = to_batch([pack(documents, 41).row(i) for i in range(9)])
    for tokens, segments, positions in zip(*batch.values(), strict=True):
        owner = tokens // 1000
        changes = np.flatnonzero(np.diff(owner)) + 1
        assert segments.tolist() == (1 + np.searchsorted(changes, np.arange(41), "right")).tolist()
        starts = np.concatenate([[0], changes])
        assert positions.tolist() == (np.arange(41) - starts[segments - 1]).tolist()


def test_last_batch_is_padded_with_segment_zero() -> None:
    batches = list(pack_all(pack([np.arange(5, 16, dtype=np.int32)], 7), rows=3))
    assert [b["tokens"].shape for b in batches] == [(3, 7)]
    assert batches[0]["segment_ids"].tolist() == [[1] * 7, [1] * 5 + [0] * 2, [0] * 7]
    assert batches[0]["tokens"][1].tolist() == [11, 12, 13, 14, 15, 0, 0]
    assert batches[0]["positions"][1].tolist() == [0, 1, 2, 3, 4, 0, 0]
    assert {value.dtype for value in batches[0].values()} == {np.dtype(np.int32)}


def test_a_corpus_shorter_than_a_row_goes_round() -> None:
    row = pack([np.array([7, 8], np.int32), np.array([9], np.int32)], 8).row(0, phase=1)
    assert row.tolist() == [
        [8, 9, 7, 8, 9, 7, 8, 9],
        [1, 2, 3, 3, 4, 5, 5, 6],
        [0, 0, 0, 1, 0, 0, 1, 0],
    ]


def test_target_pairs_skip_padding_and_edges() -> None:
    batch = {
        "tokens": np.array([[5, 6, 7, 8, 0, 0]]),
        "segment_ids": np.array([[1, 1, 2, 2, 0, 0]]),
    }
    previous, following = target_pairs(batch)
    assert (previous.tolist(), following.tolist()) == ([5, 7], [6, 8])
