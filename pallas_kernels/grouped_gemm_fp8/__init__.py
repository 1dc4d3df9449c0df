"""Grouped matrix product in fp8 with scales by block, forward only.

The scheme is DeepSeek-V3's (arXiv 2412.19437, section 3.3): e4m3 numbers, a float32 scale for 128
numbers of a row and for 128x128 of a weight.

R rows, K contracted width, N output width, G groups, A = K / 128, B = N / 128 blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _common
from pallas_kernels.grouped_gemm_fp8 import reference
from pallas_kernels.grouped_gemm_fp8.quantize import (
    BLOCK,
    FP8,
    quantize_rows,
    quantize_weights,
    require_blocks,
)

__all__ = ["BLOCK", "FP8", "grouped_gemm_fp8", "quantize_rows", "quantize_weights"]

_OUT_DTYPES = (jnp.bfloat16, jnp.float32)


def _mosaic(*operands: jax.Array, dtype: Any) -> jax.Array:
    from pallas_kernels.grouped_gemm_fp8 import mosaic  # Pallas is only imported where it is used

    return mosaic.grouped_gemm_fp8(*operands, dtype=dtype)


_IMPLEMENTATIONS = {
    "reference": _common.Implementation(reference.grouped_gemm_fp8),
    "mosaic": _common.Implementation(_mosaic),
}


def grouped_gemm_fp8(
    lhs_RK: jax.Array,
    lhs_scales_RA: jax.Array,
    rhs_GNK: jax.Array,
    rhs_scales_GBA: jax.Array,
    group_sizes_G: jax.Array,
    *,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """out[r, n] = sum over blocks a of K of lhs_scales[r, a] * rhs_scales[g, n's block, a] *
    (lhs[r] . rhs[g, n] within a), where g is the group of r as in `grouped_gemm`.

    The product of a block of 128 runs in the tensor cores, whose sums of fp8 products keep about 14
    bits on Hopper; blocks are scaled and added in float32 outside of them. "reference" multiplies
    the dequantised operands in float32. Rows past sum(group_sizes) are zero in the result, whatever
    they hold (NaN included). Has no gradient.

    Args:
      lhs_RK: float8_e4m3fn rows, sorted by group; `quantize_rows` makes them and their scales.
      lhs_scales_RA: float32, one for 128 numbers of a row.
      rhs_GNK: float8_e4m3fn, one matrix per group, output by input as in HuggingFace's fp8 files:
        fp8 tensor cores read both operands along K. `quantize_weights` makes it and its scales.
      rhs_scales_GBA: float32, one for 128x128 numbers (`weight_scale_inv` of those files).
      group_sizes_G: rows per group, integers >= 0 whose sum is at most R (not checked: values are
        traced).
      out_dtype: of the result: bfloat16 (also None) or float32.
      implementation: "reference"; "mosaic" for Hopper; None for "mosaic" on Hopper, "reference"
        elsewhere.

    Returns:
      [R, N] in `out_dtype`.

    Raises:
      ValueError: shapes or dtypes don't fit, K or N is no multiple of 128, the implementation is
        not available, or a gradient is asked for.
    """
    name = "grouped_gemm_fp8"
    _common.require_rank(name, 2, lhs_RK=lhs_RK, lhs_scales_RA=lhs_scales_RA)
    _common.require_rank(name, 3, rhs_GNK=rhs_GNK, rhs_scales_GBA=rhs_scales_GBA)
    _common.require_rank(name, 1, group_sizes_G=group_sizes_G)
    _common.require_integer(name, group_sizes_G=group_sizes_G)
    (rows, contract), (groups, width, contracted) = lhs_RK.shape, rhs_GNK.shape
    _common.require(
        contract == contracted,
        f"{name}: lhs_RK is {contract} wide, rhs_GNK contracts {contracted}",
    )
    _common.require(
        groups == group_sizes_G.shape[0] > 0,
        f"{name}: rhs_GNK has {groups} groups, group_sizes_G {group_sizes_G.shape[0]}; both must "
        "be the same, at least 1",
    )
    require_blocks(name, K=contract, N=width)
    blocks, scales = contract // BLOCK, jnp.dtype(jnp.float32)
    for operand, array, shape, dtype in (
        ("lhs_RK", lhs_RK, (rows, contract), FP8),
        ("lhs_scales_RA", lhs_scales_RA, (rows, blocks), scales),
        ("rhs_GNK", rhs_GNK, (groups, width, contract), FP8),
        ("rhs_scales_GBA", rhs_scales_GBA, (groups, width // BLOCK, blocks), scales),
    ):
        _common.require(
            array.shape == shape and array.dtype == dtype,
            f"{name}: {operand} is {array.dtype}{list(array.shape)}, expected {dtype}{list(shape)}",
        )
    out_dtype = _common.choose_dtype(name, out_dtype, _OUT_DTYPES)
    run = _common.choose(name, implementation, _IMPLEMENTATIONS)
    operands = _common.vary_together(lhs_RK, lhs_scales_RA, rhs_GNK, rhs_scales_GBA, group_sizes_G)
    run = functools.partial(run, dtype=out_dtype)
    return _common.inference_only(f"{name}: has no gradient", run, *operands)
