"""Grouped matrix product: rows sorted by group, one weight matrix per group.

R rows, K contracted width, N output width, G groups.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _common
from pallas_kernels.grouped_gemm import reference

_DTYPES = (jnp.bfloat16, jnp.float16)  # of the kernels
_MOSAIC_MULTIPLE = 64  # of the widths: a swizzled row of shared memory
_TRITON_MULTIPLE = 8  # of the widths: what a thread loads at a time


# Every implementation is a module with two functions, `product` and `weight_gradient`. What it
# imports beside jax is only imported where it is used.
def _mosaic() -> ModuleType:
    from pallas_kernels.grouped_gemm import mosaic

    return mosaic


def _triton() -> ModuleType:
    from pallas_kernels.grouped_gemm import triton  # needs the extra [triton]

    return triton


def _misfit(dtype: Any, widths: tuple[int, int], *, multiple: int) -> str:
    if dtype in _DTYPES and all(w > 0 and w % multiple == 0 for w in widths):
        return ""
    return (
        f"takes bfloat16 or float16 and widths that are multiples of {multiple}, got {dtype}, "
        f"{widths[0]} and {widths[1]}"
    )


_IMPLEMENTATIONS = {
    "reference": _common.Implementation(lambda: reference),
    "mosaic": _common.Implementation(
        _mosaic, functools.partial(_misfit, multiple=_MOSAIC_MULTIPLE)
    ),
    "triton": _common.Implementation(
        _triton, functools.partial(_misfit, multiple=_TRITON_MULTIPLE)
    ),
}


def _out_dtype(name: str, operand: Any, out_dtype: Any) -> jnp.dtype:
    """The dtype of the result: that of the operands, or the one sums run in."""
    allowed = jnp.dtype(operand), _common.accumulation_dtype(operand)
    return _common.choose_dtype(name, out_dtype, allowed, f" does not fit {allowed[0]} operands")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_gemm(
    lhs_RK: jax.Array,
    rhs_GKN: jax.Array,
    group_sizes_G: jax.Array,
    passes: ModuleType,
    out_dtype: jnp.dtype,
) -> jax.Array:
    return passes.product(lhs_RK, rhs_GKN, group_sizes_G, dtype=out_dtype)


def _forward(
    lhs_RK: jax.Array,
    rhs_GKN: jax.Array,
    group_sizes_G: jax.Array,
    passes: ModuleType,
    out_dtype: jnp.dtype,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    out_RN = _grouped_gemm(lhs_RK, rhs_GKN, group_sizes_G, passes, out_dtype)
    return out_RN, (lhs_RK, rhs_GKN, group_sizes_G)


def _backward(
    passes: ModuleType,
    out_dtype: jnp.dtype,
    residuals: tuple[jax.Array, jax.Array, jax.Array],
    dout_RN: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
    lhs_RK, rhs_GKN, group_sizes_G = residuals
    dtype = lhs_RK.dtype
    dout_RN = dout_RN.astype(dtype)
    dlhs_RK = passes.product(dout_RN, rhs_GKN, group_sizes_G, dtype=dtype, transposed=True)
    return dlhs_RK, passes.weight_gradient(lhs_RK, dout_RN, group_sizes_G, dtype=dtype), None


_grouped_gemm.defvjp(_forward, _backward)


def grouped_gemm(
    lhs_RK: jax.Array,
    rhs_GKN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """out[r] = lhs[r] @ rhs[group of r], where the first group_sizes[0] rows are group 0, and so
    on.

    Rows past sum(group_sizes) are zero in the result, take no gradient and give none, whatever they
    hold (NaN included). Sums run in float32 at least. Differentiable in lhs and rhs by reverse
    mode; the gradient of the result is rounded to the dtype of lhs before it is multiplied.

    Args:
      lhs_RK: rows, sorted by group.
      rhs_GKN: one matrix per group, dtype of lhs.
      group_sizes_G: rows per group, integers >= 0 whose sum is at most R (not checked: values are
        traced).
      out_dtype: of the result: the dtype of lhs (also None), or the one its sums run in.
      implementation: "reference"; "mosaic" for Hopper, 16-bit dtypes and widths that are multiples
        of 64; "triton" for GPUs since Ampere, 16-bit dtypes and widths that are multiples of 8;
        None for "mosaic" on Hopper and "triton" on GPUs before it where they take the operands,
        "reference" elsewhere.

    Returns:
      [R, N] in `out_dtype`.

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
    out_dtype = _out_dtype(name, lhs_RK.dtype, out_dtype)
    passes = _common.choose(
        name, implementation, _IMPLEMENTATIONS, lhs_RK.dtype, rhs_GKN.shape[1:]
    )()
    arrays = _common.vary_together(lhs_RK, rhs_GKN, group_sizes_G)
    return _grouped_gemm(*arrays, passes, out_dtype)


def grouped_gemm_weight_gradient(
    lhs_RK: jax.Array,
    dout_RN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    accumulate_GKN: jax.Array | None = None,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """sum over each group's rows r of outer(lhs[r], dout[r]), added to `accumulate_GKN` if given.

    The gradient to rhs of `grouped_gemm(lhs, rhs, group_sizes)`, for callers that sum gradients of
    several micro-batches in float32. With "mosaic" no pass of its own adds them (except inside
    shard_map): they are added in the memory of `accumulate_GKN`, which is copied first if it is
    used afterwards. Not differentiable.

    Args:
      lhs_RK: rows, sorted by group.
      dout_RN: gradient of the product, dtype of lhs.
      group_sizes_G: as for `grouped_gemm`; rows past their sum give nothing, whatever they hold.
      accumulate_GKN: what the result is added to, in the dtype that sums run in.
      out_dtype: of the result: the dtype of lhs, or the one its sums run in. None for the latter
        with `accumulate_GKN`, for the former without.
      implementation: as for `grouped_gemm`.

    Returns:
      [G, K, N] in `out_dtype`.

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "grouped_gemm_weight_gradient"
    _common.require_rank(name, 2, lhs_RK=lhs_RK, dout_RN=dout_RN)
    _common.require_rank(name, 1, group_sizes_G=group_sizes_G)
    _common.require_float(name, lhs_RK=lhs_RK, dout_RN=dout_RN)
    _common.require_integer(name, group_sizes_G=group_sizes_G)
    _common.require(
        lhs_RK.shape[0] == dout_RN.shape[0],
        f"{name}: lhs_RK has {lhs_RK.shape[0]} rows, dout_RN {dout_RN.shape[0]}",
    )
    _common.require(group_sizes_G.shape[0] > 0, f"{name}: group_sizes_G is empty")
    widths = lhs_RK.shape[1], dout_RN.shape[1]
    arrays = lhs_RK, dout_RN, group_sizes_G
    if accumulate_GKN is not None:
        sums, shape = _common.accumulation_dtype(lhs_RK.dtype), (group_sizes_G.shape[0], *widths)
        _common.require(
            accumulate_GKN.shape == shape and accumulate_GKN.dtype == sums,
            f"{name}: accumulate_GKN is {accumulate_GKN.dtype}{list(accumulate_GKN.shape)}, "
            f"expected {sums}{list(shape)}",
        )
        _common.require(
            out_dtype is None or out_dtype == sums,
            f"{name}: out_dtype={out_dtype} with accumulate_GKN, expected {sums} or None",
        )
        out_dtype, arrays = sums, (*arrays, accumulate_GKN)
    out_dtype = _out_dtype(name, lhs_RK.dtype, out_dtype)
    passes = _common.choose(name, implementation, _IMPLEMENTATIONS, lhs_RK.dtype, widths)()
    lhs_RK, dout_RN, group_sizes_G, *accumulate = _common.vary_together(*arrays)
    return passes.weight_gradient(
        lhs_RK, dout_RN, group_sizes_G, dtype=out_dtype, accumulate_GKN=next(iter(accumulate), None)
    )
