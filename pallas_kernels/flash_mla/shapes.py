"""Shapes of MLA attention that tests and benchmarks share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """q [batch, tokens, heads, nope + rope], values [batch, tokens, heads, value]."""

    batch: int
    tokens: int
    heads: int
    nope: int
    rope: int
    value: int


PRODUCTION = (Shape(1, 8192, 16, 128, 64, 128), Shape(1, 32768, 16, 128, 64, 128))
QUICKSTART = Shape(8, 128, 4, 16, 8, 16)
