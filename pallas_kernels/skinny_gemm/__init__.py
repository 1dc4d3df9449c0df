"""Products of few rows with matrices: what decoding does with every weight.

M rows, K contracted, N columns.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _common
from pallas_kernels.skinny_gemm import reference

MAX_ROWS = 64
"""Of the kernel: what a wgmma has."""
_MOSAIC_DTYPES = (jnp.bfloat16, jnp.float16)
_MOSAIC_MULTIPLE = 64  # of K and N


def _mosaic(*operands: jax.Array, **options: Any) -> jax.Array:
    from pallas_kernels.skinny_gemm import mosaic  # Pallas is only imported where it is used

    if options["summed"]:
        return mosaic.skinny_gemm(*operands, **options)
    return _common.inference_only(
        "skinny_gemm: only implementation='reference' has a gradient with summed=False",
        functools.partial(mosaic.skinny_gemm, **options),
        *operands,
    )


def _mosaic_misfit(x_MK: jax.Array, *matrices: jax.Array) -> str:
    (rows, contracted), widths = x_MK.shape, [w_KN.shape[1] for w_KN in matrices]
    sizes = (contracted, *(n for w_KN in matrices for n in w_KN.shape))
    if (
        x_MK.dtype in _MOSAIC_DTYPES
        and 0 < rows <= MAX_ROWS
        and all(n > 0 and n % _MOSAIC_MULTIPLE == 0 for n in sizes)
    ):
        return ""
    return (
        f"takes bfloat16 or float16, 1 to {MAX_ROWS} rows, and positive multiples of "
        f"{_MOSAIC_MULTIPLE} as K and N, got {x_MK.dtype}, {rows}, {contracted} and {widths}"
    )


_IMPLEMENTATIONS = {
    "reference": _common.Implementation(reference.skinny_gemm),
    "mosaic": _common.Implementation(_mosaic, _mosaic_misfit),
}


def skinny_gemm(
    x_MK: jax.Array,
    *matrices: jax.Array,
    out_dtype: Any = None,
    summed: bool = True,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """x w of one matrix or more, in one launch; summed in float32 at least.

    Args:
      x_MK: few rows; for many, this is no better than any product.
      *matrices: w_KN, each with its own N.
      out_dtype: of the results: that of the operands (None), or the one sums run in.
      summed: False: the results' terms, in float32 at least, for `add_norm` and `absorb_query`. How
        many they are is a function of shapes and the implementation. They have a gradient only in
        the reference.
      implementation: "reference"; "mosaic" for Hopper, 16-bit dtypes, 1 to 64 rows and K and N that
        are multiples of 64; None for "mosaic" where it runs and "reference" elsewhere. The gradient
        is the reference's.

    Returns:
      [M, N] for every matrix, or terms [S, M, N].

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "skinny_gemm"
    named = {f"matrices[{i}]": w_KN for i, w_KN in enumerate(matrices)}
    _common.require(bool(matrices), f"{name}: no matrix given")
    _common.require_rank(name, 2, x_MK=x_MK, **named)
    _common.require_float(name, x_MK=x_MK, **named)
    for key, w_KN in named.items():
        _common.require(
            x_MK.shape[1] == w_KN.shape[0],
            f"{name}: rows are {x_MK.shape[1]} wide, {key} takes {w_KN.shape[0]}",
        )
    allowed = x_MK.dtype, _common.accumulation_dtype(x_MK.dtype)
    out_dtype = _common.choose_dtype(name, out_dtype, allowed)
    run = _common.choose(name, implementation, _IMPLEMENTATIONS, x_MK, *matrices)
    x_MK, *matrices = _common.vary_together(x_MK, *matrices)
    return run(x_MK, tuple(matrices), out_dtype=out_dtype, summed=summed)
