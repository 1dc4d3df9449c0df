"""Shapes of the grouped GEMM that tests and benchmarks share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """lhs [rows, contract] times [groups, contract, width]."""

    rows: int
    contract: int
    width: int
    groups: int


# The expert products of flash_560b (gate and up, down), fewer rows, and many narrow experts.
PRODUCTION = (
    Shape(32768, 6144, 4096, 16),
    Shape(32768, 2048, 6144, 16),
    Shape(8192, 6144, 4096, 16),
    Shape(65536, 2048, 2048, 64),
)

QUICKSTART = (Shape(4096, 96, 128, 16), Shape(4096, 64, 96, 16))
