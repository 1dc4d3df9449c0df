"""The operator for Hopper: every weight is read once, by a CTA of its own, as fast as memory gives.

A CTA is one warpgroup and owns 64 columns of a matrix and one split of the contracted dimension. It
loads both operands into a ring of stages, multiplies with all 64 rows that a wgmma has (those past
M hold anything and go nowhere), and stores its sums in float32. Who reads the result adds the
splits, in fixed order: XLA, or the kernel that takes the terms.

M rows; K contracted; N columns; S splits.
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
from pallas_kernels.skinny_gemm import reference

ROWS = 64  # of a wgmma
PIECE = 64  # columns of a CTA, and entries of a step: a swizzled row of 16-bit numbers
STAGES = 6  # steps in shared memory: two CTAs fit into an SM


class Buffers(NamedTuple):
    """Shared memory: operands by stage, sums, barriers by stage."""

    x: Any
    w: Any
    sums: Any
    full: Any


def _buffer_types(dtype: Any) -> Buffers:
    tiles = plgpu.SMEM((STAGES, ROWS, PIECE), dtype, transforms=_mosaic.tiled(dtype))
    return Buffers(
        x=tiles,
        w=tiles,
        sums=plgpu.SMEM((ROWS, PIECE), jnp.float32, transforms=_mosaic.tiled(jnp.float32)),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    )


def piece(index: Any) -> Any:
    """Slice of PIECE columns or entries."""
    return pl.ds(pl.multiple_of(index * PIECE, PIECE), PIECE)


class Stream(NamedTuple):
    """A ring of stages through which a CTA's operands pass, step by step."""

    steps: Any
    """How many; an int or traced."""
    full: Any
    """Barriers by stage."""
    load: Callable[[jax.Array, jax.Array], None]
    """(step, stage): starts its copies."""

    def start(self) -> None:
        """Fills the ring."""
        for i in range(self.full.shape[0]):
            pl.when(i < self.steps)(functools.partial(self.load, jnp.int32(i), jnp.int32(i)))

    def multiply(
        self, first: Any, last: Any, x: Any, matrices: tuple[Any, ...]
    ) -> tuple[jax.Array, ...]:
        """Sums of x w over the steps from `first` up to `last`, of every matrix; stages that become
        free are filled with later steps. Operands are buffers by stage.
        """
        stages = self.full.shape[0]

        def run(*sums: Any) -> tuple[jax.Array, ...]:
            def step(i: jax.Array, _: None) -> None:
                stage = lax.rem(i, jnp.int32(stages))
                plgpu.barrier_wait(self.full.at[stage])
                for part, w in zip(sums, matrices, strict=True):
                    plgpu.wgmma(part, x.at[stage], w.at[stage])

                @pl.when((i > 0) & (i - 1 + stages < self.steps))
                def _() -> None:
                    plgpu.wgmma_wait(len(sums))
                    plgpu.commit_smem()  # all warps are done with the step before
                    self.load(i - 1 + stages, lax.rem(i - 1, jnp.int32(stages)))

            lax.fori_loop(jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32), step, None)
            return tuple(part[...] for part in sums)

        return pl.run_scoped(run, *(plgpu.ACC((ROWS, PIECE), jnp.float32) for _ in matrices))


def _part(x: Any, w: Any, out: Any, buffers: Buffers, steps: int, cta: jax.Array) -> None:
    """One CTA's columns and split of x w."""
    split, tile = _mosaic.divmod_by(cta, w.shape[1] // PIECE)
    columns, rows = piece(tile), _mosaic.row_window(x.shape[0])
    in_use = pl.ds(0, rows.size)

    def load(i: jax.Array, stage: jax.Array) -> None:
        part = piece(split * steps + i)
        full = buffers.full.at[stage]
        plgpu.copy_gmem_to_smem(w.at[part, columns], buffers.w.at[stage], full)
        plgpu.copy_gmem_to_smem(x.at[rows, part], buffers.x.at[stage, in_use], full)

    stream = Stream(steps, buffers.full, load)
    stream.start()
    (buffers.sums[...],) = stream.multiply(0, steps, buffers.x, (buffers.w,))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffers.sums.at[in_use], out.at[split, rows, columns])
    plgpu.wait_smem_to_gmem(0)


def _kernel(x: Any, matrices: Any, *results: Any, steps: int) -> None:
    *outs, buffers = results
    cta, first = lax.axis_index("cta"), 0
    for w, out in zip(matrices, outs, strict=True):
        last = first + out.shape[0] * (out.shape[2] // PIECE)
        run = functools.partial(_part, x, w, out, buffers, steps, cta - first)
        pl.when((cta >= first) & (cta < last))(run)
        first = last


def splits(contracted: int, columns: int) -> int:
    """Into how many parts of equally many steps K is cut: as many as give every SM a CTA at most.

    A function of shapes only: it decides the order of sums.

    Args:
      contracted: K.
      columns: of all matrices together.
    """
    steps, tiles = contracted // PIECE, columns // PIECE
    fitting = (s for s in range(1, steps + 1) if steps % s == 0 and s * tiles <= _mosaic.HOPPER_SMS)
    return max(fitting, default=1)


Matrices = tuple[jax.Array, ...]


def _terms(x_MK: jax.Array, matrices: Matrices) -> Matrices:
    rows = x_MK.shape[0]
    x_MK = _mosaic.whole_tiles(x_MK)
    padded, contracted = x_MK.shape
    widths = [w_KN.shape[1] for w_KN in matrices]
    parts = splits(contracted, sum(widths))
    terms = plgpu.kernel(
        functools.partial(_kernel, steps=contracted // PIECE // parts),
        out_type=tuple(jax.ShapeDtypeStruct((parts, padded, n), jnp.float32) for n in widths),
        scratch_types=(_buffer_types(x_MK.dtype),),
        grid=(parts * sum(widths) // PIECE,),
        grid_names=("cta",),
        kernel_name="skinny_gemm",
    )(x_MK, matrices)
    axes = _common.varying_axes(x_MK, *matrices)
    return tuple(_common.vary(terms_SMN[:, :rows], axes) for terms_SMN in terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _products(x_MK: jax.Array, matrices: Matrices, out_dtype: Any) -> Matrices:
    return tuple(x_SMN.sum(axis=0).astype(out_dtype) for x_SMN in _terms(x_MK, matrices))


def _forward(x_MK: jax.Array, matrices: Matrices, out_dtype: Any) -> tuple:
    return _products(x_MK, matrices, out_dtype), (x_MK, matrices)


def _backward(out_dtype: Any, residuals: Any, douts: Matrices) -> tuple:
    plain = functools.partial(reference.skinny_gemm, out_dtype=out_dtype, summed=True)
    return jax.vjp(plain, *residuals)[1](douts)


_products.defvjp(_forward, _backward)


def skinny_gemm(x_MK: jax.Array, matrices: Matrices, *, out_dtype: Any, summed: bool) -> Matrices:
    """The public operator, arguments already checked."""
    if not summed:
        return _terms(x_MK, matrices)
    return _products(x_MK, matrices, out_dtype)
