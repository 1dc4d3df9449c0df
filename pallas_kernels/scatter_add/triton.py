"""Scatter-add for GPUs before Hopper, in the order of schedule.py: the bits are those of Mosaic's.

R rows, N destinations, D width.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import _triton
from pallas_kernels.scatter_add.schedule import BLOCK, FAN, plan

MAX_TILE = 2048  # columns of a program
WARPS = 4


@triton.jit
def _add_run(total, source, row_of, low, high, columns, WIDTH: tl.constexpr, GATHER: tl.constexpr):
    """total + row(low) + row(low + 1) + ..., one after the other, four loads in flight."""
    for i in tl.range(low, high, loop_unroll_factor=4):
        row = tl.load(row_of + i) if GATHER else i
        pointers = source + row.to(tl.int64) * WIDTH + columns
        total += tl.load(pointers, mask=columns < WIDTH, other=0.0).to(tl.float32)
    return total


@triton.jit
def _bounds(start, end, STEP: tl.constexpr):
    """[start, end) cut at multiples of step: end of the head, first and past-the-last whole block,
    start of the tail.
    """
    up, down = (start + STEP - 1) // STEP, end // STEP
    head = tl.minimum(up * STEP, end)
    return head, up, tl.maximum(down, up), tl.maximum(down * STEP, head)


@triton.jit
def _owned_kernel(
    source,
    row_R,
    id_R,
    out,
    NUM_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    SPAN: tl.constexpr,
    GATHER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums of COUNT rows of source, which stand for SPAN values, where those belong to one
    destination; the others stay unwritten.
    """
    tiles: tl.constexpr = (WIDTH + TILE - 1) // TILE
    block = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    owner = tl.load(id_R + block * SPAN)
    if (owner == tl.load(id_R + block * SPAN + SPAN - 1)) & (owner < NUM_ROWS):
        total = tl.zeros((TILE,), tl.float32)
        first = block * COUNT
        total = _add_run(total, source, row_R, first, first + COUNT, columns, WIDTH, GATHER)
        tl.store(out + block.to(tl.int64) * WIDTH + columns, total, mask=columns < WIDTH)


@triton.jit
def _destinations_kernel(
    values,
    row_R,
    start_N1,
    blocks,
    fans,
    out,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FAN: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sum of every destination, zero where it has no rows."""
    tiles: tl.constexpr = (WIDTH + TILE - 1) // TILE
    n = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    start, end = tl.load(start_N1 + n), tl.load(start_N1 + n + 1)
    total = tl.zeros((TILE,), tl.float32)
    head, first_block, last_block, tail = _bounds(start, end, BLOCK)
    block_head, first_fan, last_fan, block_tail = _bounds(first_block, last_block, FAN)
    total = _add_run(total, values, row_R, start, head, columns, WIDTH, True)
    total = _add_run(total, blocks, row_R, first_block, block_head, columns, WIDTH, False)
    total = _add_run(total, fans, row_R, first_fan, last_fan, columns, WIDTH, False)
    total = _add_run(total, blocks, row_R, block_tail, last_block, columns, WIDTH, False)
    total = _add_run(total, values, row_R, tail, end, columns, WIDTH, True)
    tl.store(out + n.to(tl.int64) * WIDTH + columns, total, mask=columns < WIDTH)


def sum_by_id(values_RD: jax.Array, ids_R: jax.Array, num_rows: int) -> jax.Array:
    """[num_rows, D] float32 sums of the rows of each id."""
    num_values, width = values_RD.shape
    row_R, id_R, start_N1 = plan(ids_R, num_rows)
    tile = min(MAX_TILE, triton.next_power_of_2(width))
    tiles = triton.cdiv(width, tile)

    def launch(kernel, rows: int, *operands: jax.Array, **constants: int) -> jax.Array:
        return _triton.launch(
            kernel,
            operands,
            out=jax.ShapeDtypeStruct((rows, width), jnp.float32),
            programs=rows * tiles,
            warps=WARPS,
            WIDTH=width,
            TILE=tile,
            **constants,
        )

    def owned(source: jax.Array, count: int, span: int) -> jax.Array:
        if num_values < span:  # never read
            return jnp.zeros((1, width), jnp.float32)
        return launch(
            _owned_kernel,
            num_values // span,
            source,
            row_R,
            id_R,
            NUM_ROWS=num_rows,
            COUNT=count,
            SPAN=span,
            GATHER=source is values_RD,
        )

    blocks = owned(values_RD, BLOCK, BLOCK)
    fans = owned(blocks, FAN, BLOCK * FAN)
    operands = values_RD, row_R, start_N1, blocks, fans
    return launch(_destinations_kernel, num_rows, *operands, BLOCK=BLOCK, FAN=FAN)
