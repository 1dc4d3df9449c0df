"""Gradients of causal attention to keys and values for Hopper, bitwise deterministic: no CTA adds
to memory.

A CTA has 64 keys of one head and walks the chunks of queries that see them, keys along the rows of
every tile. One warpgroup makes S and P and sums dv, another makes dP and dS and sums dk; P crosses
once. dS, rounded as its product with the queries is, goes to memory in packed tiles: the gradient
to the queries (mosaic_queries.py) is a product with them. So the backward has five products and not
seven, without atomics.

Both warpgroups keep their side of the first product, keys or values, in registers where they have
room, issue the first product of the next chunk before they work on this one's, and leave the summed
product in flight until the next one is issued. Its left operand, P or dS, is read from shared
memory: ptxas lets one in registers die before the end of a loop's body (experiments/LOG.md).

B batch, T tokens (queries), S keys, H heads, Q query and key width, V value width, L padded T,
N tiles of dS.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _common
from pallas_kernels.flash_mla import mosaic_tile, schedule
from pallas_kernels.flash_mla.mosaic_forward import LOG2_E
from pallas_kernels.flash_mla.mosaic_tile import LOADER, MATRIX, Side, along
from pallas_kernels.flash_mla.schedule import CHUNK, PIECE, SLOTS

SHAPE = (CHUNK, CHUNK)


class Buffers(NamedTuple):
    """Shared memory: keys and values where they are read from there, chunks of queries and their
    like by stage, tiles that cross or leave, barriers.
    """

    k: Any
    v: Any
    q: Any
    dout: Any
    lse: Any
    delta: Any
    p: Any
    weights: Any
    ds: Any
    k_full: Any
    v_full: Any
    q_full: Any
    dout_full: Any
    q_free: Any
    dout_free: Any
    p_full: Any
    p_free: Any


class Operands(NamedTuple):
    """In device memory; `keys` are the parts of the keys."""

    q: Any
    keys: tuple[Any, ...]
    v: Any
    dout: Any
    lse: Any
    delta: Any


class Place(NamedTuple):
    """What a CTA computes: 64 keys from `row` on, of head `head`, which is `own_head` of the
    results.

    It walks `count` chunks of queries from `start` on. Counted from there, the mask cuts into those
    before `masked` and from `whole` on. `offset` is the place of query 0 among the keys, or None.
    """

    batch: Any
    head: Any
    own_head: Any
    row: Any
    offset: Any
    start: Any
    masked: Any
    whole: Any
    count: Any


def _buffer_types(widths: tuple[int, int], dtype: Any, tiling: schedule.Backward) -> Buffers:
    q_stages, dout_stages, f32 = tiling.q_stages, tiling.dout_stages, jnp.float32
    pieces, value_pieces = (width // PIECE for width in widths)

    def own(number: int, registers: bool) -> tuple[Any, Any]:
        if registers:
            return None, None
        buffer = mosaic_tile.shared(dtype, number, CHUNK, PIECE)
        return buffer, plgpu.Barrier(num_arrivals=number)

    k, k_full = own(pieces, tiling.k_registers)
    v, v_full = own(value_pieces, tiling.v_registers)
    return Buffers(
        k=k,
        v=v,
        q=mosaic_tile.shared(dtype, q_stages, CHUNK, widths[0]),
        dout=mosaic_tile.shared(dtype, dout_stages, CHUNK, widths[1]),
        lse=plgpu.SMEM((q_stages, CHUNK), f32),
        delta=plgpu.SMEM((dout_stages, CHUNK), f32),
        # P is at most 1: in float16 it crosses with 3 bits more than in bfloat16, at the same size.
        p=mosaic_tile.shared(jnp.float16, SLOTS, CHUNK, CHUNK),
        weights=mosaic_tile.shared(dtype, SLOTS, CHUNK, CHUNK),  # P as its product reads it
        ds=mosaic_tile.shared(dtype, SLOTS, CHUNK, CHUNK),
        k_full=k_full,
        v_full=v_full,
        q_full=plgpu.Barrier(num_arrivals=2, num_barriers=q_stages),
        dout_full=plgpu.Barrier(num_arrivals=2, num_barriers=dout_stages),
        q_free=plgpu.Barrier(num_arrivals=2, num_barriers=q_stages),
        dout_free=plgpu.Barrier(num_arrivals=2, num_barriers=dout_stages),
        p_full=plgpu.Barrier(num_barriers=SLOTS),
        p_free=plgpu.Barrier(num_barriers=SLOTS),
    )


def _slot(ring: Any, t: jax.Array) -> Any:
    """Of a ring of buffers or barriers, the one of chunk t."""
    return ring.at[lax.rem(t, jnp.int32(ring.shape[0]))]


def _take_what_is_left(ring: Any, count: jax.Array) -> None:
    """Waits for the last arrivals of `count` at a ring of barriers."""
    lax.fori_loop(
        jnp.maximum(count - ring.shape[0], 0),
        count,
        lambda t, _: plgpu.barrier_wait(_slot(ring, t)),
        None,
    )


def _load(place: Place, operands: Operands, smem: Buffers) -> None:
    """The loading warpgroup: keys and values, then chunks of queries and their like."""
    plgpu.set_max_registers(mosaic_tile.LOADER_REGISTERS, action="decrease")
    q, _, _, dout, lse, delta = operands
    b, h = place.batch, place.head
    if smem.k is not None:
        mosaic_tile.load_pieces(_keys(place, operands), smem.k, smem.k_full)
    if smem.v is not None:
        mosaic_tile.load_pieces(_values(place, operands), smem.v, smem.v_full)
    streams = (
        (q, lse, smem.q, smem.lse, smem.q_full, smem.q_free),
        (dout, delta, smem.dout, smem.delta, smem.dout_full, smem.dout_free),
    )

    def load(t: jax.Array, _: None) -> None:
        rows = pl.ds((place.start + t) * CHUNK, CHUNK)
        for matrix, vector, to_matrix, to_vector, full, free in streams:
            wait = functools.partial(plgpu.barrier_wait, _slot(free, t))
            pl.when(t >= free.shape[0])(wait)
            plgpu.copy_gmem_to_smem(matrix.at[b, rows, h], _slot(to_matrix, t), _slot(full, t))
            plgpu.copy_gmem_to_smem(vector.at[b, h, rows], _slot(to_vector, t), _slot(full, t))

    lax.fori_loop(0, place.count, load, None)
    _take_what_is_left(smem.q_free, place.count)
    _take_what_is_left(smem.dout_free, place.count)


def _keys(place: Place, operands: Operands) -> list[Any]:
    """This CTA's rows of the parts of the keys, in memory."""
    rows = pl.ds(place.row, CHUNK)
    return [mosaic_tile.of_head(key, place.batch, rows, place.head) for key in operands.keys]


def _values(place: Place, operands: Operands) -> list[Any]:
    """This CTA's rows of the values, in memory."""
    return [operands.v.at[place.batch, pl.ds(place.row, CHUNK), place.head]]


def _multiply(accumulator: Any, own: list[Any], streamed: Any, full: Any) -> None:
    """accumulator += own @ streamed^T, piece by piece."""
    plgpu.barrier_wait(full)
    for i, piece in enumerate(own):
        columns = streamed.at[:, pl.ds(i * PIECE, PIECE)]
        plgpu.wgmma(accumulator, piece, columns.transpose((1, 0)))


def _own(sources: list[Any], pieces: Any, full: Any) -> list[Any]:
    """Pieces of a left operand: in shared memory if they go there, else in registers."""
    if pieces is not None:
        plgpu.barrier_wait(full)
        return [pieces.at[i] for i in range(pieces.shape[0])]
    return [
        plgpu.load(source.at[:, pl.ds(column, PIECE)], layout=MATRIX, optimized=False)
        for source in sources
        for column in range(0, source.shape[-1], PIECE)
    ]


class Walk(NamedTuple):
    """What a computing warpgroup does with every chunk t of `count`.

    Attributes:
      first: (accumulator, t) issues the chunk's first product, a tile.
      second: (sums, tile, t, issue_next, commit, masked) makes the left operand of the summed
        product from the tile and issues it; calls `issue_next` and then `commit` before.
      free: barriers to arrive at when the summed product of a chunk is done.
      pieces: products that `first` issues, one for each piece of its left operand.
      spans: (stop, masked): chunks before `stop` that no earlier span has. The last chunk follows
        them, masked.
      width: of the sums.
    """

    first: Callable[[Any, jax.Array], None]
    second: Callable[..., None]
    free: Any
    pieces: int
    spans: list[tuple[jax.Array, bool]]
    width: int


def _sum_chunks(walk: Walk, count: jax.Array) -> jax.Array:
    """The sums [64, width] of a computing warpgroup.

    Products end in the order of their issue: chunk t - 1's summed one, those of chunk t + 1's first
    one, chunk t's summed one. At `commit` only the first ones may be in flight, and what chunk
    t - 1 read is given back; all threads then know that its left operand was read, too.
    """
    last = count - 1

    def accumulate(sums_ref: Any) -> jax.Array:
        def step(
            t: jax.Array, tile: jax.Array, *, masked: bool, is_last: bool = False
        ) -> jax.Array | None:
            def work(ahead_ref: Any = None) -> jax.Array | None:
                def issue_next() -> None:
                    if not is_last:
                        walk.first(ahead_ref, t + 1)

                def commit() -> None:
                    plgpu.wgmma_wait(0 if is_last else walk.pieces)
                    plgpu.commit_smem()
                    before = _slot(walk.free, t - 1)
                    pl.when(t > 0)(lambda: plgpu.barrier_arrive(before))

                walk.second(sums_ref, tile, t, issue_next, commit, masked)
                return None if is_last else plgpu.wgmma_accumulator_load(ahead_ref, wait_n=1)

            return work() if is_last else pl.run_scoped(work, plgpu.ACC(SHAPE, jnp.float32))

        def begin(tile_ref: Any) -> jax.Array:
            walk.first(tile_ref, jnp.int32(0))
            return plgpu.wgmma_accumulator_load(tile_ref)

        tile = pl.run_scoped(begin, plgpu.ACC(SHAPE, jnp.float32))
        reached = jnp.int32(0)
        for stop, masked in walk.spans:
            until = jnp.clip(stop, reached, last)
            tile = lax.fori_loop(reached, until, functools.partial(step, masked=masked), tile)
            reached = until
        step(last, tile, masked=True, is_last=True)
        sums = plgpu.wgmma_accumulator_load(sums_ref)
        plgpu.barrier_arrive(_slot(walk.free, last))
        return sums

    return pl.run_scoped(accumulate, plgpu.ACC((CHUNK, walk.width), jnp.float32))


def _sum_values(
    place: Place,
    operands: Operands,
    segments: schedule.Segments | None,
    smem: Buffers,
    scale: float,
) -> jax.Array:
    """S, P and dv, which it returns."""
    keys = _own(_keys(place, operands), smem.k, smem.k_full)

    def multiply_queries(ref: Any, t: jax.Array) -> None:
        _multiply(ref, keys, _slot(smem.q, t), _slot(smem.q_full, t))

    def mask(by_id: bool, p: jax.Array, t: jax.Array) -> jax.Array:
        """Without that of earlier queries, and of queries of other segments."""
        row, ids = (place.start + t) * CHUNK, (None, None)
        stand = row if place.offset is None else row + place.offset
        if by_id:
            theirs = segments.queries_BL.at[place.batch, pl.ds(row, CHUNK)]
            ids = theirs, segments.keys_BL.at[place.batch, pl.ds(place.row, CHUNK)]
        seen = mosaic_tile.visible(SHAPE, Side(1, stand, ids[0]), Side(0, place.row, ids[1]))
        return jnp.where(seen, p, 0.0)

    plain, by_id = (functools.partial(mask, x) for x in (False, True))

    def second(
        sums_ref: Any,
        scores: jax.Array,
        t: jax.Array,
        issue_next: Callable,
        commit: Callable,
        masked: bool,
    ) -> None:
        if not masked:
            issue_next()
        lse = mosaic_tile.load_vector(_slot(smem.lse, t), 1)
        p = jnp.exp2(scores * (scale * LOG2_E) - along(lse, SHAPE, 1))
        if masked:
            # As in the forward pass: ids only where there is more than one.
            p = plain(p, t) if segments is None else lax.cond(t < place.whole, plain, by_id, p, t)
        taken = _slot(smem.p_free, t)
        pl.when(t >= SLOTS)(lambda: plgpu.barrier_wait(taken))
        half = lax.rem(t, jnp.int32(SLOTS))
        smem.p[half] = p.astype(smem.p.dtype)
        smem.weights[half] = p.astype(smem.weights.dtype)
        if masked:  # ids take registers: let them go first
            issue_next()
        commit()
        plgpu.barrier_arrive(smem.p_full.at[half])
        plgpu.barrier_arrive(_slot(smem.q_free, t))
        plgpu.barrier_wait(_slot(smem.dout_full, t))
        plgpu.wgmma(sums_ref, smem.weights.at[half], _slot(smem.dout, t))

    spans = [(place.masked, True), (place.whole, False)]
    if segments is not None:
        spans.append((place.count, True))
    walk = Walk(multiply_queries, second, smem.dout_free, len(keys), spans, smem.dout.shape[2])
    sums = _sum_chunks(walk, place.count)
    _take_what_is_left(smem.p_free, place.count)
    return sums


def _sum_keys(
    place: Place, operands: Operands, ds_out: Any, smem: Buffers, scale: float
) -> jax.Array:
    """dP, dS, which it stores, and dk, which it returns."""
    block = lax.div(place.row, jnp.int32(CHUNK))
    ahead = schedule.chunks_ahead(place.offset)
    values = _own(_values(place, operands), smem.v, smem.v_full)

    def multiply_dout(ref: Any, t: jax.Array) -> None:
        _multiply(ref, values, _slot(smem.dout, t), _slot(smem.dout_full, t))

    def store(t: jax.Array, half: jax.Array) -> None:
        i = place.start + t
        target = ds_out.at[place.batch, place.own_head, schedule.tile_index(i, block, ahead)]

        def copy() -> None:
            plgpu.copy_smem_to_gmem(smem.ds.at[half], target)

        # With an offset a CTA may have none but a chunk that sees no key of its own.
        copy() if place.offset is None else pl.when(block <= i + ahead)(copy)

    def second(
        sums_ref: Any,
        dp: jax.Array,
        t: jax.Array,
        issue_next: Callable,
        commit: Callable,
        masked: bool,
    ) -> None:
        del masked  # P is 0 there
        issue_next()
        delta = mosaic_tile.load_vector(_slot(smem.delta, t), 1)
        centered = dp - along(delta, SHAPE, 1)
        plgpu.barrier_arrive(_slot(smem.dout_free, t))
        half = lax.rem(t, jnp.int32(SLOTS))
        plgpu.barrier_wait(smem.p_full.at[half])
        p = plgpu.load(smem.p.at[half], layout=MATRIX).astype(jnp.float32)
        plgpu.barrier_arrive(smem.p_free.at[half])
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        smem.ds[half] = (p * centered).astype(smem.ds.dtype)
        commit()
        store(t, half)
        plgpu.barrier_wait(_slot(smem.q_full, t))
        plgpu.wgmma(sums_ref, smem.ds.at[half], _slot(smem.q, t))

    spans = [(place.count, False)]
    walk = Walk(multiply_dout, second, smem.q_free, len(values), spans, smem.q.shape[2])
    return _sum_chunks(walk, place.count) * scale


def _store_keys(dk: jax.Array, place: Place, targets: tuple[Any, ...], slots: Any) -> None:
    """Parts of dk: those of a head rounded, by way of shared memory; that of all heads as it is."""
    column = 0
    for target in targets:
        part = dk[:, column : column + target.shape[3]]
        rows = target.at[place.batch, pl.ds(place.row, CHUNK), place.own_head]
        if target.dtype == jnp.float32:
            rows[...] = part
        else:
            mosaic_tile.store_by_slots(part.astype(target.dtype), slots, rows)
        column += target.shape[3]


def key_gradients(
    operands: Operands,
    segment_ids: jax.Array | None,
    offset: jax.Array | None,
    *,
    scale: float,
    heads: schedule.Heads,
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Gradients of some heads to keys and values, and their dS.

    Args:
      operands: q [B, T, H, Q]; parts of the keys, [B, S, H, width] or [B, S, width] for all heads;
        v [B, S, H, V]; dout [B, T, H, V]; log-sum-exp to base 2 and sum(out * dout) [B, H, L]. T
        and S are multiples of 128: keys and values are read without TMA.
      segment_ids: [B, S], None for one segment.
      offset: [1] int32, place of the first query; None: T == S.
      scale: factor of the scores.
      heads: those of the results.

    Returns:
      The parts' gradients [B, S, heads, width]; of the one for all heads every head's in float32.
      dv. Tiles of dS^T [B, heads, N, 64, 64].
    """
    q_BTHQ, keys, v_BSHV = operands.q, operands.keys, operands.v
    (batch, tokens, _, width), (_, num_keys, _, value_width) = q_BTHQ.shape, v_BSHV.shape
    tiling = schedule.backward(width, value_width)
    dtype, num_heads = q_BTHQ.dtype, heads.count
    chunks, key_chunks = schedule.chunks(tokens), schedule.chunks(num_keys)
    grid = schedule.grid(batch, num_heads, key_chunks)

    def locate(first_head: Any, segments: Any, offset: Any) -> Place:
        b, own, tile = grid.place()
        row, start, masked, stand = tile * CHUNK, tile, tile + 1, None
        if offset is not None:
            stand = offset[0]
            past = jnp.maximum(row - stand, 0)
            start = jnp.minimum(lax.div(past, jnp.int32(CHUNK)), chunks - 1)
            past_all = jnp.maximum(row - stand + 2 * CHUNK - 2, 0)
            masked = lax.div(past_all, jnp.int32(CHUNK))
        end = whole = tile * 0 + chunks
        if segments is not None:
            end = jnp.clip(segments.end_BN[b, tile], start + 1, chunks)
            whole = segments.whole_BN[b, tile]
        head = own if first_head is None else first_head[0] + own
        return Place(b, head, own, row, stand, start, masked - start, whole - start, end - start)

    def kernel(
        operands: Operands, tables: Any, dkeys: Any, dv: Any, ds: Any, smem: Buffers
    ) -> None:
        place, warpgroup, segments = locate(*tables), lax.axis_index("warpgroup"), tables[1]

        @pl.when(warpgroup == 0)
        def _() -> None:
            plgpu.set_max_registers(mosaic_tile.COMPUTE_REGISTERS, action="increase")
            sums = _sum_values(place, operands, segments, smem, scale)
            target = dv.at[place.batch, pl.ds(place.row, CHUNK), place.own_head]
            mosaic_tile.store_by_slots(sums.astype(dtype), smem.weights, target)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _() -> None:
            plgpu.set_max_registers(mosaic_tile.COMPUTE_REGISTERS, action="increase")
            sums = _sum_keys(place, operands, ds, smem, scale)
            _store_keys(sums, place, dkeys, smem.ds)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == LOADER)
        def _() -> None:
            _load(place, operands, smem)

    def gradient(part: jax.Array) -> jax.ShapeDtypeStruct:
        shape = (batch, num_keys, num_heads, part.shape[-1])
        return jax.ShapeDtypeStruct(shape, dtype if part.ndim == 4 else jnp.float32)

    tiles = (batch, num_heads, schedule.num_tiles(tokens, num_keys, offset), *SHAPE)
    segments = schedule.of_keys(segment_ids, offset, tokens)
    results = plgpu.kernel(
        kernel,
        out_type=(
            tuple(gradient(part) for part in keys),
            jax.ShapeDtypeStruct((batch, num_keys, num_heads, value_width), dtype),
            jax.ShapeDtypeStruct(tiles, dtype),
        ),
        scratch_types=(_buffer_types((width, value_width), dtype, tiling),),
        grid=grid.sizes,
        grid_names=grid.names,
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="flash_mla_keys",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(operands, (heads.first, segments, offset))
    axes = _common.varying_axes(*jax.tree.leaves(operands))
    return jax.tree.map(lambda x: _common.vary(x, axes), results)
