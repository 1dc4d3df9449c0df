"""Scatter-add for Hopper: rows sorted by id, two levels of blocks (the order is
schedule.py's).

A CTA makes one tile of one sum and ends, and the GPU starts the next one where there is room: sums
differ in length, and most destinations of an embedding have no rows at all.

R rows, N destinations; a width of D columns is seen as D / 128 lines of 128, C lines to a tile.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _common, _mosaic
from pallas_kernels.scatter_add.schedule import BLOCK, FAN, plan

MAX_LINES = 16  # lines that a CTA sums at a time
LINE = 128  # columns; one to a thread of a warpgroup
VECTOR = 4  # columns that a thread loads and stores at a time, where lines allow it
UNROLL = 4  # rows in flight
FEW = 2  # blocks in flight where rows are summed, too: fewer registers, so more CTAs to an SM


def tile_lines(num_lines: int) -> int:
    """Lines of a tile: the most that divide the width."""
    return max(c for c in range(1, MAX_LINES + 1) if num_lines % c == 0)


def _add_run(
    total_CL: jax.Array,
    low: Any,
    high: Any,
    load: Callable[[list[Any]], list[jax.Array]],
    unroll: int = UNROLL,
) -> jax.Array:
    """total + row(low) + row(low + 1) + ..., one after the other, `unroll` loads in flight.

    A last group of fewer rows loads its last row again instead of waiting for each in turn.
    """
    groups = lax.div(high - low + (unroll - 1), jnp.int32(unroll))

    def add_group(i: jax.Array, total_CL: jax.Array) -> jax.Array:
        first = low + unroll * i
        rows = load([first] + [jnp.minimum(first + u, high - 1) for u in range(1, unroll)])
        total_CL += rows[0].astype(jnp.float32)
        for u in range(1, unroll):
            inside = jnp.broadcast_to(first + u < high, total_CL.shape)
            total_CL = jnp.where(inside, total_CL + rows[u].astype(jnp.float32), total_CL)
        return total_CL

    return lax.fori_loop(0, groups, add_group, total_CL)


def _bounds(start: Any, end: Any, step: int) -> tuple[Any, Any, Any, Any]:
    """[start, end) cut at multiples of step: end of the head, first and past-the-last whole block,
    start of the tail. Without a whole block all of it is head.
    """
    up, down = lax.div(start + step - 1, jnp.int32(step)), lax.div(end, jnp.int32(step))
    whole = up < down
    return (
        jnp.where(whole, up * step, end),
        up,
        jnp.maximum(down, up),
        jnp.where(whole, down * step, end),
    )


class _Tile(NamedTuple):
    """A CTA's share: which sum it makes, of which lines, how it loads them, and zeros."""

    index: jax.Array
    window: Any
    load: Callable[[Any, list[Any]], list[jax.Array]]
    zeros_CL: jax.Array


def _tile(num_lines: int) -> _Tile:
    lines = tile_lines(num_lines)
    index, tile = _mosaic.divmod_by(lax.axis_index("cta"), num_lines // lines)
    window = pl.ds(pl.multiple_of(tile * lines, lines), lines)
    layout = plgpu.Layout.WG_STRIDED((lines, LINE), VECTOR if lines % VECTOR == 0 else 1)

    def load(ref: Any, rows: list[Any]) -> list[jax.Array]:
        return [plgpu.load(ref.at[row, window], layout=layout) for row in rows]

    zeros_CL = plgpu.layout_cast(jnp.zeros((lines, LINE), jnp.float32), layout)
    return _Tile(index, window, load, zeros_CL)


def _gather(tile: _Tile, values: Any, row_R: Any, positions: list[Any]) -> list[jax.Array]:
    """Loads values by sorted position; all row numbers first, so that their latencies overlap."""
    return tile.load(values, [row_R[p] for p in positions])


def _blocks_kernel(values: Any, row_R: Any, id_R: Any, out: Any, *, num_rows: int) -> None:
    """Sums of the blocks of rows that belong to one destination; the others stay unwritten."""
    tile = _tile(out.shape[1])
    first = tile.index * BLOCK
    owner = id_R[first]

    @pl.when((owner == id_R[first + BLOCK - 1]) & (owner < num_rows))
    def _() -> None:
        load = functools.partial(_gather, tile, values, row_R)
        out[tile.index, tile.window] = _add_run(tile.zeros_CL, first, first + BLOCK, load)


def _fans_kernel(blocks: Any, id_R: Any, out: Any, *, num_rows: int) -> None:
    """Sums of FAN blocks that belong to one destination; the others stay unwritten."""
    tile = _tile(out.shape[1])
    first = tile.index * FAN
    owner = id_R[first * BLOCK]

    @pl.when((owner == id_R[(first + FAN) * BLOCK - 1]) & (owner < num_rows))
    def _() -> None:
        load = functools.partial(tile.load, blocks)
        out[tile.index, tile.window] = _add_run(tile.zeros_CL, first, first + FAN, load)


def _destinations_kernel(
    values: Any, row_R: Any, start_N1: Any, blocks: Any, fans: Any, out: Any
) -> None:
    """The sum of every destination, zero where it has no rows."""
    tile = _tile(out.shape[1])
    num_blocks, num_fans = values.shape[0] // BLOCK, values.shape[0] // (BLOCK * FAN)
    start, end = start_N1[tile.index], start_N1[tile.index + 1]
    head, first_block, last_block, tail = _bounds(start, end, BLOCK)
    load_rows = functools.partial(_gather, tile, values, row_R)
    load_blocks = functools.partial(tile.load, blocks)
    total_CL = _add_run(tile.zeros_CL, start, head, load_rows)
    if num_blocks:
        block_head, first_fan, last_fan, block_tail = _bounds(first_block, last_block, FAN)
        total_CL = _add_run(total_CL, first_block, block_head, load_blocks, FEW)
        if num_fans:
            load_fans = functools.partial(tile.load, fans)
            total_CL = _add_run(total_CL, first_fan, last_fan, load_fans, FEW)
        total_CL = _add_run(total_CL, block_tail, last_block, load_blocks, FEW)
        total_CL = _add_run(total_CL, tail, end, load_rows)
    out[tile.index, tile.window] = total_CL


def sum_by_id(values_RD: jax.Array, ids_R: jax.Array, num_rows: int) -> jax.Array:
    """[num_rows, D] float32 sums of the rows of each id; D is a multiple of 128."""
    num_values, width = values_RD.shape
    num_lines = width // LINE
    values = values_RD.reshape(num_values, num_lines, LINE)
    row_R, id_R, start_N1 = plan(ids_R, num_rows)

    def call(body: Any, rows: int, *operands: jax.Array) -> jax.Array:
        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((rows, num_lines, LINE), jnp.float32),
            grid=(rows * (num_lines // tile_lines(num_lines)),),
            grid_names=("cta",),
            kernel_name="scatter_add",
        )(*operands)

    blocks = fans = jnp.zeros((1, num_lines, LINE), jnp.float32)
    if num_values >= BLOCK:
        body = functools.partial(_blocks_kernel, num_rows=num_rows)
        blocks = call(body, num_values // BLOCK, values, row_R, id_R)
    if num_values >= BLOCK * FAN:
        body = functools.partial(_fans_kernel, num_rows=num_rows)
        fans = call(body, num_values // (BLOCK * FAN), blocks, id_R)
    out = call(_destinations_kernel, num_rows, values, row_R, start_N1, blocks, fans)
    out = _common.vary(out, _common.varying_axes(values_RD))
    return out.reshape(num_rows, width)
