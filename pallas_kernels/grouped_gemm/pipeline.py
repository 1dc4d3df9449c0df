"""The skeleton of the Mosaic grouped GEMM: one warpgroup loads, two multiply and store, forever.

Persistent and warp-specialised. The loading warpgroup runs over the steps of all its tiles without
a break, so the next tile's operands arrive while this one is stored. Clusters of two CTAs share one
operand by TMA multicast. No atomics, and the order of every sum is that of its steps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic
from pallas_kernels.grouped_gemm.schedule import CHUNK, TILE_COLUMNS

COMPUTE_WARPGROUPS = 2
LOADER = 2  # index of the loading warpgroup
STAGES = 4  # steps in flight between the loads and the tensor cores
SLOTS = 2  # store buffers of a warpgroup
# 24 + 2 * 240 registers a thread: what an SM has for 3 * 128 threads.
LOADER_REGISTERS, COMPUTE_REGISTERS = 24, 240


class Buffers(NamedTuple):
    """Shared memory: operands by stage, store buffers by warpgroup and slot, barriers by stage."""

    lhs: Any
    rhs: Any
    out: Any
    full: Any
    empty: Any


class Work(NamedTuple):
    """What a kernel puts into the skeleton; `tile` is what `locate` returns.

    Attributes:
      zero: of the tables' type: under shard_map they vary over its axes, and so must what a loop
        carries.
      count: tiles of this CTA.
      locate: number of a tile -> tile.
      steps: tile -> steps along its contracted dimension.
      load: (tile, step, lhs buffer, rhs buffer, barrier), issues the two copies.
      operands: (lhs buffer, rhs buffer) -> this warpgroup's operands of the wgmma.
      target: tile -> where this warpgroup's part of the tile goes.
      window: (matrix, rows, columns) -> that part of the output in device memory.
      finish: called once after the last tile.
      adds: whether the output holds numbers already, to which the tiles are added.
    """

    zero: jax.Array
    count: jax.Array
    locate: Callable[..., Any]
    steps: Callable[..., Any]
    load: Callable[..., None]
    operands: Callable[..., tuple[Any, Any]]
    target: Callable[..., "Target"]
    window: Callable[..., Any]
    finish: Callable[[], None]
    adds: bool = False


class Target(NamedTuple):
    """Rows [row + low, row + high) from `column` on, of matrix `matrix` of the output."""

    matrix: jax.Array
    row: jax.Array
    column: jax.Array
    low: jax.Array
    high: jax.Array


def epilogue_columns(dtype: Any) -> int:
    """Columns of one store buffer, a swizzled row of shared memory."""
    return _mosaic.SWIZZLE_BYTES // jnp.dtype(dtype).itemsize


def buffer_types(
    lhs_block: tuple[int, int], rhs_block: tuple[int, int], dtypes: tuple[Any, Any]
) -> Buffers:
    """Scratch of the kernel; dtypes are those of operands and output."""
    dtype, out_dtype = dtypes
    out_block = (COMPUTE_WARPGROUPS, SLOTS, CHUNK, epilogue_columns(out_dtype))
    return Buffers(
        lhs=plgpu.SMEM((STAGES, *lhs_block), dtype, transforms=_mosaic.tiled(dtype)),
        rhs=plgpu.SMEM((STAGES, *rhs_block), dtype, transforms=_mosaic.tiled(dtype)),
        out=plgpu.SMEM(out_block, out_dtype, transforms=_mosaic.tiled(out_dtype, rows=1)),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        # Released by both warpgroups of both CTAs: the operand they share is written to both.
        empty=plgpu.ClusterBarrier(
            collective_axes=("pair",),
            num_arrivals=COMPUTE_WARPGROUPS,
            num_barriers=STAGES,
        ),
    )


def _load_all(work: Work, buffers: Buffers) -> None:
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

    def slot_of(step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(STAGES))

    def load_tile(i: jax.Array, first: jax.Array) -> jax.Array:
        tile = work.locate(i)
        steps = work.steps(tile)

        def load_step(k: jax.Array, _: None) -> None:
            slot = slot_of(first + k)
            plgpu.barrier_wait(buffers.empty.at[slot])
            full = buffers.full.at[slot]
            work.load(tile, k, buffers.lhs.at[slot], buffers.rhs.at[slot], full)

        lax.fori_loop(0, steps, load_step, None)
        return first + steps + work.zero

    total = lax.fori_loop(0, work.count, load_tile, work.zero)

    # Every slot holds one release that nobody took. Take it: no CTA may leave while the other of
    # its cluster can still write into it or signal it.
    def drain(k: jax.Array, _: None) -> None:
        plgpu.barrier_wait(buffers.empty.at[slot_of(total + k)])

    lax.fori_loop(0, STAGES, drain, None)


def _multiply_all(work: Work, buffers: Buffers) -> None:
    slots = buffers.out.at[lax.axis_index("warpgroup")]
    dtype, width = buffers.out.dtype, buffers.out.shape[3]
    parts = TILE_COLUMNS // width
    # A whole 16-bit tile is kept in registers and stored while the next one is multiplied. There is
    # no room for a 32-bit one.
    behind = jnp.dtype(dtype).itemsize == 2
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

    def release(step: jax.Array) -> None:
        plgpu.barrier_arrive(buffers.empty.at[lax.rem(step, jnp.int32(STAGES))])

    for slot in range(STAGES):  # every slot starts out free
        plgpu.barrier_arrive(buffers.empty.at[slot])

    def store(part: int, values: jax.Array, place: tuple[Any, ...]) -> None:
        matrix, row, column = place
        slot = slots.at[part % SLOTS]
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        slot[...] = values[:, part * width : (part + 1) * width]
        plgpu.commit_smem()
        # The loop's carry forgot that the column is a multiple.
        columns = pl.ds(pl.multiple_of(column, width) + part * width, width)
        window = work.window(matrix, pl.ds(row, CHUNK), columns)
        copy = _mosaic.add_smem_to_gmem if work.adds else plgpu.copy_smem_to_gmem
        copy(slot, window)

    def multiply_tile(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        first, values, waiting, place = carry
        tile = work.locate(i)
        steps, target = work.steps(tile), work.target(tile)
        # A warpgroup without rows in the tile leaves the tensor cores to the other.
        mine = jnp.where(target.high > target.low, steps, 0)

        def accumulate(acc_ref: Any) -> jax.Array:
            def multiply_step(k: jax.Array, _: None) -> None:
                slot = lax.rem(first + k, jnp.int32(STAGES))
                plgpu.barrier_wait(buffers.full.at[slot])
                plgpu.wgmma(acc_ref, *work.operands(buffers.lhs.at[slot], buffers.rhs.at[slot]))
                for part in range(parts if behind else 0):
                    now = waiting & (k == part)
                    pl.when(now)(functools.partial(store, part, values, place))
                plgpu.wgmma_wait(1)  # the step before is done with its buffers
                pl.when(k > 0)(lambda: release(first + k - 1))

            lax.fori_loop(0, mine, multiply_step, None)
            plgpu.wgmma_wait(0)
            pl.when(mine > 0)(lambda: release(first + mine - 1))

            def pass_step(k: jax.Array, _: None) -> None:
                slot = lax.rem(first + k, jnp.int32(STAGES))
                plgpu.barrier_wait(buffers.full.at[slot])
                plgpu.barrier_arrive(buffers.empty.at[slot])

            lax.fori_loop(mine, steps, pass_step, None)
            for part in range(parts if behind else 0):
                late = waiting & (part >= mine)
                pl.when(late)(functools.partial(store, part, values, place))
            return acc_ref[...].astype(dtype)

        values = pl.run_scoped(accumulate, plgpu.ACC((CHUNK, TILE_COLUMNS), jnp.float32))
        place = tuple(x + work.zero for x in (target.matrix, target.row, target.column))
        whole = (target.low <= work.zero) & (target.high >= CHUNK)
        if not behind:

            @pl.when(whole)
            def _() -> None:
                for part in range(parts):
                    store(part, values, place)

        pl.when(jnp.logical_not(whole))(lambda: _store_rows(values, slots, work, target))
        return first + steps + work.zero, values if behind else carry[1], whole, place

    zero = work.zero
    values = jnp.zeros((CHUNK, TILE_COLUMNS if behind else width), dtype)
    values = plgpu.layout_cast(values, plgpu.Layout.WGMMA)
    carry = (zero, values, zero > 0, (zero, zero, zero))
    _, values, waiting, place = lax.fori_loop(0, work.count, multiply_tile, carry)
    for part in range(parts if behind else 0):
        pl.when(waiting)(functools.partial(store, part, values, place))
    work.finish()
    plgpu.wait_smem_to_gmem(0)


def _store_rows(values: jax.Array, slots: Any, work: Work, target: Target) -> None:
    """Stores rows [low, high) of a warpgroup's part of a tile.

    TMA boxes have static sizes: one box per set bit of the number of rows. None touches a row
    outside the range, which may belong to another group.
    """
    low, high = jnp.maximum(target.low, 0), jnp.minimum(target.high, CHUNK)
    num_slots, _, width = slots.shape

    @pl.when(high > low)
    def _() -> None:
        for i, offset in enumerate(range(0, values.shape[1], width)):
            slot = slots.at[i % num_slots]
            window = functools.partial(work.window, columns=pl.ds(target.column + offset, width))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            slot[...] = values[:, offset : offset + width]
            plgpu.commit_smem()
            count, start = high - low, low
            for size in (32, 16, 8, 4, 2, 1):

                @pl.when(lax.bitwise_and(count, jnp.int32(size)) != 0)
                def _(
                    slot: Any = slot, window: Any = window, size: int = size, start: Any = start
                ) -> None:
                    rows = pl.ds(target.row + start, size)
                    part = slot.at[pl.ds(start, size)]
                    plgpu.copy_smem_to_gmem(part, window(target.matrix, rows))

                start = start + lax.bitwise_and(count, jnp.int32(size))


def run(work: Work, buffers: Buffers) -> None:
    """Runs the three warpgroups of a CTA over its tiles."""
    lax.cond(
        lax.axis_index("warpgroup") == LOADER,
        lambda: _load_all(work, buffers),
        lambda: _multiply_all(work, buffers),
    )
