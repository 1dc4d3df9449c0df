"""RMSNorm of the residual stream, which goes on through the operator: the gradients of both are
added where they are made.

R rows, D width.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import _common
from pallas_kernels.rms_norm import reference

_MOSAIC_DTYPES = (jnp.bfloat16, jnp.float16)
_MOSAIC_MULTIPLE = 128  # one column to a thread of a warpgroup
_MOSAIC_WIDTH = 6144  # at most: registers hold no wider rows


def _mosaic(x_RD: jax.Array, weight_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.rms_norm import mosaic  # Pallas is only imported where it is used

    return mosaic.rms_norm(x_RD, weight_D, eps)


def _misfit(x_RD: jax.Array) -> str:
    (rows, width), dtype = x_RD.shape, x_RD.dtype
    fits = width % _MOSAIC_MULTIPLE == 0 and 0 < width <= _MOSAIC_WIDTH
    if dtype in _MOSAIC_DTYPES and fits and rows:
        return ""
    return (
        f"takes bfloat16 or float16, widths that are multiples of {_MOSAIC_MULTIPLE} up to "
        f"{_MOSAIC_WIDTH} and at least one row, got {dtype} and {x_RD.shape}"
    )


_IMPLEMENTATIONS = {
    "reference": _common.Implementation(reference.rms_norm),
    "mosaic": _common.Implementation(_mosaic, _misfit),
}


def rms_norm(
    x_RD: jax.Array, weight_D: jax.Array, eps: float, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """x, and x / sqrt(mean of x^2 over a row + eps) * weight; statistics in float32 at least.

    A caller that goes on with the first result gets both gradients added in one pass over x.

    Args:
      x_RD: rows.
      weight_D: floats; rounded to the dtype of x where it multiplies.
      eps: static.
      implementation: "reference"; "mosaic" for Hopper, 16-bit dtypes and widths that are multiples
        of 128 up to 6144: its gradient is a kernel; None for the best.

    Returns:
      Twice [R, D] in the dtype of `x_RD`.

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "rms_norm"
    _common.require_rank(name, 2, x_RD=x_RD)
    _common.require_rank(name, 1, weight_D=weight_D)
    _common.require_float(name, x_RD=x_RD)
    _common.require_float(name, weight_D=weight_D)
    _common.require(
        weight_D.shape == x_RD.shape[1:],
        f"{name}: x_RD is {x_RD.shape}, weight_D {weight_D.shape}: must be [R, D] and [D]",
    )
    run = _common.choose(name, implementation, _IMPLEMENTATIONS, x_RD)
    return run(*_common.vary_together(x_RD, weight_D), eps)
