"""Cases of grouped_gemm_fp8 for tests/kernels/interpreted.py."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels import grouped_gemm_fp8, quantize_rows, quantize_weights
from pallas_kernels.grouped_gemm.schedule import Tiling
from pallas_kernels.grouped_gemm_fp8 import mosaic, quantize
from tests.kernels import helpers


class Case(NamedTuple):
    """Rows [rows, contract] times one matrix [width, contract] per group."""

    rows: int
    contract: int
    width: int
    sizes: tuple[int, ...]
    out_dtype: str = "bfloat16"
    orders: tuple[int, int] = (-12, 12)
    """First and past-the-last power of two that blocks are multiplied by."""


FEW_ORDERS = -2, 3
"""Small blocks of a sum count too."""
CASES = {
    # More steps than stages, and a tile's second half past the last column.
    "uneven": Case(108, 640, 128, (67, 0, 1, 20)),
    "unaligned": Case(160, 128, 384, (7, 9, 133), "float32"),
    "no rows": Case(40, 256, 128, (0, 0)),
    "few orders": Case(72, 384, 256, (40, 25), "float32", FEW_ORDERS),
}


def operands(case: Case) -> tuple[Any, ...]:
    """Values and scales of both sides, and group sizes; NaN past the sum of the sizes."""
    rng = np.random.default_rng(5)
    block, total = quantize.BLOCK, sum(case.sizes)

    def orders(*shape: int) -> np.ndarray:
        return 2.0 ** rng.integers(*case.orders, shape)

    x = rng.standard_normal((case.rows, case.contract))
    x *= np.repeat(orders(case.rows, case.contract // block), block, axis=1)
    w = rng.standard_normal((len(case.sizes), case.width, case.contract))
    scales = orders(len(case.sizes), case.width // block, case.contract // block)
    w *= np.repeat(np.repeat(scales, block, axis=1), block, axis=2)
    lhs, lhs_scales = quantize_rows(jnp.asarray(x, jnp.float32))
    rhs, rhs_scales = quantize_weights(jnp.asarray(w, jnp.float32))
    lhs, lhs_scales = lhs.at[total:].set(jnp.nan), lhs_scales.at[total:].set(jnp.nan)
    return lhs, lhs_scales, rhs, rhs_scales, jnp.asarray(case.sizes, jnp.int32)


def exact(case: Case, operands: tuple[Any, ...]) -> np.ndarray:
    """Product of the dequantised operands in float64."""
    lhs, lhs_scales, rhs, rhs_scales, _ = (np.asarray(a).astype(np.float64) for a in operands)
    block = quantize.BLOCK
    lhs = lhs * np.repeat(lhs_scales, block, axis=1)
    rhs = rhs * np.repeat(np.repeat(rhs_scales, block, axis=1), block, axis=2)
    out, end = np.zeros((case.rows, case.width)), np.cumsum(case.sizes)
    for g, size in enumerate(case.sizes):
        part = slice(end[g] - size, end[g])
        out[part] = lhs[part] @ rhs[g].T
    return out


def worst_error(actual: Any, expected: np.ndarray, rows: int) -> float:
    """Largest relative error of the first rows' blocks of 128 columns, each by its norm: another
    row's or block's scale hides none.
    """

    def norms(array: np.ndarray) -> np.ndarray:
        blocks = array[:rows].reshape(rows, array.shape[1] // quantize.BLOCK, quantize.BLOCK)
        return np.linalg.norm(blocks, axis=2)

    assert actual.shape == expected.shape
    errors = norms(np.asarray(actual, np.float64) - expected) / norms(expected)
    return float(errors.max(initial=0))


def fp8(case: Case, implementation: str) -> dict[str, Any]:
    """Worst error against float64, and what rows past the sum get; of float32, 0 if CTAs paired the
    other way give the same bits.
    """
    arrays = operands(case)
    out = grouped_gemm_fp8(*arrays, out_dtype=case.out_dtype, implementation=implementation)
    result = {
        "out": worst_error(out, exact(case, arrays), sum(case.sizes)),
        "tail": float(np.abs(np.asarray(out[sum(case.sizes) :], np.float64)).sum()),
    }
    if implementation == "mosaic" and case.out_dtype == "float32":
        tiling = Tiling(panel=4, pair="rows")
        other = mosaic.grouped_gemm_fp8(*arrays, dtype=jnp.float32, tiling=tiling)
        result["pairs"] = 0.0 if helpers.same_bits(out, other) else 1.0
    return result
