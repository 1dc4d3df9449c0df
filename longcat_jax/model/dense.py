"""Products with dense weights; a decoding step has few tokens and a kernel of its own.

D and N widths.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from longcat_jax.sharding import several_devices
from pallas_kernels import skinny_gemm
from pallas_kernels.skinny_gemm import MAX_ROWS


def products(x: jax.Array, *matrices: jax.Array, out_dtype: Any = None) -> tuple[jax.Array, ...]:
    """x w [..., N] of every matrix [D, N].

    On one device so few tokens as `skinny_gemm` takes wait for the weights: they go there together.

    Args:
      x: [..., D].
      *matrices: of the dtype of x.
      out_dtype: at least that of x; None: the same.
    """
    *lead, D = x.shape
    tokens = math.prod(lead)
    if tokens > MAX_ROWS or several_devices():
        return tuple(jnp.matmul(x, w_DN, preferred_element_type=out_dtype) for w_DN in matrices)
    results = skinny_gemm(x.reshape(tokens, D), *matrices, out_dtype=out_dtype)
    return tuple(out_MN.reshape(*lead, out_MN.shape[1]) for out_MN in results)


def dense(x: jax.Array, w_DN: jax.Array, *, out_dtype: Any = None) -> jax.Array:
    """`products` of one matrix."""
    return products(x, w_DN, out_dtype=out_dtype)[0]
