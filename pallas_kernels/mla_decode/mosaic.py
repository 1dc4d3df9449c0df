"""Absorbed MLA decode for Hopper: each cache tile is read once and used as keys and as values.

A CTA owns up to 64 rows (a row is a head of a query token) and one split of a sequence's cache. One
warpgroup loads, one computes the scores, their softmax and the left part of the value columns, one
the rest: 64 x 512 sums don't fit into the registers of one. Splits are a function of shapes only,
and are joined in fixed order. That the latent serves both products from one tile in shared
memory, and the parts, are ideas of FlashMLA (github.com/deepseek-ai/FlashMLA).

B batch, T new tokens, H heads, R rows (T * H, padded), S cache entries, U cache width, C latent
width, N splits of the cache, P pages of a row.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _common, _mosaic

TILE = 64  # rows of a CTA, and cache entries of a step
SCORER, HELPER, LOADER = range(3)  # the warpgroups
# 24 + 2 * 240 registers a thread: what an SM has for 3 * 128 threads.
LOADER_REGISTERS, COMPUTE_REGISTERS = 24, 240
MAX_STAGES = 4
PIECE = 256  # the most columns of one product
SHARED_MEMORY = 232448 - 2048  # bytes of a CTA, less the small buffers and barriers
MIN_SPLIT, MAX_SPLIT = 256, 4096  # cache entries
FEW_SPLITS = 16  # so many may be shorter: a short cache waits for steps, not for memory
JOINED = 10  # splits that are read at once
MAX_VECTOR = 4  # columns that a thread joins side by side, 32 bits each
LOWEST = -1e30  # below any score, yet finite: a row may see nothing of its split
LOG2_E = math.log2(math.e)


class Plan(NamedTuple):
    """How one call is cut up; a function of shapes only."""

    tokens: int
    heads: int
    value_dim: int
    split: int  # cache entries of a split, a multiple of TILE
    stages: int
    pair: int  # CTAs that share a cache tile: two row tiles of a sequence, if their number is even
    left: int  # value columns of the scoring warpgroup; the helper has the others


class Cache(NamedTuple):
    """Entries [B, S, U]; or pages of entries, and which page holds each row's next ones."""

    entries: Any
    lengths_B: Any
    tables_BP: Any = None

    @property
    def capacity(self) -> int:
        """Entries that a row may have."""
        entries = self.entries.shape[1]
        return entries if self.tables_BP is None else entries * self.tables_BP.shape[1]

    def page(self, row: jax.Array, entry: jax.Array) -> jax.Array:
        """First index of a row's entry, which may be past the capacity."""
        if self.tables_BP is None:
            return row
        page = lax.div(entry, jnp.int32(self.entries.shape[1]))
        return self.tables_BP[row, jnp.minimum(page, self.tables_BP.shape[1] - 1)]


class Buffers(NamedTuple):
    """Shared memory: queries, cache tiles by stage, weights of a step and the factor by which they
    rescale the sums before; barriers."""

    q: Any
    cache: Any
    weights: Any
    factor: Any
    q_full: Any
    full: Any
    empty: Any
    weights_full: Any
    weights_empty: Any


class Work(NamedTuple):
    """The CTA's part: rows [row, row + TILE) of sequence `batch`, `steps` tiles of `split`."""

    batch: jax.Array
    row: jax.Array
    split: jax.Array
    length: jax.Array
    first: jax.Array
    steps: jax.Array


def _buffer_types(plan: Plan, width: int, dtype: Any) -> Buffers:
    tiled = _mosaic.tiled(dtype)
    return Buffers(
        q=plgpu.SMEM((TILE, width), dtype, transforms=tiled),
        cache=plgpu.SMEM((plan.stages, TILE, width), dtype, transforms=tiled),
        weights=plgpu.SMEM((TILE, TILE), dtype, transforms=tiled),
        factor=plgpu.SMEM((TILE,), jnp.float32),
        q_full=plgpu.Barrier(),
        full=plgpu.Barrier(num_barriers=plan.stages),
        # Released by both warpgroups of all CTAs that a tile is loaded into.
        empty=plgpu.ClusterBarrier(
            collective_axes=("pair",), num_arrivals=2, num_barriers=plan.stages
        ),
        weights_full=plgpu.Barrier(),
        weights_empty=plgpu.Barrier(),
    )


def _load(work: Work, cache: Cache, q: Any, buffers: Buffers, plan: Plan) -> None:
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    plgpu.copy_gmem_to_smem(q.at[work.batch, pl.ds(work.row, TILE)], buffers.q, buffers.q_full)
    page_entries = jnp.int32(cache.entries.shape[1])

    def load_step(i: jax.Array, page: jax.Array) -> jax.Array:
        entry = work.first + i * TILE
        next_page = cache.page(work.batch, entry + TILE)  # on its way while this step waits
        slot = lax.rem(i, jnp.int32(plan.stages))
        pl.when(i >= plan.stages)(lambda: plgpu.barrier_wait(buffers.empty.at[slot]))
        start = pl.multiple_of(lax.rem(entry, page_entries), TILE)
        plgpu.copy_gmem_to_smem(
            cache.entries.at[page, pl.ds(start, TILE)],
            buffers.cache.at[slot],
            buffers.full.at[slot],
            collective_axes=("pair",),
        )
        return next_page

    lax.fori_loop(0, work.steps, load_step, cache.page(work.batch, work.first))

    def drain(i: jax.Array, _: None) -> None:
        plgpu.barrier_wait(buffers.empty.at[lax.rem(i, jnp.int32(plan.stages))])

    lax.fori_loop(jnp.maximum(work.steps - plan.stages, 0), work.steps, drain, None)


def _clear_past_end(work: Work, i: jax.Array, tile: Any, columns: range) -> None:
    """Zeros the values of entries that don't exist: their weight is 0, and 0 * NaN is NaN."""
    valid = work.length - work.first - i * TILE

    @pl.when(valid < TILE)
    def _() -> None:
        entry = plgpu.broadcasted_iota(jnp.int32, (TILE, 64), 0, layout=plgpu.Layout.WGMMA)
        for column in columns[::64]:
            part = tile.at[:, pl.ds(column, 64)]
            values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            part[...] = jnp.where(entry < valid, values, jnp.zeros_like(values))
        plgpu.commit_smem()


def _rescaled(sums: jax.Array, factor: jax.Array) -> jax.Array:
    return sums * lax.broadcast_in_dim(factor, sums.shape, [0])


def _zeros(work: Work, columns: int) -> jax.Array:
    # Of the lengths' type: under shard_map they vary over its axes, and so must a loop's carry.
    zeros = jnp.full((TILE, columns), work.length * 0, jnp.float32)
    return plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)


def _masked(scores: jax.Array, first: jax.Array, work: Work, plan: Plan) -> jax.Array:
    """Scores of the tile from entry `first` on; -inf where the entry is past the row's token."""
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, scores.shape, dim, layout=plgpu.Layout.WGMMA)
        for dim in range(2)
    )
    token = lax.div(row + work.row, jnp.full_like(row, plan.heads))
    position = work.length - plan.tokens + jnp.minimum(token, plan.tokens - 1)
    return jnp.where(column + first <= position, scores, -jnp.inf)


def _score(work: Work, out: Any, stats: Any, buffers: Buffers, *, plan: Plan, scale: float) -> None:
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    dtype, layout = buffers.q.dtype, plgpu.Layout.WGMMA
    plgpu.barrier_wait(buffers.q_full)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sums, top, total = carry
        slot = lax.rem(i, jnp.int32(plan.stages))
        tile = buffers.cache.at[slot]
        plgpu.barrier_wait(buffers.full.at[slot])

        def multiply(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, buffers.q, tile.transpose((1, 0)))
            return acc[...]

        scores = pl.run_scoped(multiply, plgpu.ACC((TILE, TILE), jnp.float32))
        scores = scores * (scale * LOG2_E)
        first = work.first + i * TILE
        all_seen = first + TILE + plan.tokens <= work.length + 1
        scores = lax.cond(all_seen, lambda s: s, lambda s: _masked(s, first, work, plan), scores)
        new_top = jnp.maximum(top, scores.max(axis=1))
        factor = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, [0]))
        total = total * factor + weights.sum(axis=1)
        weights = weights.astype(dtype)

        pl.when(i > 0)(lambda: plgpu.barrier_wait(buffers.weights_empty))
        buffers.weights[...] = weights
        buffers.factor[...] = factor
        plgpu.commit_smem()
        plgpu.barrier_arrive(buffers.weights_full)

        if plan.left:
            _clear_past_end(work, i, tile, range(plan.left))
            values = tile.at[:, pl.ds(0, plan.left)]
            sums = _mosaic.multiply_add(_rescaled(sums, factor), weights, values)
        plgpu.barrier_arrive(buffers.empty.at[slot])
        return sums, new_top, total

    def rows(value: float) -> jax.Array:
        full = jnp.full((TILE,), value + (work.length * 0).astype(jnp.float32))
        return plgpu.layout_cast(full, layout.reduce(1))

    carry = _zeros(work, max(plan.left, 64)), rows(LOWEST), rows(0.0)
    sums, top, total = lax.fori_loop(0, work.steps, step, carry)
    plgpu.barrier_wait(buffers.weights_empty)
    where = work.batch, work.split
    stats[*where, 0, pl.ds(work.row, TILE)] = top
    stats[*where, 1, pl.ds(work.row, TILE)] = total
    if plan.left:
        out[*where, pl.ds(work.row, TILE), pl.ds(0, plan.left)] = sums


def _help(work: Work, out: Any, buffers: Buffers, plan: Plan) -> None:
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    columns = range(plan.left, plan.value_dim)
    pieces = [columns[i : i + PIECE] for i in range(0, len(columns), PIECE)]

    def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slot = lax.rem(i, jnp.int32(plan.stages))
        tile = buffers.cache.at[slot]
        plgpu.barrier_wait(buffers.full.at[slot])
        plgpu.barrier_wait(buffers.weights_full)
        _clear_past_end(work, i, tile, columns)
        factor = plgpu.load(buffers.factor, layout=plgpu.Layout.WGMMA.reduce(1))
        sums = tuple(
            _mosaic.multiply_add(
                _rescaled(part, factor), buffers.weights, tile.at[:, pl.ds(piece[0], len(piece))]
            )
            for part, piece in zip(sums, pieces, strict=True)
        )
        plgpu.barrier_arrive(buffers.weights_empty)
        plgpu.barrier_arrive(buffers.empty.at[slot])
        return sums

    zeros = tuple(_zeros(work, len(piece)) for piece in pieces)
    sums = lax.fori_loop(0, work.steps, step, zeros)
    rows = pl.ds(work.row, TILE)
    for part, piece in zip(sums, pieces, strict=True):
        out[work.batch, work.split, rows, pl.ds(piece[0], len(piece))] = part


def _kernel(
    cache: Cache, q: Any, out: Any, stats: Any, buffers: Buffers, *, plan: Plan, scale: float
) -> None:
    batch, split, warpgroup = (lax.axis_index(a) for a in ("batch", "split", "warpgroup"))
    row_tile = lax.axis_index("rows") * plan.pair + lax.axis_index("pair")
    length, first = cache.lengths_B[batch], split * plan.split
    tiles = lax.div(length - first + (TILE - 1), jnp.int32(TILE))
    work = Work(
        batch=batch,
        row=pl.multiple_of(row_tile * TILE, TILE),
        split=split,
        length=length,
        first=first,
        steps=jnp.clip(tiles, 0, plan.split // TILE),
    )

    @pl.when(work.steps > 0)
    def _() -> None:
        lax.cond(
            warpgroup == LOADER,
            lambda: _load(work, cache, q, buffers, plan),
            lambda: lax.cond(
                warpgroup == SCORER,
                lambda: _score(work, out, stats, buffers, plan=plan, scale=scale),
                lambda: _help(work, out, buffers, plan),
            ),
        )


def _join_kernel(out: Any, stats: Any, lengths_B: Any, joined: Any, *, split: int) -> None:
    batch, row = lax.axis_index("batch"), lax.axis_index("row")
    splits, columns = out.shape[1], out.shape[3]
    layout, length = _mosaic.spread(columns, MAX_VECTOR), lengths_B[batch]
    group = min(splits, JOINED)
    # What lies past the length was never written: the last one before is read again, for nothing.
    used = jnp.minimum(lax.div(length + (split - 1), jnp.int32(split)), splits)

    def add(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, sums_C = carry
        # Without a branch, so that all of the group is on its way at once.
        numbers = [i * group + k for k in range(group)]
        places = [(batch, jnp.minimum(n, used - 1)) for n in numbers]
        tops, totals = ([stats[*place, j, row] for place in places] for j in range(2))
        parts = [plgpu.load(out.at[*place, row], layout=layout) for place in places]
        new_top = functools.reduce(jnp.maximum, tops, top)
        factor = jnp.exp2(top - new_top)
        total, sums_C = total * factor, sums_C * factor
        for n, part_top, part_total, part_C in zip(numbers, tops, totals, parts, strict=True):
            weight = jnp.where(n < used, jnp.exp2(part_top - new_top), 0.0)
            total, sums_C = total + weight * part_total, sums_C + weight * part_C
        return new_top, total, sums_C

    zero = (length * 0).astype(jnp.float32)  # as in `_zeros`
    sums_C = plgpu.layout_cast(jnp.full((columns,), zero), layout)
    groups = lax.div(used + (group - 1), jnp.int32(group))
    _, total, sums_C = lax.fori_loop(0, groups, add, (LOWEST + zero, zero, sums_C))
    scale = 1 / jnp.where(total == 0, 1.0, total)
    joined[batch, row] = (sums_C * scale).astype(joined.dtype)


def _join(
    out_BNRC: jax.Array,
    stats_BN2R: jax.Array,
    lengths_B: jax.Array,
    *,
    cut: Plan,
    dtype: Any,
) -> jax.Array:
    """Adds the splits, each relative to its own top score -> [B, T * H, C]."""
    (batch, _, _, columns), rows = out_BNRC.shape, cut.tokens * cut.heads
    joined_BRC = plgpu.kernel(
        functools.partial(_join_kernel, split=cut.split),
        out_type=jax.ShapeDtypeStruct((batch, rows, columns), dtype),
        grid=(rows, batch),
        grid_names=("row", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="mla_decode_join",
    )(out_BNRC, stats_BN2R, lengths_B)
    joined_BRC = joined_BRC[..., : cut.value_dim]
    return _common.vary(joined_BRC, _common.varying_axes(out_BNRC, lengths_B))


def plan(q_shape: tuple[int, ...], entries: int, value_dim: int, itemsize: int) -> Plan:
    """How to cut up a call: about one split per SM, and none longer than MAX_SPLIT."""
    batch, tokens, heads, width = q_shape
    row_tiles = -(-tokens * heads // TILE)
    most = max(-(-entries // MIN_SPLIT), min(-(-entries // TILE), FEW_SPLITS))
    splits = min(max(_mosaic.HOPPER_SMS // (batch * row_tiles), 1), most)
    splits = max(splits, -(-entries // MAX_SPLIT))
    tile_bytes, weights_bytes = TILE * width * itemsize, TILE * TILE * itemsize
    stages = (SHARED_MEMORY - tile_bytes - weights_bytes) // tile_bytes
    return Plan(
        tokens=tokens,
        heads=heads,
        value_dim=value_dim,
        split=-(-entries // (splits * TILE)) * TILE,
        stages=min(stages, MAX_STAGES),
        pair=2 if row_tiles % 2 == 0 else 1,
        left=value_dim * 3 // 8 // 64 * 64,
    )


def _joined_columns(value_dim: int) -> int:
    """C up to a multiple of a warpgroup's threads; what is past C is not written, and cut off."""
    return pl.cdiv(value_dim, _mosaic.WARPGROUP) * _mosaic.WARPGROUP


def attend(
    q_BTHU: jax.Array, cache: Cache, *, scale: float, cut: Plan
) -> tuple[jax.Array, jax.Array]:
    """The splits' sums [B, N, R, C or more], their top scores and totals [B, N, 2, R]; float32.

    What belongs to a split past the row's length is not written.
    """
    batch, tokens, heads, width = q_BTHU.shape
    rows = -(-tokens * heads // TILE) * TILE
    # Rows past them are loaded as zeros.
    q_BRU = _mosaic.whole_tiles(q_BTHU.reshape(batch, tokens * heads, width), axis=1)
    splits, columns = pl.cdiv(cache.capacity, cut.split), _joined_columns(cut.value_dim)
    parts = plgpu.kernel(
        functools.partial(_kernel, plan=cut, scale=scale),
        out_type=(
            jax.ShapeDtypeStruct((batch, splits, rows, columns), jnp.float32),
            jax.ShapeDtypeStruct((batch, splits, 2, rows), jnp.float32),
        ),
        scratch_types=(_buffer_types(cut, width, q_BTHU.dtype),),
        grid=(rows // TILE // cut.pair, batch, splits),
        grid_names=("rows", "batch", "split"),
        cluster=(cut.pair,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=16),
        kernel_name="mla_decode",
    )(cache, q_BRU)
    axes = _common.varying_axes(q_BTHU, *jax.tree.leaves(cache))
    return tuple(_common.vary(part, axes) for part in parts)


def mla_decode(
    q_BTHU: jax.Array,
    entries: jax.Array,
    lengths_B: jax.Array,
    *tables: jax.Array,
    scale: float,
    value_dim: int,
) -> jax.Array:
    """The public operator, arguments already checked; `tables` holds the block table, if any."""
    batch, tokens, heads, _ = q_BTHU.shape
    lengths_B = lengths_B.astype(jnp.int32)
    cache = Cache(entries, lengths_B, *(t.astype(jnp.int32) for t in tables))
    cut = plan(q_BTHU.shape, cache.capacity, value_dim, q_BTHU.dtype.itemsize)
    parts = attend(q_BTHU, cache, scale=scale, cut=cut)
    out_BRC = _join(*parts, lengths_B, cut=cut, dtype=q_BTHU.dtype)
    return out_BRC.reshape(batch, tokens, heads, value_dim)
