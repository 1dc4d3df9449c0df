"""Products of rows with their group's matrix on Hopper: tiles of rows through the skeleton.

R rows, W their width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic
from pallas_kernels.grouped_gemm import pipeline, schedule
from pallas_kernels.grouped_gemm.schedule import CHUNK, TILE_COLUMNS, TILE_ROWS, Tiling


def launch(
    body: Any,
    out_type: Any,
    scratch: pipeline.Buffers,
    *operands: Any,
    name: str = "grouped_gemm",
) -> Any:
    """Runs a kernel on all SMs, in clusters of two CTAs."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=(scratch,),
        grid=(_mosaic.num_sms() // 2,),
        grid_names=("cluster",),
        cluster=(2,),
        cluster_names=("pair",),
        num_threads=pipeline.COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
    )(*operands)


def shared(tiling: Tiling, operand: str) -> tuple[str, ...]:
    """Cluster axes over which an operand is multicast."""
    return ("pair",) if (tiling.pair == "columns") == (operand == "lhs") else ()


def my_tiles(num_tiles: jax.Array) -> tuple[jax.Array, Any]:
    """How many tiles this cluster computes, and the index of its i-th one."""
    return _mosaic.dealt(num_tiles, lax.axis_index("cluster"), _mosaic.num_sms() // 2)


class Tile(NamedTuple):
    """Rows from `start` on, of which [start + low, start + high) are of the group, and columns from
    `column` on.
    """

    group: jax.Array
    start: jax.Array
    low: jax.Array
    high: jax.Array
    column: jax.Array


class Product(NamedTuple):
    """What a kernel multiplies: as in `pipeline.Work`, whose `tile` is a Tile.

    Attributes:
      num_steps: along the contracted dimension.
      load: see Work.
      multiply: see Work.
      behind: see Work.
    """

    num_steps: int
    load: Callable[..., None]
    multiply: Callable[[pipeline.Steps], tuple[jax.Array, ...]]
    behind: bool


def run(
    product: Product,
    tiles: schedule.RowTiles,
    out: Any,
    buffers: pipeline.Buffers,
    tiling: Tiling,
) -> None:
    """Runs the three warpgroups of a CTA over its tiles of the product; rows in no group are
    zero.
    """
    warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("pair")
    column_tiles = pl.cdiv(out.shape[1], tiling.cluster_columns)
    row_tiles, total_rows = tiles.totals_2[0], tiles.totals_2[1]
    count, index_of = my_tiles(row_tiles * column_tiles)

    def locate(i: jax.Array) -> Tile:
        t, n = schedule.snake(index_of(i), row_tiles, column_tiles, tiling.panel)
        start, low, high = tiles.start_T[t], tiles.low_T[t], tiles.high_T[t]
        column = n * tiling.cluster_columns
        if tiling.pair == "columns":
            column = column + cta * TILE_COLUMNS
        else:
            shift = cta * TILE_ROWS
            start, low, high = start + shift, low - shift, high - shift
        start = pl.multiple_of(start, schedule.ALIGNMENT)
        return Tile(tiles.group_T[t], start, low, high, pl.multiple_of(column, TILE_COLUMNS))

    def target(tile: Tile) -> pipeline.Target:
        first = warpgroup * CHUNK
        return pipeline.Target(
            warpgroup * 0, tile.start + first, tile.column, tile.low - first, tile.high - first
        )

    pipeline.run(
        pipeline.Work(
            zero=tiles.totals_2[0] * 0,
            count=count,
            locate=locate,
            steps=lambda tile: product.num_steps,
            load=product.load,
            multiply=product.multiply,
            target=target,
            window=lambda _, rows, columns: out.at[rows, columns],
            finish=lambda: _store_zeros(buffers.out.at[warpgroup, 0], out, total_rows),
            behind=product.behind,
        ),
        buffers,
    )


def _store_zeros(buffer: Any, out: Any, total_rows: jax.Array) -> None:
    """Rows that belong to no group: one buffer of zeros, stored by all warpgroups in turn."""
    warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("pair")
    rest = out.shape[0] - total_rows
    width = buffer.shape[1]
    column_chunks = pl.cdiv(out.shape[1], width)

    @pl.when(rest > 0)
    def _() -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = jnp.zeros(buffer.shape, buffer.dtype)
        plgpu.commit_smem()
        row_chunks = lax.div(rest + CHUNK - 1, jnp.int32(CHUNK))
        worker = (lax.axis_index("cluster") * 2 + cta) * pipeline.COMPUTE_WARPGROUPS + warpgroup
        workers = _mosaic.num_sms() // 2 * 2 * pipeline.COMPUTE_WARPGROUPS
        mine, index_of = _mosaic.dealt(row_chunks * column_chunks, worker, workers)

        def body(i: jax.Array, _: None) -> None:
            r, c = _mosaic.divmod_by(index_of(i), column_chunks)
            row = total_rows + r * CHUNK  # a chunk past the last row is clipped by the TMA store
            plgpu.copy_smem_to_gmem(buffer, out.at[pl.ds(row, CHUNK), pl.ds(c * width, width)])

        lax.fori_loop(0, mine, body, None)


def padded(x_RW: jax.Array) -> jax.Array:
    """With rows added until TMA can read it: whole groups of 8, no fewer than a box has."""
    num_rows = x_RW.shape[0]
    padded = max(-(-num_rows // schedule.ALIGNMENT) * schedule.ALIGNMENT, TILE_ROWS)
    return jnp.pad(x_RW, ((0, padded - num_rows), (0, 0)))
