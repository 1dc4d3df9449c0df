"""Grouped matrix product: rows sorted by group, one weight matrix per group.

R rows, K contracted width, N output width, G groups.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _common
from pallas_kernels.grouped_gemm import reference

_DTYPES = (jnp.bfloat16, jnp.float16)  # of the kernels
_MOSAIC_MULTIPLE = 64  # of the widths: a swizzled row of shared memory
_TRITON_MULTIPLE = 8  # of the widths: what a thread loads at a time


def _mosaic(lhs_RK: jax.Array, rhs_GKN: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    from pallas_kernels.grouped_gemm import mosaic  # Pallas is only imported where it is used

    return mosaic.grouped_gemm(lhs_RK, rhs_GKN, group_sizes_G)


def _triton(lhs_RK: jax.Array, rhs_GKN: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    from pallas_kernels.grouped_gemm import triton  # needs the extra [triton]

    return triton.grouped_gemm(lhs_RK, rhs_GKN, group_sizes_G)


def _misfit(lhs_RK: jax.Array, rhs_GKN: jax.Array, *, multiple: int) -> str:
    widths = rhs_GKN.shape[1:]
    if lhs_RK.dtype in _DTYPES and all(w > 0 and w % multiple == 0 for w in widths):
        return ""
    return (
        f"takes bfloat16 or float16 and widths that are multiples of {multiple}, got "
        f"{lhs_RK.dtype}, {widths[0]} and {widths[1]}"
    )


_IMPLEMENTATIONS = {
    "reference": _common.Implementation(reference.grouped_gemm),
    "mosaic": _common.Implementation(
        _mosaic, functools.partial(_misfit, multiple=_MOSAIC_MULTIPLE)
    ),
    "triton": _common.Implementation(
        _triton, functools.partial(_misfit, multiple=_TRITON_MULTIPLE)
    ),
}


def grouped_gemm(
    lhs_RK: jax.Array,
    rhs_GKN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """out[r] = lhs[r] @ rhs[group of r], where the first group_sizes[0] rows are group 0, and so
    on.

    Rows past sum(group_sizes) are zero in the result, take no gradient and give none, whatever they
    hold (NaN included). Sums run in float32 at least. Differentiable in lhs and rhs by reverse
    mode.

    Args:
      lhs_RK: rows, sorted by group.
      rhs_GKN: one matrix per group, dtype of lhs.
      group_sizes_G: rows per group, integers >= 0 whose sum is at most R (not checked: values are
        traced).
      implementation: "reference"; "mosaic" for Hopper, 16-bit dtypes and widths that are multiples
        of 64; "triton" for GPUs since Ampere, 16-bit dtypes and widths that are multiples of 8;
        None for "mosaic" on Hopper and "triton" on GPUs before it where they take the operands,
        "reference" elsewhere.

    Returns:
      [R, N] in the dtype of lhs.

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "grouped_gemm"
    _common.require_rank(name, 2, lhs_RK=lhs_RK)
    _common.require_rank(name, 3, rhs_GKN=rhs_GKN)
    _common.require_rank(name, 1, group_sizes_G=group_sizes_G)
    _common.require_float(name, lhs_RK=lhs_RK, rhs_GKN=rhs_GKN)
    _common.require_integer(name, group_sizes_G=group_sizes_G)
    _common.require(
        lhs_RK.shape[1] == rhs_GKN.shape[1],
        f"{name}: lhs_RK is {lhs_RK.shape[1]} wide, rhs_GKN contracts {rhs_GKN.shape[1]}",
    )
    _common.require(
        rhs_GKN.shape[0] == group_sizes_G.shape[0] > 0,
        f"{name}: rhs_GKN has {rhs_GKN.shape[0]} groups, group_sizes_G {group_sizes_G.shape[0]}; "
        "both must be the same, at least 1",
    )
    run = _common.choose(name, implementation, _IMPLEMENTATIONS, lhs_RK, rhs_GKN)
    return run(*_common.vary_together(lhs_RK, rhs_GKN, group_sizes_G))
