"""What the Mosaic attention kernels share: vectors along a tile, the mask, copies in pieces.

A matrix that is read by TMA or wgmma lies in shared memory in pieces of 64 columns where its width
is contracted: so the parts of the keys, of each head and of all heads, stand side by side.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic
from pallas_kernels.flash_mla.schedule import PIECE

LOADER = 2  # index of the loading warpgroup; warpgroups 0 and 1 compute
# 24 + 2 * 240 registers a thread: what an SM has for 3 * 128 threads.
LOADER_REGISTERS, COMPUTE_REGISTERS = 24, 240
MATRIX = plgpu.Layout.WGMMA


class Side(NamedTuple):
    """Queries or keys along a dimension of a tile.

    Attributes:
      dimension: 0 for its rows, 1 for its columns.
      place: in the row of tokens, of the first one.
      ids: their segments in device memory, None if there is only one.
    """

    dimension: int
    place: Any
    ids: Any


def along(vector: jax.Array, shape: tuple[int, int], dimension: int) -> jax.Array:
    """The vector, spread over a tile that it is a side of."""
    return lax.broadcast_in_dim(vector, shape, [dimension])


def load_vector(reference: Any, dimension: int) -> jax.Array:
    """A vector with the layout that `along` needs."""
    return plgpu.load(reference, layout=MATRIX.reduce(1 - dimension), optimized=False)


def visible(shape: tuple[int, int], queries: Side, keys: Side) -> jax.Array:
    """Whether the query sees the key, for a tile of pairs."""

    def places(side: Side) -> jax.Array:
        iota = plgpu.broadcasted_iota(jnp.int32, shape, side.dimension, layout=MATRIX)
        return iota + side.place

    seen = places(queries) >= places(keys)
    if queries.ids is not None:
        ids = [along(load_vector(s.ids, s.dimension), shape, s.dimension) for s in (queries, keys)]
        seen = seen & (ids[0] == ids[1])
    return seen


def shared(dtype: Any, *shape: int) -> Any:
    """Type of a buffer in shared memory that TMA and wgmma read and write."""
    return plgpu.SMEM(shape, dtype, transforms=_mosaic.tiled(dtype))


def of_head(key: Any, batch: Any, rows: Any, head: Any) -> Any:
    """Rows of one head [rows, width] of a part of the keys, which may be that of all heads."""
    return key.at[batch, rows, head] if len(key.shape) == 4 else key.at[batch, rows]


def load_pieces(sources: list[Any], pieces: Any, barrier: Any) -> None:
    """Copies matrices of equal height [rows, width], side by side, to [pieces, rows, 64]."""
    piece = 0
    for source in sources:
        for column in range(0, source.shape[-1], PIECE):
            columns = source.at[:, pl.ds(column, PIECE)]
            plgpu.copy_gmem_to_smem(columns, pieces.at[piece], barrier)
            piece += 1


def store_by_slots(values: jax.Array, slots: Any, target: Any) -> None:
    """Copies a matrix [rows, width] to device memory by way of some slots [slots, rows, 64], which
    products and copies of this warpgroup may have read. The last copies are in flight.
    """
    room = slots.shape[0] * PIECE
    for column in range(0, values.shape[1], room):
        some = values[:, column : column + room]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # all threads meet: products ended, too
        store_pieces(some, slots, target.at[:, pl.ds(column, some.shape[1])])


def store_pieces(values: jax.Array, pieces: Any, target: Any) -> None:
    """Issues the copies of a matrix [rows, width] to device memory by way of shared memory."""
    for i, column in enumerate(range(0, values.shape[1], PIECE)):
        pieces[i] = values[:, column : column + PIECE]
    plgpu.commit_smem()
    for i, column in enumerate(range(0, values.shape[1], PIECE)):
        plgpu.copy_smem_to_gmem(pieces.at[i], target.at[:, pl.ds(column, PIECE)])
