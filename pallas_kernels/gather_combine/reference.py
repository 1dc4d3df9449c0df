"""Dispatch and combine in plain jnp; XLA fuses each into one pass over memory.

Indices are int32 and not negative; those past the end stand for no row.

T tokens, K selections per token, R routed rows, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._common import accumulation_dtype


def _take(x_RD: jax.Array, index_T: jax.Array) -> jax.Array:
    """x[index], zero where the index is past the end."""
    return x_RD.at[index_T].get(mode="fill", fill_value=0)


def _selection_of_row(slots_TK: jax.Array, num_rows: int) -> jax.Array:
    """t * K + k of the selection that references each row, T * K where none does.

    The scatter is of int32 at distinct places, hence exact in any order; it is cheaper than a sort.
    """
    size = slots_TK.size
    return (
        jnp.full(num_rows, size, jnp.int32)
        .at[slots_TK.reshape(size)]
        .set(jnp.arange(size, dtype=jnp.int32), mode="drop")
    )


def _combine(values_RD: jax.Array, slots_TK: jax.Array, weights_TK: jax.Array) -> jax.Array:
    dtype = accumulation_dtype(values_RD.dtype)
    total_TD = jnp.zeros((slots_TK.shape[0], values_RD.shape[1]), dtype)
    for k in range(slots_TK.shape[1]):
        row_TD = _take(values_RD, slots_TK[:, k]).astype(dtype)
        total_TD += weights_TK[:, k, None].astype(dtype) * row_TD
    return total_TD.astype(values_RD.dtype)


@jax.custom_vjp
def gather_combine(values_RD: jax.Array, slots_TK: jax.Array, weights_TK: jax.Array) -> jax.Array:
    """The public operator, arguments already checked."""
    return _combine(values_RD, slots_TK, weights_TK)


def _combine_forward(
    values_RD: jax.Array, slots_TK: jax.Array, weights_TK: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _combine(values_RD, slots_TK, weights_TK), (values_RD, slots_TK, weights_TK)


def _combine_backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array], dout_TD: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
    values_RD, slots_TK, weights_TK = residuals
    num_selected = slots_TK.shape[1]
    dtype = accumulation_dtype(values_RD.dtype)
    selection_R = _selection_of_row(slots_TK, values_RD.shape[0])
    dout_RD = _take(dout_TD, selection_R // num_selected).astype(dtype)
    weight_R = _take(weights_TK.reshape(-1, 1), selection_R).astype(dtype)
    dvalues_RD = (weight_R * dout_RD).astype(values_RD.dtype)
    # The dot of a row with its token's gradient is taken where the row stands, so that values are
    # read once, in order.
    dot_R1 = jnp.sum(values_RD.astype(dtype) * dout_RD, axis=1, keepdims=True)
    dweights_TK = _take(dot_R1, slots_TK.reshape(-1)).reshape(slots_TK.shape)
    return dvalues_RD, None, dweights_TK.astype(weights_TK.dtype)


gather_combine.defvjp(_combine_forward, _combine_backward)


class Transposes(NamedTuple):
    """Rows out and sums back, each the other's gradient; arguments already checked.

    Attributes:
      gather_rows: (x_TD, token_of_row_R, slots_TK) -> [R, D].
      gather_sum: (values_RD, token_of_row_R, slots_TK) -> [T, D].
    """

    gather_rows: Callable
    gather_sum: Callable


def transposes(copy_rows: Callable[[jax.Array, jax.Array], jax.Array]) -> Transposes:
    """Both from a function (x_TD, token_of_row_R) -> x[token_of_row]; XLA sums."""

    def add_rows(values_RD: jax.Array, slots_TK: jax.Array) -> jax.Array:
        ones_TK = jnp.ones(slots_TK.shape, accumulation_dtype(values_RD.dtype))
        return _combine(values_RD, slots_TK, ones_TK)

    @jax.custom_vjp
    def gather_rows(x_TD: jax.Array, token_of_row_R: jax.Array, slots_TK: jax.Array) -> jax.Array:
        del slots_TK
        return copy_rows(x_TD, token_of_row_R)

    @jax.custom_vjp
    def gather_sum(
        values_RD: jax.Array, token_of_row_R: jax.Array, slots_TK: jax.Array
    ) -> jax.Array:
        del token_of_row_R
        return add_rows(values_RD, slots_TK)

    gather_rows.defvjp(
        lambda x_TD, token_of_row_R, slots_TK: (copy_rows(x_TD, token_of_row_R), slots_TK),
        lambda slots_TK, drows_RD: (add_rows(drows_RD, slots_TK), None, None),
    )
    gather_sum.defvjp(
        lambda values_RD, token_of_row_R, slots_TK: (add_rows(values_RD, slots_TK), token_of_row_R),
        lambda token_of_row_R, dout_TD: (copy_rows(dout_TD, token_of_row_R), None, None),
    )
    return Transposes(gather_rows, gather_sum)


TRANSPOSES = transposes(_take)
