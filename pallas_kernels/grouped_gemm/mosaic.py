"""Grouped GEMM for Hopper: value, gradient to the rows and gradient to the weights.

The transposed operands of the gradients are transposed on their way from shared memory into the
tensor cores, never in HBM.

R rows, K contracted width, N output width, G groups, M, N, K sizes of a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _common, _mosaic
from pallas_kernels.grouped_gemm import mosaic_rows, pipeline, schedule
from pallas_kernels.grouped_gemm.mosaic_rows import launch, my_tiles, padded, shared
from pallas_kernels.grouped_gemm.schedule import CHUNK, DEPTH, TILE_COLUMNS, TILE_ROWS, Tiling
from pallas_kernels.grouped_gemm.tilings import TILINGS


def _kept(dtype: Any) -> bool:
    """Whether there are registers for a finished tile while the next one is multiplied."""
    return jnp.dtype(dtype).itemsize == 2


def _product_kernel(
    tiles: schedule.RowTiles,
    lhs: Any,
    rhs: Any,
    out: Any,
    buffers: pipeline.Buffers,
    *,
    tiling: Tiling,
    transposed: bool,
) -> None:
    warpgroup = lax.axis_index("warpgroup")

    def load(tile: mosaic_rows.Tile, k: jax.Array, blocks: tuple[Any, Any], full: Any) -> None:
        lhs_block, rhs_block = blocks
        depth, columns = pl.ds(k * DEPTH, DEPTH), pl.ds(tile.column, TILE_COLUMNS)
        plgpu.copy_gmem_to_smem(
            lhs.at[pl.ds(tile.start, TILE_ROWS), depth],
            lhs_block,
            full,
            collective_axes=shared(tiling, "lhs"),
        )
        window = (tile.group, columns, depth) if transposed else (tile.group, depth, columns)
        plgpu.copy_gmem_to_smem(
            rhs.at[window], rhs_block, full, collective_axes=shared(tiling, "rhs")
        )

    def operands(lhs_block: Any, rhs_block: Any) -> tuple[Any, Any]:
        mine = lhs_block.at[pl.ds(warpgroup * CHUNK, CHUNK)]
        return mine, rhs_block.transpose((1, 0)) if transposed else rhs_block

    product = mosaic_rows.Product(
        num_steps=pl.cdiv(lhs.shape[1], DEPTH),
        load=load,
        multiply=functools.partial(pipeline.multiply, operands=operands),
        behind=_kept(out.dtype),
    )
    mosaic_rows.run(product, tiles, out, buffers, tiling)


def _gradient_kernel(
    rows: schedule.RowSteps,
    lhs: Any,
    lhs_edge: Any,
    dout: Any,
    dout_edge: Any,
    drhs: Any,
    buffers: pipeline.Buffers,
    *,
    tiling: Tiling,
    adds: bool,
) -> None:
    warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("pair")
    num_groups, height, width = drhs.shape
    row_tiles = pl.cdiv(height, tiling.cluster_rows)
    column_tiles = pl.cdiv(width, tiling.cluster_columns)
    count, index_of = my_tiles(jnp.int32(num_groups * row_tiles * column_tiles))

    def locate(i: jax.Array) -> tuple[Any, ...]:
        g, rest = _mosaic.divmod_by(index_of(i), row_tiles * column_tiles)
        m, n = schedule.snake(rest, row_tiles, column_tiles, tiling.panel)
        row, column = m * tiling.cluster_rows, n * tiling.cluster_columns
        if tiling.pair == "columns":
            column = column + cta * TILE_COLUMNS
        else:
            row = row + cta * TILE_ROWS
        row, column = pl.multiple_of(row, TILE_ROWS), pl.multiple_of(column, TILE_COLUMNS)
        return g, row, column

    def load(tile: tuple[Any, ...], k: jax.Array, blocks: tuple[Any, Any], full: Any) -> None:
        g, row, column = tile
        lhs_block, rhs_block = blocks
        whole = rows.whole_G[g]

        def copy(lhs_from: Any, dout_from: Any, *window: Any) -> None:
            plgpu.copy_gmem_to_smem(
                lhs_from.at[*window, pl.ds(row, TILE_ROWS)],
                lhs_block,
                full,
                collective_axes=shared(tiling, "lhs"),
            )
            plgpu.copy_gmem_to_smem(
                dout_from.at[*window, pl.ds(column, TILE_COLUMNS)],
                rhs_block,
                full,
                collective_axes=shared(tiling, "rhs"),
            )

        @pl.when(k < whole)
        def _() -> None:
            start = pl.multiple_of(rows.start_G[g] + k * CHUNK, schedule.ALIGNMENT)
            copy(lhs, dout, pl.ds(start, CHUNK))

        @pl.when(k >= whole)
        def _() -> None:
            start = pl.multiple_of((k - whole) * CHUNK, CHUNK)
            copy(lhs_edge, dout_edge, rows.group_G[g], pl.ds(start, CHUNK))

    def operands(lhs_block: Any, rhs_block: Any) -> tuple[Any, Any]:
        return lhs_block.at[:, pl.ds(warpgroup * CHUNK, CHUNK)].transpose((1, 0)), rhs_block

    def target(tile: tuple[Any, ...]) -> pipeline.Target:
        g, row, column = tile
        zero = warpgroup * 0
        # The zeros of an empty group must be written, but need not be added.
        high = jnp.where(rows.steps_G[g] == 0, zero, CHUNK) if adds else zero + CHUNK
        return pipeline.Target(rows.group_G[g], row + warpgroup * CHUNK, column, zero, high)

    pipeline.run(
        pipeline.Work(
            zero=rows.group_G[0] * 0,
            count=count,
            locate=locate,
            steps=lambda tile: rows.steps_G[tile[0]],
            load=load,
            multiply=functools.partial(pipeline.multiply, operands=operands),
            target=target,
            window=lambda group, rows, columns: drhs.at[group, rows, columns],
            finish=lambda: None,
            adds=adds,
            behind=_kept(drhs.dtype),
        ),
        buffers,
    )


def _tiling(name: str, shape: tuple[int, int, int, int]) -> Tiling:
    return TILINGS.get((name, shape), TILINGS[name, None])


def _buffer_types(
    blocks: tuple[tuple[int, int], tuple[int, int]], dtype: Any, out_dtype: Any
) -> pipeline.Buffers:
    operands = tuple(pipeline.operand_type(block, dtype) for block in blocks)
    return pipeline.buffer_types(operands, out_dtype)


def product(
    lhs_RK: jax.Array,
    rhs: jax.Array,
    group_sizes_G: jax.Array,
    *,
    dtype: Any,
    transposed: bool = False,
    tiling: Tiling | None = None,
) -> jax.Array:
    """lhs times each row's matrix: rhs [G, K, N], or [G, N, K] if transposed; in `dtype`."""
    num_rows, width = lhs_RK.shape[0], rhs.shape[1 if transposed else 2]
    num_groups, *widths = rhs.shape
    name = "gradient to lhs" if transposed else "forward"
    tiling = tiling or _tiling(name, (num_rows, *widths, num_groups))
    lhs_RK = padded(lhs_RK)
    # XLA computes each table once for all products of a layer: equal operations are merged.
    tiles = schedule.row_tiles(group_sizes_G, lhs_RK.shape[0], tiling.cluster_rows)
    rows, columns = (DEPTH, TILE_COLUMNS), (TILE_COLUMNS, DEPTH)
    blocks = (TILE_ROWS, DEPTH), columns if transposed else rows
    scratch = _buffer_types(blocks, lhs_RK.dtype, dtype)
    body = functools.partial(_product_kernel, tiling=tiling, transposed=transposed)
    out_type = jax.ShapeDtypeStruct((lhs_RK.shape[0], width), dtype)
    out_RN = launch(body, out_type, scratch, tiles, lhs_RK, rhs)[:num_rows]
    return _common.vary(out_RN, _common.varying_axes(lhs_RK))


def weight_gradient(
    lhs_RK: jax.Array,
    dout_RN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    dtype: Any,
    accumulate_GKN: jax.Array | None = None,
    tiling: Tiling | None = None,
) -> jax.Array:
    """Sum over each group's rows of lhs[r]^T dout[r]: [G, K, N] in `dtype`; plus
    `accumulate_GKN`, in its memory where XLA can spare that.
    """
    shape = (group_sizes_G.shape[0], lhs_RK.shape[1], dout_RN.shape[1])
    tiling = tiling or _tiling("gradient to rhs", (lhs_RK.shape[0], *shape[1:], shape[0]))
    lhs_RK, dout_RN = padded(lhs_RK), padded(dout_RN)
    steps = schedule.row_steps(group_sizes_G, lhs_RK.shape[0])
    blocks = (CHUNK, TILE_ROWS), (CHUNK, TILE_COLUMNS)
    scratch = _buffer_types(blocks, lhs_RK.dtype, dtype)

    def edge(x_RW: jax.Array) -> jax.Array:
        return x_RW.at[steps.edge_rows_GE].get(mode="fill", fill_value=0)

    axes = _common.varying_axes(lhs_RK)
    # A Ref may not vary over axes of a shard_map (jax 0.11): there the addition is XLA's.
    adds = accumulate_GKN is not None and not axes
    body = functools.partial(_gradient_kernel, tiling=tiling, adds=adds)
    operands = steps, lhs_RK, edge(lhs_RK), dout_RN, edge(dout_RN)
    if adds:
        sums = jax.new_ref(accumulate_GKN)
        launch(body, (), scratch, *operands, sums)
        return jax.freeze(sums)
    drhs_GKN = launch(body, jax.ShapeDtypeStruct(shape, dtype), scratch, *operands)
    drhs_GKN = _common.vary(drhs_GKN, axes)
    return drhs_GKN if accumulate_GKN is None else accumulate_GKN + drhs_GKN
