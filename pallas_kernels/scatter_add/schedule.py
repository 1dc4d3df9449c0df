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
GROUP = 16  # chunks of a group
MAX_COUNTERS = 2**23  # every id has one in every chunk; 32 MiB


class Plan(NamedTuple):
    """The ids in order: which row stands where, whose it is, where each destination begins."""

    row_R: jax.Array
    id_R: jax.Array  # N for rows that are dropped
    start_N1: jax.Array


def plan(ids_R: jax.Array, num_rows: int) -> Plan:
    """The rows in order of id, equal ids in order of rows."""
    ids_R = ids_R.astype(jnp.int32)
    ids_R = jnp.where((ids_R >= 0) & (ids_R < num_rows), ids_R, num_rows)
    chunks = -(-ids_R.shape[0] // CHUNK)
    few = 0 < chunks <= GROUP**2 and chunks * num_rows <= MAX_COUNTERS
    return _plan_by_counting(ids_R, num_rows) if few else _plan_by_sorting(ids_R, num_rows)


def _plan_by_counting(ids_R: jax.Array, num_rows: int) -> Plan:
    """A row stands where its id begins, behind the rows of its id in earlier groups of chunks, in
    earlier chunks of its group, and in its own chunk.

    A radix sort computes as long, but XLA launches it in many parts, outside of a CUDA graph.
    """
    num_values = ids_R.shape[0]
    group = min(GROUP, -(-num_values // CHUNK))
    groups = -(-num_values // (CHUNK * group))
    ids = jnp.pad(ids_R, (0, groups * group * CHUNK - num_values), constant_values=num_rows)
    chunk = jnp.arange(ids.shape[0], dtype=jnp.int32) // CHUNK
    counter = jnp.where(ids < num_rows, chunk * num_rows + ids, groups * group * num_rows)
    # Integers sum to the same in any order.
    counts = jnp.zeros(groups * group * num_rows, jnp.int32).at[counter].add(1, mode="drop")
    of_group = counts.reshape(groups, group, num_rows).sum(1, dtype=jnp.int32)
    of_group = lax.optimization_barrier(of_group)  # else made anew for each use
    start_N1 = jnp.pad(jnp.cumsum(of_group.sum(0, dtype=jnp.int32), dtype=jnp.int32), (1, 0))

    id_or_any = jnp.minimum(ids, num_rows - 1)
    place = _rank_in_chunk(ids) + _take(start_N1, id_or_any)
    for g in range(groups - 1):
        earlier = _take(of_group[g], id_or_any)
        place += jnp.where(g < chunk // group, earlier, 0)
    for c in range(group - 1):
        first = chunk - chunk % group
        earlier = _take(counts, (first + c) * num_rows + id_or_any)
        place += jnp.where(c < chunk % group, earlier, 0)
    place = jnp.where(ids < num_rows, place, num_values)[:num_values]
    position_R = jnp.arange(num_values, dtype=jnp.int32)
    row_R = jnp.zeros(num_values, jnp.int32)
    row_R = row_R.at[place].set(position_R, mode="drop", unique_indices=True)
    id_R = jnp.where(position_R < start_N1[-1], _take(ids_R, row_R), num_rows)
    return Plan(row_R, id_R, start_N1)


def _rank_in_chunk(ids: jax.Array) -> jax.Array:
    """How many rows with the same id stand before each row in its chunk."""
    chunks = ids.reshape(-1, CHUNK)
    before = np.tri(CHUNK, k=-1, dtype=bool)
    same = (chunks[:, :, None] == chunks[:, None, :]) & before[None]
    return same.sum(-1, dtype=jnp.int32).reshape(-1)


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
