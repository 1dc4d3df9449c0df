"""Gated FFNs of few rows: what decoding does between its norms.

M rows; K contracted, F FFN width; D model; X experts.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import _common
from pallas_kernels.skinny_ffn import reference

MAX_ROWS = 64
"""Of the kernels: what a wgmma has."""
_MOSAIC_DTYPES = (jnp.bfloat16, jnp.float16)
_MOSAIC_MULTIPLE = 64  # of all widths


def _misfit(x_MK: jax.Array, width: int) -> str:
    (rows, contracted), dtype = x_MK.shape, x_MK.dtype
    widths_fit = all(n > 0 and n % _MOSAIC_MULTIPLE == 0 for n in (contracted, width))
    if dtype in _MOSAIC_DTYPES and 0 < rows <= MAX_ROWS and widths_fit:
        return ""
    return (
        f"takes bfloat16 or float16, 1 to {MAX_ROWS} rows, and positive multiples of "
        f"{_MOSAIC_MULTIPLE} as widths, got {dtype}, {rows}, {contracted} and {width}"
    )


def _mosaic_swiglu(*operands: jax.Array) -> jax.Array:
    from pallas_kernels.skinny_ffn import mosaic  # Pallas is only imported where it is used

    return mosaic.skinny_swiglu(*operands)


def _mosaic_experts(*operands: jax.Array) -> jax.Array:
    from pallas_kernels.skinny_ffn import mosaic

    return mosaic.skinny_experts(*operands)


_SWIGLU = {
    "reference": _common.Implementation(reference.skinny_swiglu),
    "mosaic": _common.Implementation(_mosaic_swiglu, _misfit),
}
_EXPERTS = {
    "reference": _common.Implementation(reference.skinny_experts),
    "mosaic": _common.Implementation(_mosaic_experts, _misfit),
}


def reads_selected_experts(x_MD: jax.Array, down_XFD: jax.Array) -> bool:
    """Whether `skinny_experts` of these runs the kernel: the reference multiplies with all."""
    run = _common.choose("skinny_experts", None, _EXPERTS, x_MD, down_XFD.shape[1])
    return run is _mosaic_experts


def skinny_swiglu(
    x_MK: jax.Array, gate_KF: jax.Array, up_KF: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """silu(x gate) * (x up) in one launch; float32 at least until it is rounded once.

    Args:
      x_MK: few rows; for many, this is no better than any product.
      gate_KF: matrix.
      up_KF: another of its shape.
      implementation: "reference"; "mosaic" for Hopper, 16-bit dtypes, 1 to 64 rows and widths that
        are multiples of 64; None for "mosaic" where it runs and "reference" elsewhere. The gradient
        is the reference's.

    Returns:
      [M, F].

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "skinny_swiglu"
    operands = {"x_MK": x_MK, "gate_KF": gate_KF, "up_KF": up_KF}
    _common.require_rank(name, 2, **operands)
    _common.require_float(name, **operands)
    _common.require(
        x_MK.shape[1] == gate_KF.shape[0] and gate_KF.shape == up_KF.shape,
        f"{name}: rows {x_MK.shape} and matrices {gate_KF.shape} and {up_KF.shape} don't fit",
    )
    run = _common.choose(name, implementation, _SWIGLU, x_MK, gate_KF.shape[1])
    return run(*_common.vary_together(x_MK, gate_KF, up_KF))


def skinny_experts(
    x_MD: jax.Array,
    gates_MK: jax.Array,
    experts_MK: jax.Array,
    gate_up_XDF: jax.Array,
    down_XFD: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """sum_k gate_k * SwiGLU_k(x) over the selected experts, of few rows.

    Args:
      x_MD: rows.
      gates_MK: weights of the selections.
      experts_MK: integer ids; a row selects an expert once. Ids from X on select nobody.
      gate_up_XDF: gate half first.
      down_XFD: back to the width of rows.
      implementation: "reference", which multiplies all rows with all experts; "mosaic" as for
        `skinny_swiglu`, which reads those experts that are selected; None for "mosaic" where it
        runs and "reference" elsewhere. The gradient is the reference's.

    Returns:
      [M, D], summed in float32 at least.

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "skinny_experts"
    operands = {"x_MD": x_MD, "gate_up_XDF": gate_up_XDF, "down_XFD": down_XFD}
    _common.require_rank(name, 2, x_MD=x_MD, gates_MK=gates_MK, experts_MK=experts_MK)
    _common.require_rank(name, 3, gate_up_XDF=gate_up_XDF, down_XFD=down_XFD)
    _common.require_float(name, **operands)
    _common.require_integer(name, experts_MK=experts_MK)
    (M, D), (X, F, _) = x_MD.shape, down_XFD.shape
    _common.require(
        gate_up_XDF.shape == (X, D, 2 * F) and down_XFD.shape[2] == D,
        f"{name}: rows {x_MD.shape} and matrices {gate_up_XDF.shape} and {down_XFD.shape} don't "
        "fit",
    )
    _common.require(
        gates_MK.shape == experts_MK.shape and experts_MK.shape[0] == M,
        f"{name}: {M} rows, gates {gates_MK.shape} and experts {experts_MK.shape}",
    )
    run = _common.choose(name, implementation, _EXPERTS, x_MD, F)
    return run(*_common.vary_together(x_MD, gates_MK, experts_MK, gate_up_XDF, down_XFD))
