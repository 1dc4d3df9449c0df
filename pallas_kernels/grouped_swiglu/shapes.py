"""Shapes of the experts' SwiGLU that tests and benchmarks share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """wide [rows, 2 width], of which `used` rows belong to an expert."""

    rows: int
    used: int
    width: int


PRODUCTION = (Shape(98304, 65536, 1024), Shape(98304, 65536, 2048))
