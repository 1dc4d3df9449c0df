"""The operators for Hopper: every weight in use is read once, by a CTA of its own.

The first launch owns 64 columns of both halves to a CTA and writes what stands between an expert's
two products; the second adds up what some experts give for 64 columns. All rows are multiplied with
every expert in use: a wgmma has 64 anyway, and it is the weights that take time. Which experts are
in use is a short list, in order of their ids, that both launches read.

M rows; D model, F expert width; X experts; S slots of the list; G parts of it, Q slots in each.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _common, _mosaic
from pallas_kernels.skinny_ffn import reference
from pallas_kernels.skinny_gemm.mosaic import PIECE, ROWS, piece, stream
from pallas_kernels.skinny_gemm.mosaic import STAGES as DOWN_STAGES

WIDE_STAGES = 4  # of three operands: two CTAs fit into an SM, as of the six of two
WAVE = 2 * _mosaic.HOPPER_SMS  # CTAs that run at once


class Buffers(NamedTuple):
    """Shared memory: operands by stage, results, barriers by stage."""

    x: Any
    matrices: tuple[Any, ...]
    out: Any
    full: Any


def _buffer_types(dtype: Any, out_dtype: Any, stages: int, matrices: int) -> Buffers:
    tiles = plgpu.SMEM((stages, ROWS, PIECE), dtype, transforms=_mosaic.tiled(dtype))
    return Buffers(
        x=tiles,
        matrices=(tiles,) * matrices,
        out=plgpu.SMEM((ROWS, PIECE), out_dtype, transforms=_mosaic.tiled(out_dtype)),
        full=plgpu.Barrier(num_arrivals=1 + matrices, num_barriers=stages),
    )


def _store(buffers: Buffers, values: jax.Array, out: Any, rows: Any, columns: Any) -> None:
    buffers.out[...] = values.astype(buffers.out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffers.out.at[pl.ds(0, rows.size)], out.at[rows, columns])
    plgpu.wait_smem_to_gmem(0)


def _wide(x: Any, halves: Any, out: Any, tile: jax.Array, weights: Any, buffers: Buffers) -> None:
    """One CTA's columns of silu(x gate) * (x up), times the rows' weights.

    Args:
      x: [M, K].
      halves: tile -> (gate, up), each a ref [K, N] and its columns of the tile.
      out: [M, F].
      tile: 64 columns.
      weights: one per row [64], or None.
      buffers: shared memory.
    """
    rows = _mosaic.row_window(x.shape[0])

    def load(i: jax.Array, stage: jax.Array) -> None:
        part, full = piece(i), buffers.full.at[stage]
        for (matrix, columns), buffer in zip(halves(tile), buffers.matrices, strict=True):
            plgpu.copy_gmem_to_smem(matrix.at[part, columns], buffer.at[stage], full)
        to = buffers.x.at[stage, pl.ds(0, rows.size)]
        plgpu.copy_gmem_to_smem(x.at[rows, part], to, full)

    def multiply(*sums: Any) -> tuple[jax.Array, ...]:
        def products(stage: jax.Array) -> None:
            for part, buffer in zip(sums, buffers.matrices, strict=True):
                plgpu.wgmma(part, buffers.x.at[stage], buffer.at[stage])

        stream(x.shape[1] // PIECE, buffers.full, load, products, 2)
        return tuple(part[...] for part in sums)

    acc = plgpu.ACC((ROWS, PIECE), jnp.float32)
    gate, up = pl.run_scoped(multiply, acc, acc)
    values = gate / (1 + jnp.exp(-gate)) * up
    if weights is not None:
        weights_M = plgpu.load(weights, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        # What an expert makes of rows that don't select it may be anything.
        weights = lax.broadcast_in_dim(weights_M, values.shape, [0])
        values = jnp.where(weights == 0, 0.0, values * weights)
    _store(buffers, values, out, rows, piece(tile))


def _swiglu_kernel(x: Any, gate: Any, up: Any, out: Any, buffers: Buffers) -> None:
    def halves(tile: jax.Array) -> Any:
        return (gate, piece(tile)), (up, piece(tile))

    _wide(x, halves, out, lax.axis_index("cta"), None, buffers)


def _wide_kernel(
    ids_S: Any, weights_SM: Any, x: Any, gate_up: Any, out: Any, buffers: Buffers
) -> None:
    num_experts, tiles = gate_up.shape[0], out.shape[2] // PIECE
    slot, tile = _mosaic.divmod_by(lax.axis_index("cta"), tiles)
    expert = ids_S[slot]

    @pl.when(expert < num_experts)
    def _() -> None:
        matrix = gate_up.at[expert]

        def halves(tile: jax.Array) -> Any:
            return (matrix, piece(tile)), (matrix, piece(tile + tiles))

        _wide(x, halves, out.at[slot], tile, weights_SM.at[slot], buffers)


def _down_kernel(ids_S: Any, x: Any, down: Any, out: Any, buffers: Buffers) -> None:
    (num_experts, width, _), (parts, num_rows, columns) = down.shape, out.shape
    per_part, per_slot = ids_S.shape[0] // parts, width // PIECE
    part, tile = _mosaic.divmod_by(lax.axis_index("cta"), columns // PIECE)
    first, rows = part * per_part, _mosaic.row_window(num_rows)
    experts = [ids_S[first + q] for q in range(per_part)]
    # The list is in order: what is not in use stands at its end.
    used = sum((expert < num_experts).astype(jnp.int32) for expert in experts)

    def load(i: jax.Array, stage: jax.Array) -> None:
        q, step = _mosaic.divmod_by(i, per_slot)
        expert, full = experts[0], buffers.full.at[stage]
        for other in range(1, per_part):
            expert = jnp.where(q == other, experts[other], expert)
        (buffer,) = buffers.matrices
        plgpu.copy_gmem_to_smem(down.at[expert, piece(step), piece(tile)], buffer.at[stage], full)
        to = buffers.x.at[stage, pl.ds(0, rows.size)]
        plgpu.copy_gmem_to_smem(x.at[first + q, rows, piece(step)], to, full)

    def multiply(sums: Any) -> jax.Array:
        def product(stage: jax.Array) -> None:
            plgpu.wgmma(sums, buffers.x.at[stage], buffers.matrices[0].at[stage])

        stream(used * per_slot, buffers.full, load, product, 1)
        return sums[...]

    sums = pl.run_scoped(multiply, plgpu.ACC((ROWS, PIECE), jnp.float32))
    _store(buffers, sums, out.at[part], rows, piece(tile))


def _launch(kernel: Any, out: Any, buffers: Buffers, ctas: int, name: str, *operands: Any) -> Any:
    out = plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=(buffers,),
        grid=(ctas,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )(*operands)
    return _common.vary(out, _common.varying_axes(*operands))


@jax.custom_vjp
def skinny_swiglu(x_MK: jax.Array, gate_KF: jax.Array, up_KF: jax.Array) -> jax.Array:
    """The public operator, arguments already checked."""
    rows, dtype, width = x_MK.shape[0], x_MK.dtype, gate_KF.shape[1]
    x_MK = _mosaic.whole_tiles(x_MK)
    out_MF = _launch(
        _swiglu_kernel,
        jax.ShapeDtypeStruct((x_MK.shape[0], width), dtype),
        _buffer_types(dtype, dtype, WIDE_STAGES, 2),
        width // PIECE,
        "skinny_swiglu",
        x_MK,
        gate_KF,
        up_KF,
    )
    return out_MF[:rows]


def experts_in_use(experts_MK: jax.Array, num_experts: int, slots: int) -> jax.Array:
    """Ids of the experts that any row selects, in order, then X: int32 [S]."""
    ids_X = jnp.arange(num_experts, dtype=jnp.int32)
    used_X = (experts_MK.reshape(-1, 1) == ids_X[None]).any(0)
    # How many are in use up to each, by comparing all pairs: in one kernel.
    count_X = jnp.sum(used_X[None] & (ids_X[None] <= ids_X[:, None]), axis=1, dtype=jnp.int32)
    slot_S = jnp.arange(slots, dtype=jnp.int32)
    return jnp.sum(count_X[None] <= slot_S[:, None], axis=1, dtype=jnp.int32)


def per_part(slots: int, width: int) -> int:
    """Q: so many that the second launch has no more CTAs than run at once.

    A function of shapes only: it decides the order of sums.

    Args:
      slots: of the list.
      width: D.
    """
    return pl.cdiv(slots * (width // PIECE), WAVE)


@jax.custom_vjp
def skinny_experts(
    x_MD: jax.Array,
    gates_MK: jax.Array,
    experts_MK: jax.Array,
    gate_up_XDF: jax.Array,
    down_XFD: jax.Array,
) -> jax.Array:
    """The public operator, arguments already checked."""
    (M, K), (X, F, D), dtype = experts_MK.shape, down_XFD.shape, x_MD.dtype
    most = min(M * K, X)
    each = per_part(most, D)
    groups = pl.cdiv(most, each)
    slots = groups * each
    experts_MK = experts_MK.astype(jnp.int32)
    ids_S = experts_in_use(experts_MK, X, slots)
    hits_SMK = experts_MK[None] == ids_S[:, None, None]
    weights_SM = jnp.where(hits_SMK, gates_MK.astype(jnp.float32)[None], 0).sum(-1)
    weights_SM = jnp.pad(weights_SM, ((0, 0), (0, ROWS - M)))
    x_MD = _mosaic.whole_tiles(x_MD)
    narrow_SMF = _launch(
        _wide_kernel,
        jax.ShapeDtypeStruct((slots, len(x_MD), F), dtype),
        _buffer_types(dtype, dtype, WIDE_STAGES, 2),
        slots * F // PIECE,
        "skinny_experts",
        ids_S,
        weights_SM,
        x_MD,
        gate_up_XDF,
    )
    sums_GMD = _launch(
        _down_kernel,
        jax.ShapeDtypeStruct((groups, len(x_MD), D), jnp.float32),
        _buffer_types(dtype, jnp.float32, DOWN_STAGES, 1),
        groups * D // PIECE,
        "skinny_experts",
        ids_S,
        narrow_SMF,
        down_XFD,
    )
    return sums_GMD[:, :M].sum(axis=0).astype(dtype)


def _keep(operator: Any, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return operator(*operands), operands


def _backward(plain: Any, residuals: tuple[jax.Array, ...], dout: jax.Array) -> Any:
    return jax.vjp(plain, *residuals)[1](dout)


for _operator, _plain in (
    (skinny_swiglu, reference.skinny_swiglu),
    (skinny_experts, reference.skinny_experts),
):
    _operator.defvjp(functools.partial(_keep, _operator), functools.partial(_backward, _plain))
