"""A seeded order of the numbers below n that needs no memory and no look at earlier ones.

A Feistel network permutes the numbers of an even count of bits; walking it until it gives a number
below n again makes that a permutation of those (Black and Rogaway, 2002, "cycle-walking").
"""

from collections.abc import Sequence

ROUNDS = 4
_MASK = 2**64 - 1


def permuted(index: int, size: int, keys: Sequence[int]) -> int:
    """Place `index` of a permutation of 0 .. size - 1 that the ROUNDS 64-bit `keys` choose."""
    assert 0 <= index < size and len(keys) == ROUNDS
    half = (max(1, (size - 1).bit_length()) + 1) // 2
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for key in keys:
            # The finaliser of splitmix64 as round function.
            mixed = (right ^ key) * 0xBF58476D1CE4E5B9 & _MASK
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & low)
        index = left << half | right
        if index < size:
            return index
