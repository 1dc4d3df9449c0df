"""The operator in plain jnp."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._common import accumulation_dtype


def skinny_gemm(
    x_MK: jax.Array,
    matrices: tuple[jax.Array, ...],
    *,
    out_dtype: Any,
    summed: bool,
) -> tuple[jax.Array, ...]:
    """x w of every matrix, rounded once, or as a single term."""
    wide = accumulation_dtype(x_MK.dtype)
    products = tuple(jnp.matmul(x_MK, w_KN, preferred_element_type=wide) for w_KN in matrices)
    return tuple(product.astype(out_dtype) if summed else product[None] for product in products)
