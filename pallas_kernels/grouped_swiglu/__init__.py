"""What stands between an expert's two products: SwiGLU, and the row's gate.

R rows, of which the first belong to experts; F expert width.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import _common
from pallas_kernels.grouped_swiglu import reference

_MOSAIC_DTYPES = (jnp.bfloat16, jnp.float16)
_MOSAIC_MULTIPLE = 64  # columns of a swizzled row of shared memory


def _mosaic(*operands: jax.Array) -> jax.Array:
    from pallas_kernels.grouped_swiglu import mosaic  # Pallas is only imported where it is used

    return mosaic.grouped_swiglu(*operands)


def _misfit(wide_RF: jax.Array) -> str:
    (rows, width), dtype = wide_RF.shape, wide_RF.dtype
    if dtype in _MOSAIC_DTYPES and width % (2 * _MOSAIC_MULTIPLE) == 0 and rows * width > 0:
        return ""
    return (
        f"takes bfloat16 or float16, widths that are multiples of {_MOSAIC_MULTIPLE} and at least "
        f"one row, got {dtype} and {wide_RF.shape}"
    )


_IMPLEMENTATIONS = {
    "reference": _common.Implementation(reference.grouped_swiglu),
    "mosaic": _common.Implementation(_mosaic, _misfit),
}


def grouped_swiglu(
    wide_RF: jax.Array,
    gates_R: jax.Array,
    num_rows: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """silu(wide[r, :F]) * wide[r, F:] * gates[r] for r < num_rows, zero from there on; in float32
    at least, rounded once.

    Args:
      wide_RF: [R, 2 F], gate half first.
      gates_R: [R] floats.
      num_rows: rows in use, an integer scalar. Others are not read, and get and give no gradient.
      implementation: "reference"; "mosaic" for Hopper, 16-bit dtypes and F a multiple of 64; None
        for the best.

    Returns:
      [R, F] in the dtype of `wide_RF`.

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "grouped_swiglu"
    _common.require_rank(name, 2, wide_RF=wide_RF)
    _common.require_rank(name, 1, gates_R=gates_R)
    _common.require_rank(name, 0, num_rows=num_rows)
    _common.require_float(name, wide_RF=wide_RF)
    _common.require_float(name, gates_R=gates_R)
    _common.require_integer(name, num_rows=num_rows)
    _common.require(
        wide_RF.shape[1] % 2 == 0 and gates_R.shape == wide_RF.shape[:1],
        f"{name}: wide_RF is {wide_RF.shape}, gates_R {gates_R.shape}: must be [R, 2 F] and [R]",
    )
    run = _common.choose(name, implementation, _IMPLEMENTATIONS, wide_RF)
    return run(*_common.vary_together(wide_RF, gates_R), num_rows)
