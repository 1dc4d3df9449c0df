"""The gradient for Hopper: what a row's gradient needs is read once and written once.

XLA norms rows in one pass, but its gradient reads them twice: once for the two sums over a row,
once for what is made of them. Here a CTA is one warpgroup that holds a row in registers; it walks
ROWS rows, the next one's loads in flight, and sums their gradients to the weight in that order.

R rows, D width, N blocks of ROWS rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _common, _mosaic
from pallas_kernels.rms_norm import reference

ROWS = 16
MAX_VECTOR = 8  # columns that a thread loads at a time, 16 bits each


def _gradient_kernel(
    x: Any, weight: Any, dpassed: Any, dnormed: Any, dx: Any, dweight: Any, *, eps: float
) -> None:
    num_rows, width = x.shape
    block, layout = lax.axis_index("block"), _mosaic.spread(width, MAX_VECTOR)
    first = block * ROWS
    last = jnp.minimum(first + ROWS, num_rows) - 1
    load = functools.partial(plgpu.load, layout=layout)

    def row_of(row: Any) -> list[jax.Array]:
        return [load(source.at[row]) for source in (x, dpassed, dnormed)]

    def step(row: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        loaded, dweight_D = carry
        following = row_of(jnp.minimum(row + 1, last))
        x_D, dpassed_D, dnormed_D = (values.astype(jnp.float32) for values in loaded)
        dunit_D = dnormed_D * load(weight)  # from L1: it would take registers for good
        scale = lax.rsqrt((x_D * x_D).sum() / width + eps)
        along = (dunit_D * x_D).sum() / width * (scale * scale)
        dx[row] = (dpassed_D + (dunit_D - x_D * along) * scale).astype(dx.dtype)
        return following, dweight_D + dnormed_D * (x_D * scale)

    start = row_of(first), plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
    _, dweight_D = lax.fori_loop(first, last + 1, step, start)
    dweight[block] = dweight_D


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x_RD: jax.Array, weight_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The public operator, arguments already checked."""
    return reference.rms_norm(x_RD, weight_D, eps)


def _forward(x_RD: jax.Array, weight_D: jax.Array, eps: float) -> tuple[Any, tuple[jax.Array, ...]]:
    return reference.rms_norm(x_RD, weight_D, eps), (x_RD, weight_D)


def _backward(
    eps: float, residuals: tuple[jax.Array, ...], gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    x_RD, weight_D = residuals
    num_rows, width = x_RD.shape
    blocks = pl.cdiv(num_rows, ROWS)
    results = plgpu.kernel(
        functools.partial(_gradient_kernel, eps=eps),
        out_type=(
            jax.ShapeDtypeStruct(x_RD.shape, x_RD.dtype),
            jax.ShapeDtypeStruct((blocks, width), jnp.float32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="rms_norm_gradient",
    )(x_RD, weight_D.astype(x_RD.dtype).astype(jnp.float32), *gradients)
    axes = _common.varying_axes(x_RD, *gradients)
    dx_RD, dweight_ND = (_common.vary(x, axes) for x in results)
    return dx_RD, dweight_ND.sum(0).astype(weight_D.dtype)


rms_norm.defvjp(_forward, _backward)
