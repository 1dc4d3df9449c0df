"""Shapes of dispatch and combine that tests and benchmarks share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """values [tokens * selected, width] combined into [tokens, width]."""

    tokens: int
    selected: int
    width: int


PRODUCTION = (Shape(8192, 8, 6144), Shape(8192, 12, 6144))
QUICKSTART = Shape(1024, 4, 96)
