"""Dispatch and combine of the MoE as gathers: rows of tokens out, sums of experts' rows back.

T tokens, K selections per token, R routed rows, D width. `slots_TK` says in which row selection k
of token t stands, `token_of_row_R` is its inverse. All gradients are gathers through the other one.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import _common
from pallas_kernels.gather_combine import reference

_MOSAIC_DTYPES = (jnp.bfloat16, jnp.float16)
_TRITON_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_MOSAIC_MULTIPLE = 128  # of the width
_MOSAIC_WIDEST = 16384  # the rows in flight must fit into shared memory


def _mosaic() -> reference.Transposes:
    from pallas_kernels.gather_combine import mosaic  # Pallas is only imported where it is used

    return mosaic.TRANSPOSES


def _mosaic_misfit(x_TD: jax.Array) -> str:
    width = x_TD.shape[1]
    fits = width % _MOSAIC_MULTIPLE == 0 and 0 < width <= _MOSAIC_WIDEST
    if fits and x_TD.dtype in _MOSAIC_DTYPES:
        return ""
    return (
        f"takes bfloat16 or float16 and widths that are multiples of {_MOSAIC_MULTIPLE} up to "
        f"{_MOSAIC_WIDEST}, got {x_TD.dtype} and {width}"
    )


def _triton() -> reference.Transposes:
    from pallas_kernels.gather_combine import triton  # needs the extra [triton]

    return triton.TRANSPOSES


def _triton_misfit(x_TD: jax.Array) -> str:
    if x_TD.dtype in _TRITON_DTYPES and x_TD.shape[1] > 0:
        return ""
    return (
        "takes bfloat16, float16 or float32 and at least one column, got "
        f"{x_TD.dtype} and {x_TD.shape[1]}"
    )


# A Mosaic kernel for combine's gradient was no faster than XLA's (experiments/LOG.md).
_COMBINE = {"reference": _common.Implementation(reference.gather_combine)}
_TRANSPOSES = {
    "reference": _common.Implementation(lambda: reference.TRANSPOSES),
    "mosaic": _common.Implementation(_mosaic, _mosaic_misfit),
    "triton": _common.Implementation(_triton, _triton_misfit),
}


def gather_combine(
    values_RD: jax.Array,
    slots_TK: jax.Array,
    weights_TK: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """out[t] = sum over k, in order, of weights[t, k] * values[slots[t, k]].

    Args:
      values_RD: rows.
      slots_TK: integer row numbers. A row may be referenced at most once (not checked), else
        gradients to values are wrong. A slot outside [0, R) contributes nothing.
      weights_TK: any floating dtype; products and sums run in float32 at least.
      implementation: None or "reference".

    Returns:
      [T, D] in the dtype of values.

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "gather_combine"
    _common.require_rank(name, 2, values_RD=values_RD, slots_TK=slots_TK, weights_TK=weights_TK)
    _common.require_float(name, values_RD=values_RD)
    _common.require_float(name, weights_TK=weights_TK)
    _common.require_integer(name, slots_TK=slots_TK)
    _common.require(
        slots_TK.shape == weights_TK.shape,
        f"{name}: slots_TK is {slots_TK.shape}, weights_TK {weights_TK.shape}",
    )
    run = _common.choose(name, implementation, _COMBINE)
    if values_RD.size == 0 or slots_TK.size == 0:
        shape = slots_TK.shape[0], values_RD.shape[1]
        return _common.zeros_varying(shape, values_RD.dtype, values_RD, slots_TK, weights_TK)
    slots_TK = _common.bounded(slots_TK, values_RD.shape[0])
    return run(*_common.vary_together(values_RD, slots_TK, weights_TK))


def gather_rows(
    x_TD: jax.Array,
    token_of_row_R: jax.Array,
    slots_TK: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """rows[r] = x[token_of_row[r]], with the gradient taken by gathers: dx[t] = sum over k of
    drows[slots[t, k]].

    Args:
      x_TD: tokens.
      token_of_row_R: integer token of each row; outside [0, T) the row is zero.
      slots_TK: where the rows of token t stand: token_of_row[slots[t, k]] == t, every row of a
        token listed once (not checked). A slot outside [0, R) stands for no row. Used by the
        gradient only.
      implementation: "reference"; "mosaic" for Hopper, 16-bit dtypes and widths that are multiples
        of 128 up to 16384; "triton" for GPUs since Ampere and dtypes up to float32; None for
        "mosaic" on Hopper and "triton" on GPUs before it where they take the operands, "reference"
        elsewhere.

    Returns:
      [R, D] in the dtype of x.

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "gather_rows"
    _require_indices(name, token_of_row_R, slots_TK, x_TD=x_TD)
    _common.require(
        slots_TK.shape[0] == x_TD.shape[0],
        f"{name}: slots_TK has {slots_TK.shape[0]} tokens, x_TD {x_TD.shape[0]}",
    )
    run = _common.choose(name, implementation, _TRANSPOSES, x_TD)().gather_rows
    if x_TD.size == 0 or token_of_row_R.size == 0:
        shape = token_of_row_R.shape[0], x_TD.shape[1]
        return _common.zeros_varying(shape, x_TD.dtype, x_TD, token_of_row_R, slots_TK)
    indices = _bounded(token_of_row_R, slots_TK)
    return run(*_common.vary_together(x_TD, *indices))


def gather_sum(
    values_RD: jax.Array,
    token_of_row_R: jax.Array,
    slots_TK: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """out[t] = sum over k, in order, of values[slots[t, k]]: the transpose of `gather_rows`, whose
    copy of rows is its gradient.

    Args:
      values_RD: rows; sums run in float32 at least.
      token_of_row_R: as for `gather_rows`; used by the gradient only.
      slots_TK: as for `gather_rows`.
      implementation: as for `gather_rows`; of the gradient, XLA sums.

    Returns:
      [T, D] in the dtype of values.

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "gather_sum"
    _require_indices(name, token_of_row_R, slots_TK, values_RD=values_RD)
    rows, (num_rows, width) = token_of_row_R.shape[0], values_RD.shape
    _common.require(
        rows == num_rows, f"{name}: token_of_row_R has {rows} rows, values_RD {num_rows}"
    )
    run = _common.choose(name, implementation, _TRANSPOSES, values_RD)().gather_sum
    if values_RD.size == 0 or slots_TK.size == 0:
        shape = slots_TK.shape[0], width
        return _common.zeros_varying(shape, values_RD.dtype, values_RD, token_of_row_R, slots_TK)
    indices = _bounded(token_of_row_R, slots_TK)
    return run(*_common.vary_together(values_RD, *indices))


def _require_indices(
    name: str, token_of_row_R: jax.Array, slots_TK: jax.Array, **floats: jax.Array
) -> None:
    _common.require_rank(name, 2, **floats, slots_TK=slots_TK)
    _common.require_rank(name, 1, token_of_row_R=token_of_row_R)
    _common.require_float(name, **floats)
    _common.require_integer(name, token_of_row_R=token_of_row_R, slots_TK=slots_TK)


def _bounded(token_of_row_R: jax.Array, slots_TK: jax.Array) -> tuple[jax.Array, jax.Array]:
    num_tokens, num_rows = slots_TK.shape[0], token_of_row_R.shape[0]
    return _common.bounded(token_of_row_R, num_tokens), _common.bounded(slots_TK, num_rows)
