import numpy as np
import pytest

from longcat_jax.data.shuffle import ROUNDS, permuted


def order(size: int, seed: int) -> list[int]:
    keys = np.random.default_rng(seed).integers(0, 2**63, ROUNDS).tolist()
    return [permuted(i, size, keys) for i in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 17, 64, 65, 1000, 4097])
def test_every_number_once(size: int) -> None:
    assert sorted(order(size, 1)) == list(range(size))


def test_orders_differ_and_look_random() -> None:
    size = 3000
    first, second = np.array(order(size, 1)), np.array(order(size, 2))
    assert (first == second).mean() < 0.01
    for shuffled in (first, second):
        assert (np.abs(np.diff(shuffled)) == 1).mean() < 0.01, "neighbours stay together"
        assert abs(np.corrcoef(shuffled, np.arange(size))[0, 1]) < 0.1
        # Any stretch draws from everywhere: mean of 300 uniform numbers, 5 standard deviations.
        means = shuffled.reshape(10, 300).mean(1)
        assert np.abs(means - size / 2).max() < 5 * size / np.sqrt(12 * 300)


def test_small_sets_take_many_orders() -> None:
    assert len({tuple(order(4, seed)) for seed in range(200)}) > 18
