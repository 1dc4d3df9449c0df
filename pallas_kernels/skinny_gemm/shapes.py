"""Shapes of decoding's products that tests and benchmarks share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """x [rows, contracted] and a matrix of each width."""

    rows: int
    contracted: int
    widths: tuple[int, ...]


PRODUCTION = (
    Shape(1, 2048, (4096, 4096)),  # mini_2b: gate and up
    Shape(16, 4096, (2048,)),  # down
    Shape(64, 2048, (768, 576)),  # down-projections of attention
    Shape(64, 2048, (32768,)),  # unembedding
    Shape(1, 6144, (12288, 12288)),  # the released model: gate and up
    Shape(64, 6144, (1536, 576)),  # down-projections of attention
    Shape(64, 6144, (131072,)),  # unembedding
)
