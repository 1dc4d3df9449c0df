"""Deterministic scatter-add: rows summed by id, in a fixed order. R rows, D width, N = num_rows."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _common
from pallas_kernels.scatter_add import reference

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)  # of the kernels
_MOSAIC_MULTIPLE = 128  # of the width: one column to a thread


def _mosaic(values_RD: jax.Array, ids_R: jax.Array, num_rows: int) -> jax.Array:
    from pallas_kernels.scatter_add import mosaic  # Pallas is only imported where it is used

    return mosaic.sum_by_id(values_RD, ids_R, num_rows)


def _mosaic_misfit(values_RD: jax.Array) -> str:
    width = values_RD.shape[1]
    if values_RD.dtype in _DTYPES and width > 0 and width % _MOSAIC_MULTIPLE == 0:
        return ""
    return (
        "takes bfloat16, float16 or float32 and widths that are positive multiples of "
        f"{_MOSAIC_MULTIPLE}, got {values_RD.dtype} and {width}"
    )


def _triton(values_RD: jax.Array, ids_R: jax.Array, num_rows: int) -> jax.Array:
    from pallas_kernels.scatter_add import triton  # needs the extra [triton]

    return triton.sum_by_id(values_RD, ids_R, num_rows)


def _triton_misfit(values_RD: jax.Array) -> str:
    if values_RD.dtype in _DTYPES and values_RD.shape[1] > 0:
        return ""
    return (
        "takes bfloat16, float16 or float32 and at least one column, got "
        f"{values_RD.dtype} and {values_RD.shape[1]}"
    )


_IMPLEMENTATIONS = {
    "reference": _common.Implementation(reference.sum_by_id),
    "mosaic": _common.Implementation(_mosaic, _mosaic_misfit),
    "triton": _common.Implementation(_triton, _triton_misfit),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _scatter_add(
    sum_by_id: Callable[..., jax.Array], values_RD: jax.Array, ids_R: jax.Array, num_rows: int
) -> jax.Array:
    return sum_by_id(values_RD, ids_R, num_rows)


def _forward(
    sum_by_id: Callable[..., jax.Array], values_RD: jax.Array, ids_R: jax.Array, num_rows: int
) -> tuple[jax.Array, tuple[jax.Array, np.ndarray]]:
    return sum_by_id(values_RD, ids_R, num_rows), (ids_R, np.empty(0, values_RD.dtype))


def _backward(
    sum_by_id: Callable[..., jax.Array],
    num_rows: int,
    residuals: tuple[jax.Array, np.ndarray],
    dout_ND: jax.Array,
) -> tuple[jax.Array, None]:
    del sum_by_id, num_rows
    ids_R, like_values = residuals
    dvalues_RD = dout_ND.at[ids_R].get(mode="fill", fill_value=0)
    return dvalues_RD.astype(like_values.dtype), None


_scatter_add.defvjp(_forward, _backward)


def scatter_add(
    values_RD: jax.Array,
    ids_R: jax.Array,
    num_rows: int,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """out[n] = sum of values[r] over the rows with ids[r] == n, zero where there is none.

    The order of every sum is a function of ids alone: the same bits on every run, with no scatter
    of floats. The gradient to values is a gather.

    Args:
      values_RD: rows.
      ids_R: integer destination of each row; a row with an id outside [0, num_rows) is dropped.
      num_rows: number of destinations, static.
      implementation: "reference"; "mosaic" for Hopper, dtypes up to float32 and widths that are
        multiples of 128; "triton" for GPUs since Ampere and dtypes up to float32; None for "mosaic"
        on Hopper and "triton" on GPUs before it where they take the operands, "reference"
        elsewhere. The kernels add in one order, the reference in another.

    Returns:
      [num_rows, D] in float32, or float64 for float64 values: the dtype the sums ran in.

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "scatter_add"
    _common.require_rank(name, 2, values_RD=values_RD)
    _common.require_rank(name, 1, ids_R=ids_R)
    _common.require_float(name, values_RD=values_RD)
    _common.require_integer(name, ids_R=ids_R)
    _common.require(
        values_RD.shape[0] == ids_R.shape[0],
        f"{name}: values_RD has {values_RD.shape[0]} rows, ids_R {ids_R.shape[0]}",
    )
    _common.require(num_rows > 0, f"{name}: num_rows is {num_rows}, expected at least 1")
    sum_by_id = _common.choose(name, implementation, _IMPLEMENTATIONS, values_RD)
    if values_RD.size == 0:
        dtype = _common.accumulation_dtype(values_RD.dtype)
        return _common.zeros_varying((num_rows, values_RD.shape[1]), dtype, values_RD, ids_R)
    values_RD, ids_R = _common.vary_together(values_RD, _common.bounded(ids_R, num_rows))
    return _scatter_add(sum_by_id, values_RD, ids_R, num_rows)
