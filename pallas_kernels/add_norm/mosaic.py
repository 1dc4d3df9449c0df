"""The operator for Hopper: a CTA takes one row, and does all that is done to it.

M rows; S terms; D columns.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _common, _mosaic

LONGEST = 4  # numbers that a thread reads at once


def _row(base: Any, terms: Any, weight: Any, total: Any, normed: Any, row: Any, eps: float) -> None:
    width, dtype = weight.shape[0], weight.dtype
    layout = _mosaic.spread(width, LONGEST)

    def read(ref: Any) -> jax.Array:
        return plgpu.load(ref, layout=layout, optimized=False)

    x = None if base is None else read(base.at[row])
    if terms is not None:
        columns = pl.ds(0, width)
        parts = [read(terms.at[s, row, columns]) for s in range(terms.shape[0])]
        sums = functools.reduce(jnp.add, parts).astype(dtype)
        x = sums if x is None else x + sums
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.sum(wide * wide) / width + eps)
    total[row] = x
    normed[row] = (wide * scale).astype(dtype) * read(weight)


def _kernel(bases: Any, terms: Any, weights: Any, totals: Any, normed: Any, *, eps: float) -> None:
    which, row = _mosaic.divmod_by(lax.axis_index("cta"), totals[0].shape[0])
    for i, operands in enumerate(zip(bases, terms, weights, totals, normed, strict=True)):
        pl.when(which == i)(functools.partial(_row, *operands, row, eps))


def add_norm(
    bases: tuple, terms: tuple, weights: tuple[jax.Array, ...], *, eps: float
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """The public operator, arguments already checked."""
    leaves = jax.tree.leaves((bases, terms))
    rows = leaves[0].shape[-2]
    out = tuple(jax.ShapeDtypeStruct((rows, w_D.shape[0]), w_D.dtype) for w_D in weights)
    totals, normed = plgpu.kernel(
        functools.partial(_kernel, eps=eps),
        out_type=(out, out),
        grid=(rows * len(weights),),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=16),
        kernel_name="add_norm",
    )(bases, terms, weights)
    axes = _common.varying_axes(*leaves, *weights)
    return tuple(
        (_common.vary(x, axes), _common.vary(y, axes)) for x, y in zip(totals, normed, strict=True)
    )
