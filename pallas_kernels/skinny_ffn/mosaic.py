"""The operators for Hopper: every weight in use is read once, as fast as memory gives.

A piece of work is 64 columns of a result. For the dense FFN each has a CTA of its own. Of experts'
a CTA does one after the other, the next one's weights on their way while it ends the last, and
there are as many CTAs as SMs: what an SM has left is for the kernels of the block's other path.

All rows are multiplied with every expert in use: a wgmma has 64 anyway, and it is the weights that
take time. Which experts are in use is a short list, in order of their ids, that both launches read:
the first gives what stands between an expert's two products, the second sums of what some experts
give: of as many as `experts_to_a_part` says, in order of the list. So the order of a row's sum
depends on which experts the other rows use, and on their number.

M rows; D model, F expert width; X experts; S slots of the list, in G parts.
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
from pallas_kernels.skinny_ffn import reference
from pallas_kernels.skinny_gemm.mosaic import PIECE, ROWS, Stream, piece
from pallas_kernels.skinny_gemm.mosaic import STAGES as DOWN_STAGES

WIDE_STAGES = 4  # of three operands; as many bytes as the six of two: two CTAs fit into an SM


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


def _work(
    buffers: Buffers,
    total: Any,
    most: int,
    tiles: int,
    sources: Callable[..., tuple[Any, ...]],
    finish: Callable[..., tuple[jax.Array, Any]],
) -> None:
    """Every so many-th piece of work, by this CTA: one is a part, all of its steps, for a tile.

    With 10 steps, at most 4 in a part, and 2 tiles, there are 6 pieces of 4, 4, 4, 4, 2 and 2
    steps; the first of 4 CTAs does pieces 0 and 4, steps 0 to 3 and 4 to 5 of its stream.

    Args:
      buffers: shared memory.
      total: steps of all parts, of 64 contracted numbers each; an int or traced.
      most: steps of a part; of the last one those that are left.
      tiles: of 64 columns.
      sources: (part, tile, step) -> windows of the rows and of every matrix.
      finish: (part, tile, sums of every matrix) -> a result and the window that it belongs to.
    """
    whole, rest = _mosaic.divmod_by(jnp.int32(total), most)
    parts, cta = whole + (rest > 0).astype(jnp.int32), lax.axis_index("cta")
    long, _ = _mosaic.dealt(whole * tiles, cta, lax.axis_size("cta"))
    mine, index_of = _mosaic.dealt(parts * tiles, cta, lax.axis_size("cta"))

    def first(n: jax.Array) -> jax.Array:
        """Step that a piece begins with."""
        return jnp.minimum(n, long) * most + jnp.maximum(n - long, 0) * rest

    def place(n: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _mosaic.divmod_by(index_of(n), tiles)

    def load(i: jax.Array, stage: jax.Array) -> None:
        late = lax.div(i - long * most, jnp.maximum(rest, 1))
        n = jnp.where(i < long * most, lax.div(i, jnp.int32(most)), long + late)
        x, *matrices = sources(*place(n), i - first(n))
        full = buffers.full.at[stage]
        for matrix, buffer in zip(matrices, buffers.matrices, strict=True):
            plgpu.copy_gmem_to_smem(matrix, buffer.at[stage], full)
        plgpu.copy_gmem_to_smem(x, buffers.x.at[stage, pl.ds(0, x.shape[0])], full)

    stream = Stream(first(mine), buffers.full, load)
    stream.start()

    def one(n: jax.Array, _: None) -> None:
        sums = stream.multiply(first(n), first(n + 1), buffers.x, buffers.matrices)
        values, out = finish(*place(n), *sums)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the result before
        buffers.out[...] = values.astype(buffers.out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffers.out.at[pl.ds(0, out.shape[0])], out)

    lax.fori_loop(jnp.int32(0), mine, one, None)
    plgpu.wait_smem_to_gmem(0)


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return gate / (1 + jnp.exp(-gate)) * up


def _swiglu_kernel(x: Any, gate: Any, up: Any, out: Any, buffers: Buffers) -> None:
    rows = _mosaic.row_window(x.shape[0])

    def sources(_: jax.Array, tile: jax.Array, step: jax.Array) -> tuple[Any, ...]:
        window = piece(step), piece(tile)
        return x.at[rows, piece(step)], gate.at[window], up.at[window]

    def finish(_: jax.Array, tile: jax.Array, *sums: jax.Array) -> tuple[jax.Array, Any]:
        return _swiglu(*sums), out.at[rows, piece(tile)]

    steps = x.shape[1] // PIECE
    _work(buffers, steps, steps, out.shape[1] // PIECE, sources, finish)


def _wide_kernel(
    ids_S: Any, used: Any, weights_SM: Any, x: Any, gate_up: Any, out: Any, buffers: Buffers
) -> None:
    rows, tiles = _mosaic.row_window(x.shape[0]), out.shape[2] // PIECE

    def sources(slot: jax.Array, tile: jax.Array, step: jax.Array) -> tuple[Any, ...]:
        expert, part = ids_S[slot], piece(step)
        halves = (gate_up.at[expert, part, piece(tile + half)] for half in (0, tiles))
        return x.at[rows, part], *halves

    def finish(slot: jax.Array, tile: jax.Array, *sums: jax.Array) -> tuple[jax.Array, Any]:
        values, by_row = _swiglu(*sums), plgpu.Layout.WGMMA.reduce(1)
        weights_M = plgpu.load(weights_SM.at[slot], layout=by_row, optimized=False)
        weights = lax.broadcast_in_dim(weights_M, values.shape, [0])
        # What an expert makes of rows that don't select it may be anything.
        return jnp.where(weights == 0, 0.0, values * weights), out.at[slot, rows, piece(tile)]

    steps = x.shape[1] // PIECE
    _work(buffers, used[0] * steps, steps, tiles, sources, finish)


def _down_kernel(
    ids_S: Any, used: Any, x: Any, down: Any, out: Any, buffers: Buffers, *, each: int
) -> None:
    rows, steps = _mosaic.row_window(out.shape[1]), x.shape[2] // PIECE

    def sources(part: jax.Array, tile: jax.Array, step: jax.Array) -> tuple[Any, ...]:
        slot, step = _mosaic.divmod_by(part * (each * steps) + step, steps)
        return x.at[slot, rows, piece(step)], down.at[ids_S[slot], piece(step), piece(tile)]

    def finish(part: jax.Array, tile: jax.Array, sums: jax.Array) -> tuple[jax.Array, Any]:
        return sums, out.at[part, rows, piece(tile)]

    _work(buffers, used[0] * steps, each * steps, out.shape[2] // PIECE, sources, finish)


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


def experts_in_use(
    experts_MK: jax.Array, num_experts: int, slots: int
) -> tuple[jax.Array, jax.Array]:
    """Ids of the experts that any row selects, in order, then X: int32 [S]; how many: int32 [1]."""
    ids_X = jnp.arange(num_experts, dtype=jnp.int32)
    used_X = (experts_MK.reshape(-1, 1) == ids_X[None]).any(0)
    # How many are in use up to each, by comparing all pairs: in one kernel.
    count_X = jnp.sum(used_X[None] & (ids_X[None] <= ids_X[:, None]), axis=1, dtype=jnp.int32)
    slot_S = jnp.arange(slots, dtype=jnp.int32)
    return jnp.sum(count_X[None] <= slot_S[:, None], axis=1, dtype=jnp.int32), count_X[-1:]


def experts_to_a_part(rows: int) -> int:
    """So many are added up before sums are written: what a part writes stays little beside the
    weights that it reads.
    """
    return pl.cdiv(rows, 16)


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
    each = experts_to_a_part(M)
    slots, ctas = min(M * K, X), _mosaic.num_sms()
    experts_MK = experts_MK.astype(jnp.int32)
    ids_S, used_1 = experts_in_use(experts_MK, X, slots)
    hits_SMK = experts_MK[None] == ids_S[:, None, None]
    weights_SM = jnp.where(hits_SMK, gates_MK.astype(jnp.float32)[None], 0).sum(-1)
    weights_SM = jnp.pad(weights_SM, ((0, 0), (0, ROWS - M)))
    x_MD = _mosaic.whole_tiles(x_MD)
    narrow_SMF = _launch(
        _wide_kernel,
        jax.ShapeDtypeStruct((slots, len(x_MD), F), dtype),
        _buffer_types(dtype, dtype, WIDE_STAGES, 2),
        min(ctas, slots * F // PIECE),
        "skinny_experts_wide",
        ids_S,
        used_1,
        weights_SM,
        x_MD,
        gate_up_XDF,
    )
    parts = pl.cdiv(slots, each)
    sums_GMD = _launch(
        functools.partial(_down_kernel, each=each),
        jax.ShapeDtypeStruct((parts, len(x_MD), D), jnp.float32),
        _buffer_types(dtype, jnp.float32, DOWN_STAGES, 1),
        min(ctas, parts * D // PIECE),
        "skinny_experts_down",
        ids_S,
        used_1,
        narrow_SMF,
        down_XFD,
    )
    in_use_G11 = (jnp.arange(parts, dtype=jnp.int32) * each < used_1)[:, None, None]
    return jnp.where(in_use_G11, sums_GMD[:, :M], 0).sum(axis=0).astype(dtype)


def _keep(operator: Any, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return operator(*operands), operands


def _backward(plain: Any, residuals: tuple[jax.Array, ...], dout: jax.Array) -> Any:
    return jax.vjp(plain, *residuals)[1](dout)


for _operator, _plain in (
    (skinny_swiglu, reference.skinny_swiglu),
    (skinny_experts, reference.skinny_experts),
):
    _operator.defvjp(functools.partial(_keep, _operator), functools.partial(_backward, _plain))
