"""Grouped GEMM in plain jnp: dropless blocks of 64 rows, each against its group's matrix.

A loop whose trip count is the number of blocks in use, so rows that belong to no group cost nothing
and no weight is ever copied per block. Measured against batching all blocks with gathered weights,
chunks of blocks, and other block sizes (experiments/LOG.md): as fast or faster where part of the
rows belongs to no group, and its memory does not grow with R.

R rows, K contracted width, N output width, G groups, M rows of a block, B blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._common import accumulation_dtype, vary, varying_axes

BLOCK_ROWS = 64


def _block_table(
    group_sizes_G: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Group, first row and rows in use of every block, in row order, and the number of blocks in
    use.
    """
    group_sizes_G = group_sizes_G.astype(jnp.int32)
    blocks_G = (group_sizes_G + BLOCK_ROWS - 1) // BLOCK_ROWS
    block_end_G = jnp.cumsum(blocks_G, dtype=jnp.int32)
    row_end_G = jnp.cumsum(group_sizes_G, dtype=jnp.int32)
    num_groups = group_sizes_G.shape[0]
    block_B = jnp.arange(num_rows // BLOCK_ROWS + num_groups, dtype=jnp.int32)
    group_B = jnp.searchsorted(block_end_G, block_B, side="right", method="compare_all")
    group_B = jnp.minimum(group_B, num_groups - 1)
    nth_B = block_B - (block_end_G - blocks_G)[group_B]
    start_B = (row_end_G - group_sizes_G)[group_B] + nth_B * BLOCK_ROWS
    used_B = jnp.clip(row_end_G[group_B] - start_B, 0, BLOCK_ROWS)
    return group_B, start_B, used_B, block_end_G[-1]


def _pad_rows(x_RK: jax.Array) -> jax.Array:
    """One more block of zero rows, so that no block's slice is clamped at the end."""
    return jnp.pad(x_RK, ((0, BLOCK_ROWS), (0, 0)))


def product(
    lhs_RK: jax.Array,
    rhs: jax.Array,
    group_sizes_G: jax.Array,
    *,
    dtype: Any,
    transposed: bool = False,
) -> jax.Array:
    """lhs times each row's matrix: rhs [G, K, N], or [G, N, K] if transposed; in `dtype`."""
    num_rows = lhs_RK.shape[0]
    group_B, start_B, _, num_blocks = _block_table(group_sizes_G, num_rows)
    lhs_padded = _pad_rows(lhs_RK)

    def body(b: jax.Array, out_RN: jax.Array) -> jax.Array:
        # The last block of a group also writes rows of the next groups. Their own blocks come later
        # and overwrite them: no mask is needed but the one at the very end.
        product_MN = lax.dot_general(
            lax.dynamic_slice_in_dim(lhs_padded, start_B[b], BLOCK_ROWS),
            lax.dynamic_index_in_dim(rhs, group_B[b], keepdims=False),
            (((1,), (1 if transposed else 0,)), ((), ())),
            preferred_element_type=accumulation_dtype(lhs_RK.dtype),
        )
        return lax.dynamic_update_slice_in_dim(out_RN, product_MN.astype(dtype), start_B[b], axis=0)

    width = rhs.shape[1 if transposed else 2]
    out_RN = jnp.zeros((num_rows + BLOCK_ROWS, width), dtype)
    out_RN = vary(out_RN, varying_axes(lhs_RK))
    out_RN = lax.fori_loop(0, num_blocks, body, out_RN)[:num_rows]
    total = jnp.sum(group_sizes_G, dtype=jnp.int32)
    belongs_R1 = jnp.arange(num_rows, dtype=jnp.int32)[:, None] < total
    return jnp.where(belongs_R1, out_RN, 0)


def weight_gradient(
    lhs_RK: jax.Array,
    dout_RN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    dtype: Any,
    accumulate_GKN: jax.Array | None = None,
) -> jax.Array:
    """Sum over each group's rows of lhs[r]^T dout[r], block after block in row order, in `dtype`;
    plus `accumulate_GKN`.
    """
    group_B, start_B, used_B, num_blocks = _block_table(group_sizes_G, lhs_RK.shape[0])
    sums = accumulation_dtype(lhs_RK.dtype)
    lhs_padded, dout_padded = _pad_rows(lhs_RK), _pad_rows(dout_RN)
    row_M1 = jnp.arange(BLOCK_ROWS, dtype=jnp.int32)[:, None]

    def body(b: jax.Array, drhs_GKN: jax.Array) -> jax.Array:
        def rows(x_RW: jax.Array) -> jax.Array:
            x_MW = lax.dynamic_slice_in_dim(x_RW, start_B[b], BLOCK_ROWS)
            return jnp.where(row_M1 < used_B[b], x_MW, 0)  # both operands: 0 * NaN is NaN

        part_KN = lax.dot_general(
            rows(lhs_padded),
            rows(dout_padded),
            (((0,), (0,)), ((), ())),
            preferred_element_type=sums,
        )
        sum_KN = lax.dynamic_index_in_dim(drhs_GKN, group_B[b], keepdims=False) + part_KN
        return lax.dynamic_update_index_in_dim(drhs_GKN, sum_KN, group_B[b], axis=0)

    shape = (group_sizes_G.shape[0], lhs_RK.shape[1], dout_RN.shape[1])
    drhs_GKN = vary(jnp.zeros(shape, sums), varying_axes(lhs_RK))
    drhs_GKN = lax.fori_loop(0, num_blocks, body, drhs_GKN)
    return drhs_GKN.astype(dtype) if accumulate_GKN is None else accumulate_GKN + drhs_GKN
