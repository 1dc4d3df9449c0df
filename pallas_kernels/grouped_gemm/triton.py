"""Grouped GEMM for GPUs before Hopper: value, gradient to the rows and gradient to the weights.

Every program makes one tile of the result, its products in a fixed order. The transposed operands
of the gradients are read transposed, never copied.

R rows, K contracted width, N output width, G groups, T tiles of rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import _triton

# Sizes of the blocks, chosen on an H100 (experiments/LOG.md). A GPU without Hopper's instructions
# keeps STAGES - 1 blocks of both operands in shared memory: 96 KiB, of the 99 KiB that Ada has.
ROWS, COLUMNS = 128, 256  # of the tile of the result
DEPTH = 64  # of one step along the contracted dimension
STAGES = 3  # steps in flight, with the one in use
WARPS = 8
PANEL = 16  # tiles that are walked together down the rows, for reuse in L2


@triton.jit
def _load(pointers, inside, WHOLE: tl.constexpr):
    """A block, zero where it is not inside; a whole one without a mask."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _walk(index, rows, columns, PANEL: tl.constexpr):
    """Row and column of the index-th tile: panels of rows, each walked along its columns."""
    panel = index // (PANEL * columns)
    height = tl.minimum(rows - panel * PANEL, PANEL)
    within = index - panel * PANEL * columns
    return panel * PANEL + within % height, within // height


@triton.jit
def _product_kernel(
    lhs,
    rhs,
    group_T,
    start_T,
    end_T,
    out,
    LHS_ROWS: tl.constexpr,
    CONTRACT: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PANEL: tl.constexpr,
):
    tile, column = _walk(tl.program_id(0), TILES, (WIDTH + N - 1) // N, PANEL)
    group, start, end = tl.load(group_T + tile), tl.load(start_T + tile), tl.load(end_T + tile)
    if start >= end:
        return
    row_M, k_K = tl.arange(0, M)[:, None], tl.arange(0, K)
    column_N = column * N + tl.arange(0, N)[None, :]
    # Rows of other groups are multiplied too and not stored: no row's sum depends on another row.
    # It does on what lies past the contracted width: masked in both operands, as 0 * NaN is NaN.
    lhs_MK = lhs + start.to(tl.int64) * CONTRACT
    lhs_MK += tl.minimum(row_M, LHS_ROWS - 1 - start) * CONTRACT + k_K[None, :]
    k_stride: tl.constexpr = 1 if TRANSPOSED else WIDTH
    n_stride: tl.constexpr = CONTRACT if TRANSPOSED else 1
    rhs_KN = rhs + group.to(tl.int64) * (CONTRACT * WIDTH) + k_K[:, None] * k_stride
    rhs_KN += column_N * n_stride
    total_MN = tl.zeros((M, N), tl.float32)
    for k in range(0, tl.where(group < GROUPS, CONTRACT, 0), K):
        left = CONTRACT - k
        lhs_block = _load(lhs_MK, k_K[None, :] < left, CONTRACT % K == 0)
        inside = (k_K[:, None] < left) & (column_N < WIDTH)
        rhs_block = _load(rhs_KN, inside, CONTRACT % K == 0 and WIDTH % N == 0)
        total_MN = tl.dot(lhs_block, rhs_block, total_MN)
        lhs_MK += K
        rhs_KN += K * k_stride
    out_MN = out + start.to(tl.int64) * WIDTH + row_M * WIDTH + column_N
    mine = (row_M < end - start) & (column_N < WIDTH)
    tl.store(out_MN, total_MN.to(out.dtype.element_ty), mask=mine)


@triton.jit
def _gradient_kernel(
    lhs,
    dout,
    start_G,
    end_G,
    drhs,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PANEL: tl.constexpr,
):
    tiles: tl.constexpr = (HEIGHT + M - 1) // M
    columns: tl.constexpr = (WIDTH + N - 1) // N
    group = tl.program_id(0) // (tiles * columns)
    tile, column = _walk(tl.program_id(0) % (tiles * columns), tiles, columns, PANEL)
    start, end = tl.load(start_G + group), tl.load(end_G + group)
    row_K = tl.arange(0, K)
    height_M = tile * M + tl.arange(0, M)[:, None]
    column_N = column * N + tl.arange(0, N)[None, :]
    lhs_MK = lhs + start.to(tl.int64) * HEIGHT + row_K[None, :] * HEIGHT + height_M
    dout_KN = dout + start.to(tl.int64) * WIDTH + row_K[:, None] * WIDTH + column_N
    total_MN = tl.zeros((M, N), tl.float32)
    for left in range(end - start, 0, -K):
        lhs_block = tl.load(lhs_MK, mask=(row_K[None, :] < left) & (height_M < HEIGHT), other=0.0)
        dout_block = tl.load(dout_KN, mask=(row_K[:, None] < left) & (column_N < WIDTH), other=0.0)
        total_MN = tl.dot(lhs_block, dout_block, total_MN)
        lhs_MK += K * HEIGHT
        dout_KN += K * WIDTH
    drhs_MN = drhs + group.to(tl.int64) * (HEIGHT * WIDTH) + height_M * WIDTH + column_N
    mine = (height_M < HEIGHT) & (column_N < WIDTH)
    tl.store(drhs_MN, total_MN.to(drhs.dtype.element_ty), mask=mine)


def _bounds(group_sizes_G: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """First and past-the-last row of every group."""
    ends_G = jnp.minimum(jnp.cumsum(group_sizes_G.astype(jnp.int32), dtype=jnp.int32), num_rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends_G[:-1]]), ends_G


def _row_tiles(group_sizes_G: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Group, first row and the group's past-the-last row of every tile, in order of rows.

    Rows of no group are those of group G. Tiles that are not needed come last and start at an end.
    """
    rest_1 = num_rows - jnp.sum(group_sizes_G, dtype=jnp.int32)[None]
    sizes = jnp.concatenate([group_sizes_G.astype(jnp.int32), jnp.maximum(rest_1, 0)])
    starts, ends = _bounds(sizes, num_rows)
    tiles = (ends - starts + ROWS - 1) // ROWS
    last = jnp.cumsum(tiles, dtype=jnp.int32)
    t_T = jnp.arange(num_rows // ROWS + sizes.shape[0], dtype=jnp.int32)
    group_T = jnp.sum(t_T[:, None] >= last[None, :], axis=1, dtype=jnp.int32)
    group_T = jnp.minimum(group_T, sizes.shape[0] - 1)
    start_T = starts[group_T] + (t_T - (last - tiles)[group_T]) * ROWS
    return group_T, start_T, ends[group_T]


def _launch(
    kernel: Any,
    operands: tuple[jax.Array, ...],
    *,
    out: jax.ShapeDtypeStruct,
    row_tiles: int,
    **constants: int,
) -> jax.Array:
    return _triton.launch(
        kernel,
        operands,
        out=out,
        programs=row_tiles * triton.cdiv(out.shape[-1], COLUMNS),
        warps=WARPS,
        stages=STAGES,
        WIDTH=out.shape[-1],
        M=ROWS,
        N=COLUMNS,
        K=DEPTH,
        PANEL=PANEL,
        **constants,
    )


def product(
    lhs_RK: jax.Array,
    rhs: jax.Array,
    group_sizes_G: jax.Array,
    *,
    dtype: Any,
    transposed: bool = False,
) -> jax.Array:
    """lhs times each row's matrix: rhs [G, K, N], or [G, N, K] if transposed; in `dtype`."""
    num_rows, contract = lhs_RK.shape
    tables = _row_tiles(group_sizes_G, num_rows)
    width = rhs.shape[1 if transposed else 2]
    return _launch(
        _product_kernel,
        (lhs_RK, rhs, *tables),
        out=jax.ShapeDtypeStruct((num_rows, width), dtype),
        row_tiles=tables[0].shape[0],
        LHS_ROWS=num_rows,
        CONTRACT=contract,
        GROUPS=rhs.shape[0],
        TILES=tables[0].shape[0],
        TRANSPOSED=transposed,
    )


def weight_gradient(
    lhs_RK: jax.Array,
    dout_RN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    dtype: Any,
    accumulate_GKN: jax.Array | None = None,
) -> jax.Array:
    """Sum over each group's rows of lhs[r]^T dout[r], in `dtype`; plus `accumulate_GKN`."""
    num_groups, height = group_sizes_G.shape[0], lhs_RK.shape[1]
    drhs_GKN = _launch(
        _gradient_kernel,
        (lhs_RK, dout_RN, *_bounds(group_sizes_G, lhs_RK.shape[0])),
        out=jax.ShapeDtypeStruct((num_groups, height, dout_RN.shape[1]), dtype),
        row_tiles=num_groups * triton.cdiv(height, ROWS),
        HEIGHT=height,
    )
    return drhs_GKN if accumulate_GKN is None else accumulate_GKN + drhs_GKN
