"""Products with dense weights; a decoding step has few tokens and a kernel of its own.

D and N widths.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import skinny_gemm

FEW_TOKENS = 64
"""As a decoding step has."""


def are_few(x: jax.Array) -> bool:
    """Whether so few tokens [..., D], on one device, that a product waits for the weights."""
    return math.prod(x.shape[:-1]) <= FEW_TOKENS and jax.sharding.get_abstract_mesh().empty


def products(x: jax.Array, *matrices: jax.Array, out_dtype: Any = None) -> tuple[jax.Array, ...]:
    """x w [..., N] of every matrix [D, N], summed in float32 at least.

    Args:
      x: [..., D].
      *matrices: of the dtype of x.
      out_dtype: at least that of x; None: the same.
    """
    if not are_few(x):
        return tuple(jnp.matmul(x, w_DN, preferred_element_type=out_dtype) for w_DN in matrices)
    results = skinny_gemm(x.reshape(-1, x.shape[-1]), *matrices, out_dtype=out_dtype)
    return tuple(out_MN.reshape(*x.shape[:-1], -1) for out_MN in results)


def dense(x: jax.Array, w_DN: jax.Array, *, out_dtype: Any = None) -> jax.Array:
    """`products` of one matrix."""
    return products(x, w_DN, out_dtype=out_dtype)[0]
