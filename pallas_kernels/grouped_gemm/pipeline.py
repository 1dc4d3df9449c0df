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

    operands: tuple[Any, ...]
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
      load: (tile, step, operand buffers, barrier), issues one copy into each buffer.
      multiply: steps -> sums of their products, float32, in pieces of as many columns.
      target: tile -> where this warpgroup's part of the tile goes.
      window: (matrix, rows, columns) -> that part of the output in device memory.
      finish: called once after the last tile.
      adds: whether the output holds numbers already, to which the tiles are added.
      behind: whether a finished tile is kept in registers and stored while the next one is
        multiplied.
    """

    zero: jax.Array
    count: jax.Array
    locate: Callable[..., Any]
    steps: Callable[..., Any]
    load: Callable[..., None]
    multiply: Callable[["Steps"], tuple[jax.Array, ...]]
    target: Callable[..., "Target"]
    window: Callable[..., Any]
    finish: Callable[[], None]
    adds: bool = False
    behind: bool = False


class Steps(NamedTuple):
    """What a warpgroup multiplies of a tile.

    Attributes:
      tile: what `Work.locate` returned.
      count: of steps; 0 for a warpgroup without rows in the tile.
      arrived: step -> its operand buffers, once they are loaded.
      release: step -> None, hands its buffers back to the loader.
      meanwhile: step -> None, stores a part of the tile before. To be called while the step's
        products run, and for every step where `Work.behind` is set: a part whose step leaves it out
        is lost.
    """

    tile: Any
    count: jax.Array
    arrived: Callable[..., tuple[Any, ...]]
    release: Callable[..., None]
    meanwhile: Callable[..., None]


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


def operand_type(block: tuple[int, int], dtype: Any) -> Any:
    """Buffers of an operand of wgmma."""
    return plgpu.SMEM((STAGES, *block), dtype, transforms=_mosaic.tiled(dtype))


def buffer_types(operands: tuple[Any, ...], out_dtype: Any) -> Buffers:
    """Scratch of the kernel."""
    out_block = (COMPUTE_WARPGROUPS, SLOTS, CHUNK, epilogue_columns(out_dtype))
    return Buffers(
        operands=operands,
        out=plgpu.SMEM(out_block, out_dtype, transforms=_mosaic.tiled(out_dtype, rows=1)),
        full=plgpu.Barrier(num_arrivals=len(operands), num_barriers=STAGES),
        # Released by both warpgroups of both CTAs: the operand they share is written to both.
        empty=plgpu.ClusterBarrier(
            collective_axes=("pair",),
            num_arrivals=COMPUTE_WARPGROUPS,
            num_barriers=STAGES,
        ),
    )


def multiply(steps: Steps, operands: Callable[..., tuple[Any, Any]]) -> tuple[jax.Array, ...]:
    """Sums that stay in the tensor cores' accumulators from a tile's first step to its last.

    Args:
      steps: of the tile.
      operands: operand buffers -> this warpgroup's operands of the wgmma.
    """

    def accumulate(acc_ref: Any) -> jax.Array:
        def multiply_step(k: jax.Array, _: None) -> None:
            plgpu.wgmma(acc_ref, *operands(*steps.arrived(k)))
            steps.meanwhile(k)
            plgpu.wgmma_wait(1)  # the step before is done with its buffers
            pl.when(k > 0)(lambda: steps.release(k - 1))

        lax.fori_loop(0, steps.count, multiply_step, None)
        plgpu.wgmma_wait(0)
        pl.when(steps.count > 0)(lambda: steps.release(steps.count - 1))
        return acc_ref[...]

    return (pl.run_scoped(accumulate, plgpu.ACC((CHUNK, TILE_COLUMNS), jnp.float32)),)


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
            operands = tuple(buffer.at[slot] for buffer in buffers.operands)
            work.load(tile, k, operands, buffers.full.at[slot])

        lax.fori_loop(0, steps, load_step, None)
        return first + steps + work.zero

    total = lax.fori_loop(0, work.count, load_tile, work.zero)

    # Every slot holds one release that nobody took. Take it: no CTA may leave while the other of
    # its cluster can still write into it or signal it.
    def drain(k: jax.Array, _: None) -> None:
        plgpu.barrier_wait(buffers.empty.at[slot_of(total + k)])

    lax.fori_loop(0, STAGES, drain, None)


def _columns(pieces: tuple[jax.Array, ...], first: int, width: int) -> jax.Array:
    """Columns [first, first + width) of a tile in pieces of as many columns, within one of them."""
    piece, first = divmod(first, pieces[0].shape[1])
    return pieces[piece][:, first : first + width]


def _multiply_all(work: Work, buffers: Buffers) -> None:
    slots = buffers.out.at[lax.axis_index("warpgroup")]
    dtype, width = buffers.out.dtype, buffers.out.shape[3]
    parts = TILE_COLUMNS // width
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

    def release(step: jax.Array) -> None:
        plgpu.barrier_arrive(buffers.empty.at[lax.rem(step, jnp.int32(STAGES))])

    for slot in range(STAGES):  # every slot starts out free
        plgpu.barrier_arrive(buffers.empty.at[slot])

    def store(part: int, tile: tuple[jax.Array, ...], place: tuple[Any, ...]) -> None:
        matrix, row, column = place
        slot = slots.at[part % SLOTS]
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        slot[...] = _columns(tile, part * width, width)
        plgpu.commit_smem()
        # The loop's carry forgot that the column is a multiple.
        columns = pl.ds(pl.multiple_of(column, width) + part * width, width)
        window = work.window(matrix, pl.ds(row, CHUNK), columns)
        copy = _mosaic.add_smem_to_gmem if work.adds else plgpu.copy_smem_to_gmem
        copy(slot, window)

    def multiply_tile(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        first, kept, waiting, place = carry
        tile = work.locate(i)
        steps, target = work.steps(tile), work.target(tile)
        # A warpgroup without rows in the tile leaves the tensor cores to the other.
        mine = jnp.where(target.high > target.low, steps, 0)

        def arrived(k: jax.Array) -> tuple[Any, ...]:
            slot = lax.rem(first + k, jnp.int32(STAGES))
            plgpu.barrier_wait(buffers.full.at[slot])
            return tuple(buffer.at[slot] for buffer in buffers.operands)

        def store_kept(now: Callable[[int], jax.Array]) -> None:
            for part in range(parts if work.behind else 0):
                pl.when(waiting & now(part))(functools.partial(store, part, kept, place))

        sums = work.multiply(
            Steps(
                tile,
                mine,
                arrived,
                release=lambda k: release(first + k),
                meanwhile=lambda k: store_kept(lambda part: k == part),
            )
        )

        def pass_step(k: jax.Array, _: None) -> None:
            arrived(k)
            release(first + k)

        lax.fori_loop(mine, steps, pass_step, None)
        store_kept(lambda part: part >= mine)
        done = tuple(piece.astype(dtype) for piece in sums)
        place = tuple(x + work.zero for x in (target.matrix, target.row, target.column))
        whole = (target.low <= work.zero) & (target.high >= CHUNK)
        if not work.behind:

            @pl.when(whole)
            def _() -> None:
                for part in range(parts):
                    store(part, done, place)

        pl.when(jnp.logical_not(whole))(lambda: _store_rows(done, slots, work, target))
        return first + steps + work.zero, done if work.behind else kept, whole, place

    zero = work.zero
    kept: tuple[jax.Array, ...] = ()
    if work.behind:
        nothing = jnp.zeros((CHUNK, TILE_COLUMNS), dtype)
        kept = (plgpu.layout_cast(nothing, plgpu.Layout.WGMMA),)
    carry = (zero, kept, zero > 0, (zero, zero, zero))
    _, kept, waiting, place = lax.fori_loop(0, work.count, multiply_tile, carry)
    for part in range(parts if work.behind else 0):
        pl.when(waiting)(functools.partial(store, part, kept, place))
    work.finish()
    plgpu.wait_smem_to_gmem(0)


def _store_rows(tile: tuple[jax.Array, ...], slots: Any, work: Work, target: Target) -> None:
    """Stores rows [low, high) of a warpgroup's part of a tile.

    TMA boxes have static sizes: one box per set bit of the number of rows. None touches a row
    outside the range, which may belong to another group.
    """
    low, high = jnp.maximum(target.low, 0), jnp.minimum(target.high, CHUNK)
    num_slots, _, width = slots.shape

    @pl.when(high > low)
    def _() -> None:
        for i, offset in enumerate(range(0, TILE_COLUMNS, width)):
            slot = slots.at[i % num_slots]
            window = functools.partial(work.window, columns=pl.ds(target.column + offset, width))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            slot[...] = _columns(tile, offset, width)
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
