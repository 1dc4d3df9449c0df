"""Who computes what in the Mosaic grouped GEMM: tile tables, built by XLA once per layer.

R rows, G groups, T tiles of rows.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mosaic

CHUNK = 64  # rows of a warpgroup's part of a tile, the smallest M of a wgmma
TILE_ROWS = 2 * CHUNK
TILE_COLUMNS = 256  # the largest N of a wgmma
DEPTH = 64  # of one step along the contracted dimension
# A TMA load into the tiled buffer that wgmma reads starts at a multiple of this many rows.
ALIGNMENT = 8
EDGE_ROWS = CHUNK + ALIGNMENT  # at most 7 + 63 of them used


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the tiles of a product are walked.

    Attributes:
      panel: columns of tiles that are walked together, for reuse in L2.
      pair: a cluster is two CTAs that stand side by side along "columns" and share the lhs, or
        along "rows" and share the rhs.
    """

    panel: int
    pair: str

    @property
    def cluster_rows(self) -> int:
        """Output rows of a cluster."""
        return TILE_ROWS * (2 if self.pair == "rows" else 1)

    @property
    def cluster_columns(self) -> int:
        """Output columns of a cluster."""
        return TILE_COLUMNS * (2 if self.pair == "columns" else 1)


class RowTiles(NamedTuple):
    """Tiles of rows; tile t takes rows [start, start + tile) and stores [start + low, start +
    high).

    The first tile of a group starts up to 7 rows early, for TMA's alignment.
    """

    group_T: jax.Array
    start_T: jax.Array
    low_T: jax.Array
    high_T: jax.Array
    totals_2: jax.Array  # tiles in use, rows in groups


class RowSteps(NamedTuple):
    """Steps along the rows of every group, largest group first, so that the last tiles are short.

    Whole steps of 64 rows begin at an aligned row of the group's own. What they leave, up to 7 rows
    at its head and 63 at its tail, comes from copies that hold zeros elsewhere: steps [0, whole)
    read the array, steps [whole, steps) the copies.
    """

    group_G: jax.Array
    start_G: jax.Array
    whole_G: jax.Array
    steps_G: jax.Array
    edge_rows_GE: jax.Array  # rows of the copies by group number; num_rows where they are zero


def _running_sum(x_G: jax.Array) -> jax.Array:
    """cumsum of few numbers, by comparing all pairs of places: in one kernel."""
    g_G = jnp.arange(x_G.shape[0], dtype=jnp.int32)
    return jnp.sum(jnp.where(g_G[None] <= g_G[:, None], x_G[None], 0), axis=1, dtype=jnp.int32)


def _bounds(group_sizes_G: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    ends_G = jnp.minimum(_running_sum(group_sizes_G.astype(jnp.int32)), num_rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends_G[:-1]]), ends_G


def row_tiles(group_sizes_G: jax.Array, num_rows: int, tile: int) -> RowTiles:
    """Cuts every group into tiles of `tile` rows; an empty group takes none."""
    num_groups = group_sizes_G.shape[0]
    starts_G, ends_G = _bounds(group_sizes_G, num_rows)
    bases_G = starts_G // ALIGNMENT * ALIGNMENT
    tiles_G = jnp.where(ends_G > starts_G, (ends_G - bases_G + tile - 1) // tile, 0)
    last_G = _running_sum(tiles_G)
    t_T = jnp.arange(num_rows // tile + 2 * num_groups, dtype=jnp.int32)
    group_T = jnp.sum(t_T[:, None] >= last_G[None, :], axis=1, dtype=jnp.int32)
    group_T = jnp.minimum(group_T, num_groups - 1)
    start_T = bases_G[group_T] + (t_T - (last_G - tiles_G)[group_T]) * tile
    low_T = jnp.maximum(starts_G[group_T] - start_T, 0)
    high_T = jnp.minimum(ends_G[group_T] - start_T, tile)
    totals_2 = jnp.stack([last_G[-1], ends_G[-1]])
    return RowTiles(group_T, start_T, low_T, high_T, totals_2)


def row_steps(group_sizes_G: jax.Array, num_rows: int) -> RowSteps:
    """Cuts every group into steps of 64 rows that hold no other group's rows."""
    starts_G, ends_G = _bounds(group_sizes_G, num_rows)
    sizes_G = ends_G - starts_G
    head_G = jnp.minimum(-starts_G % ALIGNMENT, sizes_G)
    whole_G = (sizes_G - head_G) // CHUNK
    left_G = sizes_G - whole_G * CHUNK
    edge_E = jnp.arange(EDGE_ROWS, dtype=jnp.int32)[None]
    skipped_GE = jnp.where(edge_E < head_G[:, None], 0, whole_G[:, None] * CHUNK)
    edge_rows_GE = jnp.where(
        edge_E < left_G[:, None], starts_G[:, None] + edge_E + skipped_GE, num_rows
    )
    # A group's rank is the number of groups before it; comparing all pairs beats sorting so few.
    g_G = jnp.arange(sizes_G.shape[0], dtype=jnp.int32)
    before_GG = (sizes_G[None, :] > sizes_G[:, None]) | (
        (sizes_G[None, :] == sizes_G[:, None]) & (g_G[None, :] < g_G[:, None])
    )
    rank_G = jnp.sum(before_GG, axis=1, dtype=jnp.int32)
    order_GG = rank_G[None, :] == g_G[:, None]

    def ordered(x_G: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(order_GG, x_G[None, :], 0), axis=1, dtype=jnp.int32)

    return RowSteps(
        ordered(g_G),
        ordered(starts_G + head_G),
        ordered(whole_G),
        ordered(whole_G + (left_G + CHUNK - 1) // CHUNK),
        edge_rows_GE,
    )


def snake(
    index: jax.Array, num_rows: jax.Array | int, num_columns: int, panel: int
) -> tuple[jax.Array, jax.Array]:
    """Row and column of the index-th tile: panels of columns, each walked down, the next one up."""
    p, rest = _mosaic.divmod_by(index, num_rows * panel)
    width = jnp.minimum(panel, num_columns - p * panel)
    row, column = _mosaic.divmod_by(rest, width)
    row = jnp.where(lax.rem(p, jnp.int32(2)) == 1, num_rows - 1 - row, row)
    return row, p * panel + column
