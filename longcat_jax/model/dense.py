"""Products with dense weights. M tokens, D and N widths."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import skinny_gemm

FEW_TOKENS = 64
"""So many, on one device, wait for the weights: those of a decoding step."""


def products(x: jax.Array, *matrices: jax.Array, out_dtype: Any = None) -> tuple[jax.Array, ...]:
    """x w [..., N] of every matrix [D, N], summed in float32 at least.

    Args:
      x: [..., D].
      *matrices: of the dtype of x.
      out_dtype: at least that of x; None: the same.
    """
    M = math.prod(x.shape[:-1])
    if M > FEW_TOKENS or not jax.sharding.get_abstract_mesh().empty:
        return tuple(jnp.matmul(x, w_DN, preferred_element_type=out_dtype) for w_DN in matrices)
    results = skinny_gemm(x.reshape(M, -1), *matrices, out_dtype=out_dtype)
    return tuple(out_MN.reshape(*x.shape[:-1], -1) for out_MN in results)


def dense(x: jax.Array, w_DN: jax.Array, *, out_dtype: Any = None) -> jax.Array:
    """`products` of one matrix."""
    return products(x, w_DN, out_dtype=out_dtype)[0]
