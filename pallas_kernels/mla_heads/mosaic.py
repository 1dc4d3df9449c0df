"""The operators for Hopper: a CTA owns 64 columns of one head's result.

For queries it adds the head's terms and multiplies them with its part of the key
up-projection, which is transposed on its way into the tensor cores. The first CTA of a head also
rotates: a product with a permutation brings the members of its pairs side by side, so that no
thread needs another's numbers.

M rows; H heads; N nope dim, P rope dim of I pairs; C latent dim, V value dim; S terms.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _common, _mosaic
from pallas_kernels.skinny_gemm.mosaic import PIECE, ROWS, Stream, piece

PAIRS = PIECE // 2
MATRIX = plgpu.Layout.WGMMA
STAGES = 8  # of values: a latent of 512 is on its way at once


class QueryBuffers(NamedTuple):
    """Shared memory: terms, the query and matrices by piece of 64 columns, the rope part
    last; angles, results; a barrier for either part.
    """

    terms: Any
    x: Any
    matrices: Any
    angles: Any
    out: Any
    rotated: Any
    latent_full: Any
    rope_full: Any


def _query_buffers(dtype: Any, terms: int, pieces: int) -> QueryBuffers:
    tiles, wide = _mosaic.tiled(dtype), _mosaic.tiled(jnp.float32)
    half = plgpu.TilingTransform((8, PAIRS)), plgpu.SwizzleTransform(_mosaic.SWIZZLE_BYTES // 2)
    return QueryBuffers(
        terms=plgpu.SMEM((pieces + 1, terms, ROWS, PIECE), jnp.float32, transforms=wide),
        x=plgpu.SMEM((pieces + 1, ROWS, PIECE), dtype, transforms=tiles),
        matrices=plgpu.SMEM((pieces + 1, PIECE, PIECE), dtype, transforms=tiles),
        angles=plgpu.SMEM((2, ROWS, PAIRS), jnp.float32, transforms=wide),
        out=plgpu.SMEM((ROWS, PIECE), dtype, transforms=tiles),
        rotated=plgpu.SMEM((2, ROWS, PAIRS), dtype, transforms=half),
        latent_full=plgpu.Barrier(num_arrivals=pieces * (terms + 1)),
        rope_full=plgpu.Barrier(num_arrivals=terms + 3),
    )


def _query_kernel(
    terms: Any,
    kv_b: Any,
    order: Any,
    cos: Any,
    sin: Any,
    out: Any,
    buffers: QueryBuffers,
) -> None:
    (num_terms, num_rows, _), latent_dim = terms.shape, kv_b.shape[0]
    pieces = buffers.x.shape[0] - 1  # of the nope part; the rope part is the one after
    head, tile = _mosaic.divmod_by(lax.axis_index("cta"), latent_dim // PIECE)
    rows = _mosaic.row_window(num_rows)
    used = pl.ds(0, rows.size)

    def load_terms(p: int, full: Any) -> None:
        place = piece(head * (pieces + 1) + p)
        for s in range(num_terms):
            to = buffers.terms.at[p, s, used]
            plgpu.copy_gmem_to_smem(terms.at[s, rows, place], to, full)

    def add_terms(p: int) -> None:
        parts = (plgpu.load(buffers.terms.at[p, s], layout=MATRIX) for s in range(num_terms))
        sums = functools.reduce(jnp.add, parts).astype(buffers.x.dtype)
        buffers.x[p] = sums

    for p in range(pieces):
        window = piece(tile), head, pl.ds(p * PIECE, PIECE)
        plgpu.copy_gmem_to_smem(kv_b.at[window], buffers.matrices.at[p], buffers.latent_full)
        load_terms(p, buffers.latent_full)

    @pl.when(tile == 0)
    def _() -> None:
        full = buffers.rope_full
        plgpu.copy_gmem_to_smem(order, buffers.matrices.at[pieces], full)
        for i, angles in enumerate((cos, sin)):
            plgpu.copy_gmem_to_smem(angles.at[rows], buffers.angles.at[i, used], full)
        load_terms(pieces, full)

    plgpu.barrier_wait(buffers.latent_full)
    for p in range(pieces):
        add_terms(p)
    plgpu.commit_smem()

    def multiply(sums: Any) -> jax.Array:
        for p in range(pieces):
            plgpu.wgmma(sums, buffers.x.at[p], buffers.matrices.at[p].transpose((1, 0)))
        return sums[...]

    latent = pl.run_scoped(multiply, plgpu.ACC((ROWS, PIECE), jnp.float32))
    buffers.out[...] = latent.astype(buffers.out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffers.out.at[used], out.at[rows, head, piece(tile)])

    @pl.when(tile == 0)
    def _() -> None:
        plgpu.barrier_wait(buffers.rope_full)
        add_terms(pieces)
        plgpu.commit_smem()

        def multiply(sums: Any) -> jax.Array:
            plgpu.wgmma(sums, buffers.x.at[pieces], buffers.matrices.at[pieces])
            return sums[...]

        pairs = pl.run_scoped(multiply, plgpu.ACC((ROWS, PIECE), jnp.float32))
        first, second = pairs[:, :PAIRS], pairs[:, PAIRS:]
        c, s = (plgpu.load(buffers.angles.at[i], layout=MATRIX) for i in range(2))
        for i, member in enumerate((first * c - second * s, second * c + first * s)):
            buffers.rotated[i] = member.astype(buffers.rotated.dtype)
        plgpu.commit_smem()
        for i in range(2):
            place = pl.ds(latent_dim + i * PAIRS, PAIRS)
            plgpu.copy_smem_to_gmem(buffers.rotated.at[i, used], out.at[rows, head, place])

    plgpu.wait_smem_to_gmem(0)


def absorb_query(
    terms_SMX: jax.Array, kv_b_CHY: jax.Array, cos_MI: jax.Array, sin_MI: jax.Array
) -> jax.Array:
    """The public operator, arguments already checked."""
    (S, M, X), (C, H, _), dtype = terms_SMX.shape, kv_b_CHY.shape, kv_b_CHY.dtype
    pieces = X // H // PIECE - 1
    order = jnp.asarray(np.concatenate([np.eye(PIECE)[:, i::2] for i in range(2)], axis=1), dtype)
    cos_MI, sin_MI = _mosaic.whole_tiles(cos_MI), _mosaic.whole_tiles(sin_MI)
    operands = _mosaic.whole_tiles(terms_SMX, 1), kv_b_CHY, order, cos_MI, sin_MI
    out_MHU = plgpu.kernel(
        _query_kernel,
        out_type=jax.ShapeDtypeStruct((len(cos_MI), H, C + PIECE), dtype),
        scratch_types=(_query_buffers(dtype, S, pieces),),
        grid=(H * (C // PIECE),),
        grid_names=("cta",),
        kernel_name="absorb_query",
    )(*operands)
    return _common.vary(out_MHU[:M], _common.varying_axes(*operands))


class ValueBuffers(NamedTuple):
    """Shared memory: operands by stage, results, barriers by stage."""

    x: Any
    w: Any
    out: Any
    full: Any


def _value_kernel(x: Any, kv_b: Any, out: Any, buffers: ValueBuffers) -> None:
    (num_rows, _, value_dim), (latent_dim, _, width) = out.shape, kv_b.shape
    head, tile = _mosaic.divmod_by(lax.axis_index("cta"), value_dim // PIECE)
    rows = _mosaic.row_window(num_rows)
    used = pl.ds(0, rows.size)

    def load(i: jax.Array, stage: jax.Array) -> None:
        part, full = piece(i), buffers.full.at[stage]
        window = part, head, piece(tile + (width - value_dim) // PIECE)
        plgpu.copy_gmem_to_smem(kv_b.at[window], buffers.w.at[stage], full)
        plgpu.copy_gmem_to_smem(x.at[rows, head, part], buffers.x.at[stage, used], full)

    steps = latent_dim // PIECE
    stream = Stream(steps, buffers.full, load)
    stream.start()
    (values,) = stream.multiply(0, steps, buffers.x, (buffers.w,))
    buffers.out[...] = values.astype(buffers.out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffers.out.at[used], out.at[rows, head, piece(tile)])
    plgpu.wait_smem_to_gmem(0)


def expand_values(x_MHC: jax.Array, kv_b_CHY: jax.Array, *, value_dim: int) -> jax.Array:
    """The public operator, arguments already checked."""
    rows, dtype = x_MHC.shape[0], x_MHC.dtype
    x_MHC = _mosaic.whole_tiles(x_MHC)
    M, H, _ = x_MHC.shape
    tiles = _mosaic.tiled(dtype)
    operand = plgpu.SMEM((STAGES, ROWS, PIECE), dtype, transforms=tiles)
    out = plgpu.SMEM((ROWS, PIECE), dtype, transforms=tiles)
    full = plgpu.Barrier(num_arrivals=2, num_barriers=STAGES)
    out_MHV = plgpu.kernel(
        _value_kernel,
        out_type=jax.ShapeDtypeStruct((M, H, value_dim), dtype),
        scratch_types=(ValueBuffers(operand, operand, out, full),),
        grid=(H * (value_dim // PIECE),),
        grid_names=("cta",),
        kernel_name="expand_values",
    )(x_MHC, kv_b_CHY)
    return _common.vary(out_MHV[:rows], _common.varying_axes(x_MHC, kv_b_CHY))
