"""Scatter-add for Hopper: rows sorted by id, two levels of blocks (the order is
schedule.py's).

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

UNROLL = 4  # rows in flight
MAX_LINES = 16  # lines that a CTA sums at a time
CTAS_PER_SM = 4
WAVES = 4  # of CTAs in the last kernel: where one has long sums, others take its place in the queue
LINE = 128  # columns; one to a thread of a warpgroup
VECTOR = 4  # columns that a thread loads at a time
SLOTS = 2  # store buffers, beside one of zeros


def tile_lines(num_lines: int) -> int:
    """Lines of a tile: the most that divide the width."""
    return max(c for c in range(1, MAX_LINES + 1) if num_lines % c == 0)


def _add_run(
    total_CL: jax.Array, low: Any, high: Any, load: Callable[[list[Any]], list[jax.Array]]
) -> jax.Array:
    """total + row(low) + row(low + 1) + ..., one after the other, UNROLL loads in flight.

    A last group of fewer rows loads its last row again instead of waiting for each in turn.
    """
    groups = lax.div(high - low + (UNROLL - 1), jnp.int32(UNROLL))

    def add_group(i: jax.Array, total_CL: jax.Array) -> jax.Array:
        first = low + UNROLL * i
        rows = load([first] + [jnp.minimum(first + u, high - 1) for u in range(1, UNROLL)])
        total_CL += rows[0].astype(jnp.float32)
        for u in range(1, UNROLL):
            inside = jnp.broadcast_to(first + u < high, total_CL.shape)
            total_CL = jnp.where(inside, total_CL + rows[u].astype(jnp.float32), total_CL)
        return total_CL

    return lax.fori_loop(0, groups, add_group, total_CL)


def _bounds(start: Any, end: Any, step: int) -> tuple[Any, Any, Any, Any]:
    """[start, end) cut at multiples of step: end of the head, first and past-the-last whole block,
    start of the tail.
    """
    up, down = lax.div(start + step - 1, jnp.int32(step)), lax.div(end, jnp.int32(step))
    head = jnp.minimum(up * step, end)
    return head, up, jnp.maximum(down, up), jnp.maximum(down * step, head)


class _Tiles(NamedTuple):
    """A kernel's tiles of lines: their window, how to load rows of one, store its sum, and zeros.

    Stores go through shared memory: from registers they would be scattered words.
    """

    window: Callable[[Any], Any]
    load: Callable[[Any, list[Any], Any], list[jax.Array]]
    store: Callable[..., None]
    zeros_CL: jax.Array


def _tiles(buffers: Any) -> _Tiles:
    _, lines, _ = buffers.shape
    layout = plgpu.Layout.WG_STRIDED((lines, LINE), VECTOR if lines % VECTOR == 0 else 1)

    def window(tile: Any) -> Any:
        return pl.ds(pl.multiple_of(tile * lines, lines), lines)

    def load(ref: Any, rows: list[Any], tile: Any) -> list[jax.Array]:
        return [plgpu.load(ref.at[row, window(tile)], layout=layout) for row in rows]

    def store(out_ref: Any, total_CL: jax.Array, *, slot: Any = 0, in_flight: int = 0) -> None:
        buffer = buffers.at[slot]
        plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
        buffer[...] = total_CL
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out_ref)

    zeros_CL = plgpu.layout_cast(jnp.zeros((lines, LINE), jnp.float32), layout)
    return _Tiles(window, load, store, zeros_CL)


def _grid(waves: int = 1) -> int:
    return _mosaic.num_sms() * CTAS_PER_SM * waves


def _my_items(count: int, waves: int = 1) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """How many of the items this CTA takes, and which is its i-th."""
    cta, ctas = lax.axis_index("cta"), jnp.int32(_grid(waves))
    return lax.div(count - cta + ctas - 1, ctas), lambda i: cta + i * ctas


def _for_my_items(count: int, body: Callable[[jax.Array], None]) -> None:
    mine, item_of = _my_items(count)
    lax.fori_loop(0, mine, lambda i, _: body(item_of(i)), None)
    plgpu.wait_smem_to_gmem(0)


def _blocks_kernel(
    values: Any, row_R: Any, id_R: Any, out: Any, buffers: Any, *, num_rows: int
) -> None:
    """Sums of the blocks of rows that belong to one destination; the others stay unwritten."""
    tiles = _tiles(buffers)

    def body(item: jax.Array) -> None:
        block, tile = _mosaic.divmod_by(item, out.shape[1] // buffers.shape[1])
        first = block * BLOCK
        owner = id_R[first]

        @pl.when((owner == id_R[first + BLOCK - 1]) & (owner < num_rows))
        def _() -> None:
            load = functools.partial(_gather, tiles, values, row_R, tile)
            total_CL = _add_run(tiles.zeros_CL, first, first + BLOCK, load)
            tiles.store(out.at[block, tiles.window(tile)], total_CL)

    _for_my_items(out.shape[0] * (out.shape[1] // buffers.shape[1]), body)


def _gather(
    tiles: _Tiles, values: Any, row_R: Any, tile: Any, positions: list[Any]
) -> list[jax.Array]:
    """Loads values by sorted position; all row numbers first, so that their latencies overlap."""
    return tiles.load(values, [row_R[p] for p in positions], tile)


def _fans_kernel(blocks: Any, id_R: Any, out: Any, buffers: Any, *, num_rows: int) -> None:
    """Sums of FAN blocks that belong to one destination; the others stay unwritten."""
    tiles = _tiles(buffers)

    def body(item: jax.Array) -> None:
        fan, tile = _mosaic.divmod_by(item, out.shape[1] // buffers.shape[1])
        owner = id_R[fan * FAN * BLOCK]

        @pl.when((owner == id_R[(fan + 1) * FAN * BLOCK - 1]) & (owner < num_rows))
        def _() -> None:
            load = functools.partial(tiles.load, blocks, tile=tile)
            total_CL = _add_run(tiles.zeros_CL, fan * FAN, (fan + 1) * FAN, load)
            tiles.store(out.at[fan, tiles.window(tile)], total_CL)

    _for_my_items(out.shape[0] * (out.shape[1] // buffers.shape[1]), body)


def _destinations_kernel(
    values: Any, row_R: Any, start_N1: Any, blocks: Any, fans: Any, out: Any, buffers: Any
) -> None:
    """The sum of every destination, zero where it has no rows."""
    tiles, slots = _tiles(buffers), buffers.shape[0] - 1
    num_rows, num_tiles = out.shape[0], out.shape[1] // buffers.shape[1]
    num_blocks, num_fans = values.shape[0] // BLOCK, values.shape[0] // (BLOCK * FAN)
    mine, item_of = _my_items(num_rows * num_tiles, WAVES)
    buffers[slots] = tiles.zeros_CL  # the last buffer: most destinations of an embedding are empty
    plgpu.commit_smem()

    def bounds_of(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        n = jnp.minimum(lax.div(item_of(i), jnp.int32(num_tiles)), num_rows - 1)
        return start_N1[n], start_N1[n + 1]

    def body(i: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, end = bounds
        next_bounds = bounds_of(i + 1)  # on its way while this item is summed
        n, tile = _mosaic.divmod_by(item_of(i), num_tiles)
        target = out.at[n, tiles.window(tile)]

        @pl.when(start == end)
        def _() -> None:
            plgpu.copy_smem_to_gmem(buffers.at[slots], target)

        @pl.when(start < end)
        def _() -> None:
            head, first_block, last_block, tail = _bounds(start, end, BLOCK)
            load_rows = functools.partial(_gather, tiles, values, row_R, tile)
            load_blocks = functools.partial(tiles.load, blocks, tile=tile)
            total_CL = _add_run(tiles.zeros_CL, start, head, load_rows)
            if num_blocks:
                block_head, first_fan, last_fan, block_tail = _bounds(first_block, last_block, FAN)
                total_CL = _add_run(total_CL, first_block, block_head, load_blocks)
                if num_fans:
                    load_fans = functools.partial(tiles.load, fans, tile=tile)
                    total_CL = _add_run(total_CL, first_fan, last_fan, load_fans)
                total_CL = _add_run(total_CL, block_tail, last_block, load_blocks)
            total_CL = _add_run(total_CL, tail, end, load_rows)
            # Every item is one store: the one that read this slot last is not the latest.
            slot = lax.rem(i, jnp.int32(slots))
            tiles.store(target, total_CL, slot=slot, in_flight=slots - 1)

        return next_bounds

    lax.fori_loop(0, mine, body, bounds_of(jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0)


def sum_by_id(values_RD: jax.Array, ids_R: jax.Array, num_rows: int) -> jax.Array:
    """[num_rows, D] float32 sums of the rows of each id; D is a multiple of 128."""
    num_values, width = values_RD.shape
    num_lines = width // LINE
    values = values_RD.reshape(num_values, num_lines, LINE)
    row_R, id_R, start_N1 = plan(ids_R, num_rows)

    def call(body: Any, rows: int, *operands: jax.Array, waves: int = 1) -> jax.Array:
        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((rows, num_lines, LINE), jnp.float32),
            scratch_types=(plgpu.SMEM((SLOTS + 1, tile_lines(num_lines), LINE), jnp.float32),),
            grid=(_grid(waves),),
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
    operands = values, row_R, start_N1, blocks, fans
    out = call(_destinations_kernel, num_rows, *operands, waves=WAVES)
    out = _common.vary(out, _common.varying_axes(values_RD))
    return out.reshape(num_rows, width)
