"""The case of add_norm for tests/kernels/interpreted.py."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import _common
from pallas_kernels.add_norm import Rows
from tests.kernels import helpers

ROWS, EPS = 3, 1e-2


def draws(dtype: Any) -> tuple[Rows, ...]:
    """A base, terms, both; widths that a thread reads at once or doesn't; columns to leave out."""
    rng = np.random.default_rng(6)

    def draw(*shape: int, dtype: Any = dtype) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    wide = _common.accumulation_dtype(dtype)
    return (
        Rows(draw(1024), draw(ROWS, 1024)),
        Rows(draw(128), terms_SMN=draw(1, ROWS, 192, dtype=wide)),
        Rows(draw(768), draw(ROWS, 768), draw(4, ROWS, 768, dtype=wide)),
    )


def add_norm(implementation: str, dtype: Any = "bfloat16") -> dict[str, Any]:
    """Largest errors against float64."""
    several = draws(dtype)
    results = pallas_kernels.add_norm(*several, eps=EPS, implementation=implementation)
    errors: dict[str, list[float]] = {"sums": [], "norms": []}
    for (weight, base, terms), (total, norm) in zip(several, results, strict=True):
        assert total.dtype == norm.dtype == weight.dtype
        exact = 0 if base is None else np.asarray(base, np.float64)
        if terms is not None:
            exact = exact + np.asarray(terms, np.float64).sum(0)[:, : len(weight)]
        size = np.sqrt((exact**2).mean(-1, keepdims=True) + EPS)
        errors["sums"].append(helpers.relative_error(total, exact))
        wanted = exact / size * np.asarray(weight, np.float64)
        errors["norms"].append(helpers.relative_error(norm, wanted))
    return {name: max(found) for name, found in errors.items()}
