"""Forward pass of causal attention for Hopper: output and log-sum-exp.

A CTA computes 128 queries of one head: one warpgroup loads blocks of keys and values, two multiply,
64 queries each. Keys are walked from the diagonal down. The scores of a block are exponentiated
while the tensor cores multiply the values of the block before, and the warpgroups issue their
products in turn, so that one's exponentials hide behind the other's products (FlashAttention-3,
arXiv 2407.08608, sections 3.1 and 3.2).

B batch, T tokens (queries), S keys, H heads, Q query and key width, V value width, L padded T.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _common
from pallas_kernels.flash_mla import mosaic_tile, schedule
from pallas_kernels.flash_mla.mosaic_tile import LOADER, MATRIX, Side, along
from pallas_kernels.flash_mla.schedule import CHUNK, PIECE

LOG2_E = math.log2(math.e)
# Before any key was seen. Finite, so that a query whose keys are all masked so far has weights 0.
LOWEST = -1e30


class Buffers(NamedTuple):
    """Shared memory: queries by warpgroup, keys and values by stage, and barriers."""

    q: Any
    k: Any
    v: Any
    lse: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any


class Place(NamedTuple):
    """What a CTA computes: the queries from `row` on, of which the first stands at `offset` + row.

    Keys may be seen in the blocks from `first` to before `end`; all are seen from `whole` to the
    diagonal.
    """

    batch: Any
    head: Any
    row: Any
    offset: Any
    first: Any
    whole: Any
    end: Any


def _buffer_types(widths: tuple[int, int], dtype: Any, tiling: schedule.Forward) -> Buffers:
    pieces, value_pieces = (width // PIECE for width in widths)
    stages = tiling.stages
    return Buffers(
        # The output leaves through the queries' buffer.
        q=mosaic_tile.shared(dtype, 2, max(pieces, value_pieces), CHUNK, PIECE),
        k=mosaic_tile.shared(dtype, stages, pieces, tiling.block, PIECE),
        v=mosaic_tile.shared(dtype, stages, tiling.block, widths[1]),
        lse=plgpu.SMEM((2, CHUNK), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=2 * pieces),
        k_full=plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=2),
    )


def _load(place: Place, operands: tuple[Any, ...], smem: Buffers, tiling: schedule.Forward) -> None:
    """The loading warpgroup: queries, then blocks of keys and values."""
    plgpu.set_max_registers(mosaic_tile.LOADER_REGISTERS, action="decrease")
    q, keys, v = operands
    b, h, stages = place.batch, place.head, jnp.int32(tiling.stages)
    for warpgroup in range(2):
        rows = pl.ds(place.row + warpgroup * CHUNK, CHUNK)
        mosaic_tile.load_pieces([q.at[b, rows, h]], smem.q.at[warpgroup], smem.q_full)

    def load(i: jax.Array, _: None) -> None:
        slot = lax.rem(i, stages)
        rows = pl.ds((place.end - 1 - i) * tiling.block, tiling.block)
        pl.when(i >= stages)(lambda: plgpu.barrier_wait(smem.k_free.at[slot]))
        mosaic_tile.load_pieces(
            [mosaic_tile.of_head(key, b, rows, h) for key in keys],
            smem.k.at[slot],
            smem.k_full.at[slot],
        )
        pl.when(i >= stages)(lambda: plgpu.barrier_wait(smem.v_free.at[slot]))
        plgpu.copy_gmem_to_smem(v.at[b, rows, h], smem.v.at[slot], smem.v_full.at[slot])

    count = place.end - place.first
    lax.fori_loop(0, count, load, None)

    def take_what_is_left(i: jax.Array, _: None) -> None:
        plgpu.barrier_wait(smem.k_free.at[lax.rem(i, stages)])
        plgpu.barrier_wait(smem.v_free.at[lax.rem(i, stages)])

    lax.fori_loop(jnp.maximum(count - stages, 0), count, take_what_is_left, None)


def _compute(
    place: Place,
    segments: schedule.Segments | None,
    smem: Buffers,
    tiling: schedule.Forward,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """A computing warpgroup: its 64 rows of the output in float32, and their log-sum-exp."""
    warpgroup = lax.axis_index("warpgroup")
    block, shape = tiling.block, (CHUNK, tiling.block)
    factor = scale * LOG2_E
    row = place.row + warpgroup * CHUNK
    top = row if place.offset is None else row + place.offset  # where the first query stands
    diagonal = jnp.minimum(lax.div(top + CHUNK - 1, jnp.int32(block)), place.end - 1)

    def slot_of(j: jax.Array) -> jax.Array:
        return lax.rem(place.end - 1 - j, jnp.int32(tiling.stages))

    def in_turn(issue: Any) -> None:
        plgpu.barrier_wait(smem.turn.at[warpgroup])
        issue()
        plgpu.barrier_arrive(smem.turn.at[1 - warpgroup])

    def pass_block(i: jax.Array, _: None) -> None:
        slot = lax.rem(i, jnp.int32(tiling.stages))
        plgpu.barrier_wait(smem.k_full.at[slot])
        plgpu.barrier_wait(smem.v_full.at[slot])
        plgpu.barrier_arrive(smem.k_free.at[slot])
        plgpu.barrier_arrive(smem.v_free.at[slot])
        in_turn(lambda: None)

    def multiply_keys(scores: Any, j: jax.Array) -> None:
        slot = slot_of(j)
        for piece in range(smem.k.shape[1]):
            keys = smem.k.at[slot, piece].transpose((1, 0))
            plgpu.wgmma(scores, queries[piece], keys)

    def multiply_values(sums: Any, weights: jax.Array, j: jax.Array) -> None:
        plgpu.barrier_wait(smem.v_full.at[slot_of(j)])
        plgpu.wgmma(sums, weights, smem.v.at[slot_of(j)])

    def mask(by_id: bool, scores: jax.Array, j: jax.Array) -> jax.Array:
        """Without those of later keys, and of keys of other segments."""
        ids = (None, None)
        if by_id:
            mine = segments.queries_BL.at[place.batch, pl.ds(row, CHUNK)]
            ids = mine, segments.keys_BL.at[place.batch, pl.ds(j * block, block)]
        seen = mosaic_tile.visible(shape, Side(0, top, ids[0]), Side(1, j * block, ids[1]))
        return jnp.where(seen, scores, -jnp.inf)

    def mask_diagonal(scores: jax.Array) -> jax.Array:
        """Mostly of one segment: ids would come from device memory while all wait."""
        plain, by_id = (functools.partial(mask, x) for x in (False, True))
        if segments is None:
            return plain(scores, diagonal)
        return lax.cond(diagonal >= place.whole, plain, by_id, scores, diagonal)

    def softmax(scores: jax.Array, lowest: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights, relative to the greatest score so far, which is the other result."""
        greatest = jnp.maximum(lowest, scores.max(axis=1) * factor)
        return jnp.exp2(scores * factor - along(greatest, shape, 0)), greatest

    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(smem.turn.at[0]))
    lax.fori_loop(0, place.end - 1 - diagonal, pass_block, None)
    plgpu.barrier_wait(smem.q_full)
    queries = [smem.q.at[warpgroup, piece] for piece in range(smem.k.shape[1])]
    if tiling.q_registers:
        queries = [plgpu.load(q, layout=MATRIX) for q in queries]

    def accumulate(sums_ref: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        def begin(scores_ref: Any) -> jax.Array:
            plgpu.barrier_wait(smem.k_full.at[slot_of(diagonal)])
            in_turn(lambda: multiply_keys(scores_ref, diagonal))
            return plgpu.wgmma_accumulator_load(scores_ref)

        scores = pl.run_scoped(begin, plgpu.ACC(shape, jnp.float32))
        plgpu.barrier_arrive(smem.k_free.at[slot_of(diagonal)])
        lowest = jnp.full((CHUNK,), LOWEST, jnp.float32)
        lowest = plgpu.layout_cast(lowest, MATRIX.reduce(1))
        weights, greatest = softmax(mask_diagonal(scores), lowest)

        def step(i: jax.Array, carry: tuple[Any, ...], *, masked: bool) -> tuple[Any, ...]:
            weights, greatest, total = carry
            j = diagonal - i  # the scores of block j, and the values of block j + 1

            def multiply(scores_ref: Any) -> jax.Array:
                plgpu.barrier_wait(smem.k_full.at[slot_of(j)])

                def issue() -> None:
                    multiply_keys(scores_ref, j)
                    multiply_values(sums_ref, weights, j + 1)

                in_turn(issue)
                # Products end in order: with one in flight, that of the keys is done.
                return plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)

            scores = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(smem.k_free.at[slot_of(j)])
            if masked:  # ids take registers: let the old weights go first
                plgpu.wgmma_wait(0)
                scores = mask(segments is not None, scores, j)
            new_weights, new_greatest = softmax(scores, greatest)
            shrink = jnp.exp2(greatest - new_greatest)
            total = total * shrink + new_weights.sum(axis=1)
            sums = plgpu.wgmma_accumulator_load(sums_ref)
            plgpu.barrier_arrive(smem.v_free.at[slot_of(j + 1)])
            sums_ref[...] = sums * along(shrink, sums.shape, 0)
            return new_weights.astype(smem.v.dtype), new_greatest, total

        carry = weights.astype(smem.v.dtype), greatest, weights.sum(axis=1)
        # Blocks the diagonal goes through besides the first, whole ones, and those of segments.
        reached = jnp.int32(1)
        spans = [(place.whole, False), (place.first, True)]
        if place.offset is not None:
            spans.insert(0, (lax.div(top + 1, jnp.int32(block)), True))
        if segments is None:
            spans.pop()
        for last, masked in spans:
            until = jnp.maximum(reached, diagonal - jnp.maximum(last, place.first) + 1)
            carry = lax.fori_loop(reached, until, functools.partial(step, masked=masked), carry)
            reached = until
        weights, greatest, total = carry
        multiply_values(sums_ref, weights, place.first)
        sums = plgpu.wgmma_accumulator_load(sums_ref)
        plgpu.barrier_arrive(smem.v_free.at[slot_of(place.first)])
        return sums, greatest, total

    accumulator = plgpu.ACC((CHUNK, smem.v.shape[2]), jnp.float32)
    sums, greatest, total = pl.run_scoped(accumulate, accumulator)
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(smem.turn.at[0]))
    return sums * along(1 / total, sums.shape, 0), greatest + jnp.log2(total)


def attend(
    q_BTHQ: jax.Array,
    keys: tuple[jax.Array, ...],
    v_BSHV: jax.Array,
    segment_ids: jax.Array | None,
    offset: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, V], and log-sum-exp [B, H, L] in float32 to base 2 (of padding, anything
    finite).

    Args:
      q_BTHQ: queries.
      keys: parts of the keys, side by side; [B, S, H, width], or [B, S, width] for all heads.
      v_BSHV: values.
      segment_ids: [B, S], None for one segment.
      offset: [1] int32, place of the first query; None: T == S.
      scale: factor of the scores, positive.
    """
    (batch, tokens, heads, width), value_width = q_BTHQ.shape, v_BSHV.shape[3]
    tiling = schedule.forward(width, value_width)
    rows = schedule.QUERY_ROWS
    num_tiles = pl.cdiv(tokens, rows)
    grid = schedule.grid(batch, heads, num_tiles)

    def kernel(
        q: Any, keys: Any, v: Any, segments: Any, offset: Any, out: Any, lse: Any, smem: Buffers
    ) -> None:
        b, head, nth = grid.place()
        tile = num_tiles - 1 - nth
        row = tile * rows
        stand = None if offset is None else offset[0]
        end = lax.div(row + (rows + tiling.block - 1), jnp.int32(tiling.block))
        if offset is not None:
            end = lax.div(stand + row + (rows + tiling.block - 1), jnp.int32(tiling.block))
        end = jnp.minimum(end, pl.cdiv(v.shape[1], tiling.block))
        first = whole = tile * 0
        if segments is not None:
            first, whole = segments.end_BN[b, tile], segments.whole_BN[b, tile]
        place = Place(b, head, row, stand, first, whole, end)

        @pl.when(lax.axis_index("warpgroup") == LOADER)
        def _() -> None:
            _load(place, (q, keys, v), smem, tiling)

        @pl.when(lax.axis_index("warpgroup") != LOADER)
        def _() -> None:
            plgpu.set_max_registers(mosaic_tile.COMPUTE_REGISTERS, action="increase")
            values, log_sum = _compute(place, segments, smem, tiling, scale)
            warpgroup = lax.axis_index("warpgroup")
            mine = pl.ds(row + warpgroup * CHUNK, CHUNK)
            smem.lse[warpgroup] = log_sum
            target = out.at[b, mine, place.head]
            mosaic_tile.store_pieces(values.astype(out.dtype), smem.q.at[warpgroup], target)
            plgpu.copy_smem_to_gmem(smem.lse.at[warpgroup], lse.at[b, place.head, mine])
            plgpu.wait_smem_to_gmem(0)

    results = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, tokens, heads, value_width), q_BTHQ.dtype),
            jax.ShapeDtypeStruct((batch, heads, num_tiles * rows), jnp.float32),
        ),
        scratch_types=(_buffer_types((width, value_width), q_BTHQ.dtype, tiling),),
        grid=grid.sizes,
        grid_names=grid.names,
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="flash_mla_forward",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
        ),
    )(
        q_BTHQ,
        keys,
        v_BSHV,
        schedule.of_queries(segment_ids, offset, tokens, rows, tiling.block),
        offset,
    )
    axes = _common.varying_axes(q_BTHQ, *keys, v_BSHV)
    return tuple(_common.vary(x, axes) for x in results)
