"""Gradient of causal attention to the queries for Hopper: dq = scale * dS k, a triangular product
with the packed tiles of dS that the gradient to the keys has left.

B batch, T tokens (queries), S keys, H heads, Q query and key width, N tiles of dS.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _common
from pallas_kernels.flash_mla import mosaic_tile, schedule
from pallas_kernels.flash_mla.mosaic_tile import LOADER
from pallas_kernels.flash_mla.schedule import CHUNK, PIECE


class Buffers(NamedTuple):
    """Shared memory: parts of the keys and tiles of dS by stage, the result, and barriers."""

    keys: tuple[Any, ...]
    ds: Any
    out: Any
    full: Any
    free: Any


class Place(NamedTuple):
    """What a CTA computes: chunks of queries from `top` on, with `count` chunks of keys from
    `first` on. Query chunk i sees keys up to chunk i + `ahead`.
    """

    batch: Any
    head: Any
    own_head: Any
    top: Any
    ahead: Any
    first: Any
    count: Any


def _load(place: Place, operands: tuple[Any, ...], key_chunks: int, smem: Buffers) -> None:
    """The loading warpgroup: blocks of keys, and the tiles of dS that meet them."""
    plgpu.set_max_registers(mosaic_tile.LOADER_REGISTERS, action="decrease")
    keys, ds = operands
    stages = smem.ds.shape[0]

    def load(t: jax.Array, _: None) -> None:
        slot, j = lax.rem(t, jnp.int32(stages)), place.first + t
        full = smem.full.at[slot]
        pl.when(t >= stages)(lambda: plgpu.barrier_wait(smem.free.at[slot]))
        for key, buffer in zip(keys, smem.keys, strict=True):
            source = mosaic_tile.of_head(key, place.batch, pl.ds(j * CHUNK, CHUNK), place.head)
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], full)
        for warpgroup in range(2):
            # Past its diagonal a chunk loads its last tile again and doesn't use it.
            i = place.top + warpgroup
            last = jnp.minimum(i + place.ahead, key_chunks - 1)
            tile = schedule.tile_index(i, jnp.minimum(j, last), place.ahead)
            source = ds.at[place.batch, place.own_head, tile]
            plgpu.copy_gmem_to_smem(source, smem.ds.at[slot, warpgroup], full)

    lax.fori_loop(0, place.count, load, None)

    def take_what_is_left(t: jax.Array, _: None) -> None:
        plgpu.barrier_wait(smem.free.at[lax.rem(t, jnp.int32(stages))])

    lax.fori_loop(jnp.maximum(place.count - stages, 0), place.count, take_what_is_left, None)


def _sum(place: Place, smem: Buffers) -> list[jax.Array]:
    """A computing warpgroup: dS k of its chunk of queries, for each part of the keys."""
    stages, parts = jnp.int32(smem.ds.shape[0]), len(smem.keys)
    warpgroup = lax.axis_index("warpgroup")
    count = jnp.minimum(place.top + warpgroup + place.ahead + 1 - place.first, place.count)

    def accumulate(*sums_refs: Any) -> list[jax.Array]:
        def step(t: jax.Array, _: None) -> None:
            slot = lax.rem(t, stages)
            plgpu.barrier_wait(smem.full.at[slot])
            tile = smem.ds.at[slot, warpgroup].transpose((1, 0))
            for sums_ref, keys in zip(sums_refs, smem.keys, strict=True):
                plgpu.wgmma(sums_ref, tile, keys.at[slot])
            plgpu.wgmma_wait(parts)  # the step before is done
            before = smem.free.at[lax.rem(t - 1, stages)]
            pl.when(t > 0)(lambda: plgpu.barrier_arrive(before))

        lax.fori_loop(0, count, step, None)
        sums = [plgpu.wgmma_accumulator_load(ref) for ref in sums_refs]
        plgpu.barrier_arrive(smem.free.at[lax.rem(count - 1, stages)])

        def pass_block(t: jax.Array, _: None) -> None:
            plgpu.barrier_wait(smem.full.at[lax.rem(t, stages)])
            plgpu.barrier_arrive(smem.free.at[lax.rem(t, stages)])

        lax.fori_loop(count, place.count, pass_block, None)
        return sums

    accumulators = (plgpu.ACC((CHUNK, keys.shape[2]), jnp.float32) for keys in smem.keys)
    return pl.run_scoped(accumulate, *accumulators)


def query_gradient(
    keys: tuple[jax.Array, ...],
    ds: jax.Array,
    num_queries: int,
    segment_ids: jax.Array | None,
    offset: jax.Array | None,
    *,
    scale: float,
    heads: schedule.Heads,
) -> jax.Array:
    """dq [B, T, heads, Q] from tiles of dS^T [B, heads, N, 64, 64] and parts of the keys."""
    (batch, num_heads), num_keys = ds.shape[:2], keys[0].shape[1]
    num_tiles, key_chunks = schedule.chunks(num_queries) // 2, schedule.chunks(num_keys)
    widths = [key.shape[-1] for key in keys]
    grid = schedule.grid(batch, num_heads, num_tiles)

    def locate(first_head: Any, segments: Any, offset: Any) -> Place:
        b, own, nth = grid.place()
        tile = num_tiles - 1 - nth
        head = own if first_head is None else first_head[0] + own
        ahead = schedule.chunks_ahead(None if offset is None else offset[0])
        first = tile * 0 if segments is None else segments.end_BN[b, tile]
        end = jnp.minimum(2 * tile + 2 + ahead, key_chunks)
        return Place(b, head, own, 2 * tile, ahead, first, end - first)

    def kernel(keys: Any, ds: Any, tables: Any, dq: Any, smem: Buffers) -> None:
        place, warpgroup = locate(*tables), lax.axis_index("warpgroup")

        @pl.when(warpgroup == LOADER)
        def _() -> None:
            _load(place, (keys, ds), key_chunks, smem)

        @pl.when(warpgroup != LOADER)
        def _() -> None:
            plgpu.set_max_registers(mosaic_tile.COMPUTE_REGISTERS, action="increase")
            sums = _sum(place, smem)
            rows = pl.ds((place.top + warpgroup) * CHUNK, CHUNK)
            column = 0
            for values, width in zip(sums, widths, strict=True):
                mosaic_tile.store_pieces(
                    (values * scale).astype(dq.dtype),
                    smem.out.at[warpgroup, pl.ds(column // PIECE, width // PIECE)],
                    dq.at[place.batch, rows, place.own_head, pl.ds(column, width)],
                )
                column += width
            plgpu.wait_smem_to_gmem(0)

    stages, dtype = schedule.query_stages(sum(widths)), ds.dtype
    segments = schedule.of_queries(segment_ids, offset, num_queries, schedule.QUERY_ROWS, CHUNK)
    scratch = Buffers(
        keys=tuple(mosaic_tile.shared(dtype, stages, CHUNK, width) for width in widths),
        ds=mosaic_tile.shared(dtype, stages, 2, CHUNK, CHUNK),
        out=mosaic_tile.shared(dtype, 2, sum(widths) // PIECE, CHUNK, PIECE),
        full=plgpu.Barrier(num_arrivals=len(keys) + 2, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )
    dq = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, num_queries, num_heads, sum(widths)), dtype),
        scratch_types=(scratch,),
        grid=grid.sizes,
        grid_names=grid.names,
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="flash_mla_queries",
    )(keys, ds, (heads.first, segments, offset))
    return _common.vary(dq, _common.varying_axes(*keys, ds))
