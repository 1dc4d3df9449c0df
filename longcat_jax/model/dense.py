"""Products with dense weights; a decoding step has few tokens and a kernel of its own.

D and N widths.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from longcat_jax.model.remat import keep
from longcat_jax.sharding import several_devices
from pallas_kernels import skinny_gemm, skinny_swiglu
from pallas_kernels.skinny_gemm import MAX_ROWS


def _few(x: jax.Array) -> bool:
    """Whether so few tokens, in decoding or elsewhere, on one device, that they wait for the
    weights: they go there together.
    """
    return math.prod(x.shape[:-1]) <= MAX_ROWS and not several_devices()


def products(
    x: jax.Array,
    *matrices: jax.Array,
    out_dtype: Any = None,
    summed: bool = True,
) -> tuple[jax.Array, ...]:
    """x w [..., N] of every matrix [D, N].

    Args:
      x: [..., D].
      *matrices: of the dtype of x.
      out_dtype: at least that of x; None: the same.
      summed: False: terms [S, ..., N] of the results in float32 at least, for `add_norm` and
        `absorb_query`.
    """
    if not _few(x):
        dtype = out_dtype if summed else jnp.promote_types(x.dtype, jnp.float32)
        out = tuple(jnp.matmul(x, w_DN, preferred_element_type=dtype) for w_DN in matrices)
        return out if summed else tuple(out_XN[None] for out_XN in out)
    rows, lead = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    out = skinny_gemm(rows, *matrices, out_dtype=out_dtype, summed=summed)
    return tuple(o.reshape(*o.shape[:-2], *lead, o.shape[-1]) for o in out)


def dense(x: jax.Array, w_DN: jax.Array, **options: Any) -> jax.Array:
    """`products` of one matrix."""
    return products(x, w_DN, **options)[0]


def swiglu(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array) -> jax.Array:
    """silu(x gate) * (x up) [..., F]."""
    if not _few(x):
        gate, up = map(keep, products(x, gate_DF, up_DF))
        return jax.nn.silu(gate) * up
    out_MF = skinny_swiglu(x.reshape(-1, x.shape[-1]), gate_DF, up_DF)
    return out_MF.reshape(*x.shape[:-1], out_MF.shape[1])
