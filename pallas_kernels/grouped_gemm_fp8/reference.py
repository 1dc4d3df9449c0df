"""Grouped GEMM in fp8 in plain jnp: the dequantised operands multiplied in float32.

R rows, K contracted width, N output width, G groups, A = K / 128, B = N / 128 blocks.
"""

from typing import Any

import jax

from pallas_kernels.grouped_gemm import reference as grouped
from pallas_kernels.grouped_gemm_fp8.quantize import dequantize_rows, dequantize_weights


def grouped_gemm_fp8(
    lhs_RK: jax.Array,
    lhs_scales_RA: jax.Array,
    rhs_GNK: jax.Array,
    rhs_scales_GBA: jax.Array,
    group_sizes_G: jax.Array,
    *,
    dtype: Any,
) -> jax.Array:
    """lhs times each row's matrix, transposed, in `dtype`."""
    lhs_RK = dequantize_rows(lhs_RK, lhs_scales_RA)
    rhs_GNK = dequantize_weights(rhs_GNK, rhs_scales_GBA)
    with jax.default_matmul_precision("highest"):  # GPUs round float32 operands otherwise
        return grouped.product(lhs_RK, rhs_GNK, group_sizes_G, dtype=dtype, transposed=True)
