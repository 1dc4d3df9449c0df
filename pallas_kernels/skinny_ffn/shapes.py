"""Shapes of decoding's gated FFNs that tests and benchmarks share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """x [rows, model], FFN width; experts of which a row selects some, 0 and 0: a dense FFN."""

    rows: int
    model: int
    width: int
    experts: int
    selected: int


PRODUCTION = (
    Shape(1, 2048, 4096, 0, 0),  # mini_2b
    Shape(1, 2048, 1024, 32, 6),
    Shape(16, 2048, 1024, 32, 6),
    Shape(64, 2048, 1024, 32, 6),
    Shape(64, 6144, 12288, 0, 0),  # the released model
    Shape(64, 6144, 2048, 512, 12),
)
