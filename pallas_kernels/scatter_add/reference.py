"""Scatter-add in plain jnp: stable sort by id, segmented prefix sum, one gather of every segment's
last row.

The prefix sum is a balanced tree, so its depth, cost and rounding don't depend on how the ids are
spread.

R rows, D width, N destinations.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._common import accumulation_dtype, vary, varying_axes


def _segmented_add(
    left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Associative operator of the segmented prefix sum; a set flag says that a segment starts in
    the span.
    """
    left_flag, left_sum = left
    right_flag, right_sum = right
    total = jnp.where(right_flag, right_sum, left_sum + right_sum)
    return left_flag | right_flag, total


def sum_by_id(values_RD: jax.Array, ids_R: jax.Array, num_rows: int) -> jax.Array:
    """[num_rows, D] sums of the rows of each int32 id; id N is dropped."""
    dtype = accumulation_dtype(values_RD.dtype)
    num_values = values_RD.shape[0]
    position_R = vary(jnp.arange(num_values, dtype=jnp.int32), varying_axes(ids_R))
    keys_R, order_R = lax.sort_key_val(ids_R, position_R, is_stable=True)
    starts_R = jnp.concatenate([jnp.ones(1, bool), keys_R[1:] != keys_R[:-1]])
    _, prefix_RD = lax.associative_scan(
        _segmented_add, (starts_R[:, None], values_RD[order_R].astype(dtype))
    )
    # scan_unrolled: the default search is a loop of kernel launches on a GPU.
    id_N = jnp.arange(num_rows, dtype=jnp.int32)
    ends_N = jnp.searchsorted(keys_R, id_N, side="right", method="scan_unrolled")
    last_N = jnp.maximum(ends_N - 1, 0)
    present_N = (ends_N > 0) & (keys_R[last_N] == id_N)
    return jnp.where(present_N[:, None], prefix_RD[last_N], 0)
