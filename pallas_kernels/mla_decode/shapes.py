"""Shapes of absorbed decode that tests and benchmarks share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """q [batch, tokens, heads, latent + rope] over a cache [batch, entries, latent + rope]."""

    batch: int
    tokens: int
    heads: int
    entries: int
    latent: int
    rope: int


PRODUCTION = (
    Shape(64, 1, 64, 4096, 512, 64),
    Shape(64, 1, 64, 32768, 512, 64),
    Shape(64, 2, 64, 32768, 512, 64),
)
LONG = Shape(1, 1, 64, 131072, 512, 64)
QUICKSTART = Shape(4, 1, 4, 256, 32, 8)
