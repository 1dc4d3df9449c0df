"""The order in which scatter-add's kernels add: rows sorted by id, summed in two levels of blocks.

Blocks are aligned to the sorted position, not to the destination: block b is sorted rows
[64 b, 64 b + 64). A block whose first and last row have the same id belongs to one destination, and
its sum is made on its own; so are the sums of 32 such blocks. A destination then adds, one after
the other: rows up to the first block, blocks up to the first block of blocks, those, the blocks and
the rows left. Its longest chain is 126 rows, 62 blocks and R / 2048 blocks of blocks, however the
ids are spread. The order is a function of the ids alone: no atomics, and neither the grid, the
width of a tile nor the kind of kernel changes a bit.

R rows, N destinations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import _common

BLOCK = 64  # rows of a block
FAN = 32  # blocks of a block of blocks
CHUNK = 512  # rows that are compared with each other
MAX_COUNTERS = 2**23  # every id has one in every chunk; 32 MiB


class Plan(NamedTuple):
    """The ids in order: which row stands where, whose it is, where each destination begins."""

    row_R: jax.Array
    id_R: jax.Array  # N for rows that are dropped
    start_N1: jax.Array


def plan(ids_R: jax.Array, num_rows: int) -> Plan:
    """The rows in order of their int32 ids in [0, N], equal ids in order of rows; N is dropped."""
    chunks = -(-ids_R.shape[0] // CHUNK)
    few = chunks * num_rows <= MAX_COUNTERS
    return _plan_by_counting(ids_R, num_rows) if few else _plan_by_sorting(ids_R, num_rows)


def _plan_by_counting(ids_R: jax.Array, num_rows: int) -> Plan:
    """A row stands where its id begins, behind the rows of its id in earlier chunks and in its own.

    A radix sort computes as long, but XLA launches it in many parts, outside of a CUDA graph.
    C chunks, B rows of a chunk.
    """
    num_values = ids_R.shape[0]
    missing = -num_values % CHUNK
    ids_CB = jnp.pad(ids_R, (0, missing), constant_values=num_rows).reshape(-1, CHUNK)
    chunks = ids_CB.shape[0]
    chunk_C1 = jnp.arange(chunks, dtype=jnp.int32)[:, None]
    counter_CB = jnp.where(ids_CB < num_rows, chunk_C1 * num_rows + ids_CB, chunks * num_rows)
    # Integers sum to the same in any order.
    counts_CN = jnp.zeros(chunks * num_rows, jnp.int32).at[counter_CB].add(1, mode="drop")
    counts_CN = counts_CN.reshape(chunks, num_rows)
    upto_CN = jnp.cumsum(counts_CN, axis=0, dtype=jnp.int32)
    start_N1 = jnp.pad(jnp.cumsum(upto_CN[-1], dtype=jnp.int32), (1, 0))
    first_CN = upto_CN - counts_CN + start_N1[None, :-1]

    same_CBB = (ids_CB[:, :, None] == ids_CB[:, None, :]) & np.tri(CHUNK, k=-1, dtype=bool)[None]
    inside_CB = jnp.minimum(counter_CB, chunks * num_rows - 1)
    place_CB = _take(first_CN.reshape(-1), inside_CB) + same_CBB.sum(-1, dtype=jnp.int32)
    place_R = jnp.where(ids_CB < num_rows, place_CB, num_values).reshape(-1)[:num_values]
    position_R = jnp.arange(num_values, dtype=jnp.int32)
    row_R = jnp.zeros(num_values, jnp.int32)
    row_R = row_R.at[place_R].set(position_R, mode="drop", unique_indices=True)
    id_R = jnp.where(position_R < start_N1[-1], _take(ids_R, row_R), num_rows)
    return Plan(row_R, id_R, start_N1)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


def _plan_by_sorting(ids_R: jax.Array, num_rows: int) -> Plan:
    num_values = ids_R.shape[0]
    # Counting takes half the time of a binary search.
    counts_N = jnp.zeros(num_rows, jnp.int32).at[ids_R].add(1, mode="drop")
    start_N1 = jnp.pad(jnp.cumsum(counts_N, dtype=jnp.int32), (1, 0))
    # A radix sort takes its time by the bits of its keys.
    keys_R = ids_R.astype(jnp.uint16 if num_rows < 2**16 else jnp.uint32)
    position_R = jnp.arange(num_values, dtype=jnp.int32)
    position_R = _common.vary(position_R, _common.varying_axes(ids_R))
    keys_R, row_R = lax.sort((keys_R, position_R), num_keys=1, is_stable=True)
    return Plan(row_R, keys_R.astype(jnp.int32), start_N1)
