"""Shapes of the scatter-add that tests and benchmarks share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """values [rows, width] summed into [destinations, width]."""

    rows: int
    width: int
    destinations: int


ROUTED = Shape(65536, 6144, 8192)
EMBEDDING = Shape(32768, 6144, 131072)
PRODUCTION = (ROUTED, EMBEDDING)
QUICKSTART = Shape(1024, 96, 4096)
