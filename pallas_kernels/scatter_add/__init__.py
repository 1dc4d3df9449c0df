"""Deterministic scatter-add: rows summed by id, in a fixed order. R rows, D width, N = num_rows."""

import jax

from pallas_kernels import _common
from pallas_kernels.scatter_add import reference

_IMPLEMENTATIONS = {"reference": reference.scatter_add}


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
      implementation: None for the platform's best, or "reference".

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
    return _common.select(name, implementation, _IMPLEMENTATIONS)(values_RD, ids_R, num_rows)
