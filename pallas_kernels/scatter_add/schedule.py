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
from jax import lax

from pallas_kernels import _common

BLOCK = 64  # rows of a block
FAN = 32  # blocks of a block of blocks


class Plan(NamedTuple):
    """The ids in order: which row stands where, whose it is, where each destination begins."""

    row_R: jax.Array
    id_R: jax.Array  # N for rows that are dropped
    start_N1: jax.Array


def plan(ids_R: jax.Array, num_rows: int) -> Plan:
    """Sorts the rows by id, equal ids in order of rows."""
    num_values = ids_R.shape[0]
    ids_R = ids_R.astype(jnp.int32)
    ids_R = jnp.where((ids_R >= 0) & (ids_R < num_rows), ids_R, num_rows)
    # Integers sum to the same in any order. Counting takes half the time of a binary search.
    counts_N = jnp.zeros(num_rows, jnp.int32).at[ids_R].add(1, mode="drop")
    start_N1 = jnp.pad(jnp.cumsum(counts_N, dtype=jnp.int32), (1, 0))
    # A radix sort takes its time by the bits of its keys.
    keys_R = ids_R.astype(jnp.uint16 if num_rows < 2**16 else jnp.uint32)
    position_R = jnp.arange(num_values, dtype=jnp.int32)
    position_R = _common.vary(position_R, _common.varying_axes(ids_R))
    keys_R, row_R = lax.sort((keys_R, position_R), num_keys=1, is_stable=True)
    return Plan(row_R, keys_R.astype(jnp.int32), start_N1)
