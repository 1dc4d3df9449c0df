"""Shapes the operator must take: tests lower them, experiments/bench/kernels.py times them."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Tokens on a device, and the model's width."""

    rows: int
    width: int


PRODUCTION = (Shape(32_768, 2048), Shape(20_480, 6144))
