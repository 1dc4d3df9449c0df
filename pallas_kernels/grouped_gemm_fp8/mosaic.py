"""Grouped GEMM in fp8 for Hopper: the skeleton of the 16-bit one, with sums outside of the tensor
cores.

A step is a block of 128 along K, in bytes as long as a step of the 16-bit kernel, so shared memory
and tiles are the same. A warpgroup has 64 rows of 256 columns: 128 registers a thread hold their
sums, and 64 more the products of a step with one half of the columns, which are scaled and added
while the other warpgroup multiplies.

R rows, K contracted width, N output width, G groups, A = K / 128, B = N / 128 blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _common
from pallas_kernels.grouped_gemm import mosaic_rows, pipeline, schedule
from pallas_kernels.grouped_gemm.mosaic_rows import launch, padded, shared
from pallas_kernels.grouped_gemm.schedule import CHUNK, TILE_COLUMNS, TILE_ROWS, Tiling
from pallas_kernels.grouped_gemm_fp8.quantize import BLOCK, FP8

# As the 16-bit forward product's: the tiles move as many bytes in as much time.
TILING = Tiling(panel=8, pair="columns")


def _multiply(steps: pipeline.Steps, rhs_scales: Any) -> tuple[jax.Array, ...]:
    """Sums of a tile in registers, of either half of its columns."""
    tile: mosaic_rows.Tile = steps.tile
    last = rhs_scales.shape[1] - 1  # the second half of a tile may lie past it
    first = lax.div(tile.column, jnp.int32(BLOCK))
    warpgroup = lax.axis_index("warpgroup")
    rows = pl.ds(warpgroup * CHUNK, CHUNK)
    layout = plgpu.Layout.WGMMA

    def multiply_step(k: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        lhs, rhs, lhs_scales = steps.arrived(k)
        products = plgpu.ACC((CHUNK, BLOCK), jnp.float32)

        def start(acc_ref: Any, half: int) -> None:
            columns = pl.ds(half * BLOCK, BLOCK)
            plgpu.wgmma(acc_ref, lhs.at[rows], rhs.at[columns].transpose((1, 0)))

        def scale_of(half: int) -> jax.Array:
            return rhs_scales[tile.group, jnp.minimum(first + half, last), k]

        # Scales are read while the tensor cores are busy, those of the rows once.
        def first_half(acc_ref: Any) -> tuple[jax.Array, ...]:
            start(acc_ref, 0)
            scales_M = plgpu.load(lhs_scales.at[rows], layout=layout.reduce(1))
            plgpu.commit_smem()  # before a copy overwrites what was read
            scale = scale_of(0)
            return acc_ref[...], scales_M, scale

        def second_half(acc_ref: Any) -> tuple[jax.Array, ...]:
            start(acc_ref, 1)
            scale = scale_of(1)
            return acc_ref[...], scale

        def scaled(block_MN: jax.Array, factor_M: jax.Array) -> jax.Array:
            return block_MN * lax.broadcast_in_dim(factor_M, block_MN.shape, (0,))

        block_MN, scales_M, scale = pl.run_scoped(first_half, products)
        first_MN = sums[0] + scaled(block_MN, scales_M * scale)
        block_MN, scale = pl.run_scoped(second_half, products)
        steps.release(k)
        return first_MN, sums[1] + scaled(block_MN, scales_M * scale)

    zeros = plgpu.layout_cast(jnp.zeros((CHUNK, BLOCK), jnp.float32), layout)
    return lax.fori_loop(0, steps.count, multiply_step, (zeros, zeros))


def _kernel(
    tiles: schedule.RowTiles,
    lhs: Any,
    lhs_scales: Any,
    rhs: Any,
    rhs_scales: Any,
    out: Any,
    buffers: pipeline.Buffers,
    *,
    tiling: Tiling,
) -> None:
    def load(tile: mosaic_rows.Tile, k: jax.Array, blocks: tuple[Any, ...], full: Any) -> None:
        rows, depth = pl.ds(tile.start, TILE_ROWS), pl.ds(k * BLOCK, BLOCK)
        columns = pl.ds(tile.column, TILE_COLUMNS)
        copies = (
            (lhs.at[rows, depth], shared(tiling, "lhs")),
            (rhs.at[tile.group, columns, depth], shared(tiling, "rhs")),
            (lhs_scales.at[k, rows], ()),
        )
        for (source, axes), block in zip(copies, blocks, strict=True):
            plgpu.copy_gmem_to_smem(source, block, full, collective_axes=axes)

    product = mosaic_rows.Product(
        num_steps=lhs.shape[1] // BLOCK,
        load=load,
        multiply=functools.partial(_multiply, rhs_scales=rhs_scales),
        behind=False,  # no registers are left for it
    )
    mosaic_rows.run(product, tiles, out, buffers, tiling)


def grouped_gemm_fp8(
    lhs_RK: jax.Array,
    lhs_scales_RA: jax.Array,
    rhs_GNK: jax.Array,
    rhs_scales_GBA: jax.Array,
    group_sizes_G: jax.Array,
    *,
    dtype: Any,
    tiling: Tiling = TILING,
) -> jax.Array:
    """lhs times each row's matrix, transposed, in `dtype`."""
    num_rows, width = lhs_RK.shape[0], rhs_GNK.shape[1]
    lhs_RK = padded(lhs_RK)
    lhs_scales_AR = padded(lhs_scales_RA).T
    tiles = schedule.row_tiles(group_sizes_G, lhs_RK.shape[0], tiling.cluster_rows)
    operands = (
        pipeline.operand_type((TILE_ROWS, BLOCK), FP8),
        pipeline.operand_type((TILE_COLUMNS, BLOCK), FP8),
        plgpu.SMEM((pipeline.STAGES, TILE_ROWS), jnp.float32),
    )
    out_RN = launch(
        functools.partial(_kernel, tiling=tiling),
        jax.ShapeDtypeStruct((lhs_RK.shape[0], width), dtype),
        pipeline.buffer_types(operands, dtype),
        tiles,
        lhs_RK,
        lhs_scales_AR,
        rhs_GNK,
        rhs_scales_GBA,
        name="grouped_gemm_fp8",
    )[:num_rows]
    return _common.vary(out_RN, _common.varying_axes(lhs_RK))
