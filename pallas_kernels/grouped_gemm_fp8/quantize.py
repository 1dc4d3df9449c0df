"""From floats to fp8 and float32 scales, by block (arXiv 2412.19437, section 3.3).

A block's largest magnitude becomes 448, the largest number of e4m3; less where it is under 448
times float32's smallest normal number, which no scale is below. Infinities count as float32's
largest number, and no number becomes NaN; a NaN stays one and may take its block with it.

R rows, K contracted width, N output width, G groups, A = K / 128, B = N / 128 blocks.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import _common

BLOCK = 128
"""Numbers of a row, and rows and columns of a weight, that share a scale."""
FP8 = jnp.dtype(jnp.float8_e4m3fn)


def require_blocks(operator: str, **widths: int) -> None:
    """Raises ValueError unless the named widths are positive multiples of 128."""
    for name, width in widths.items():
        _common.require(
            width > 0 and width % BLOCK == 0,
            f"{operator}: {name}={width}, expected a positive multiple of {BLOCK}",
        )


def _quantize(blocks: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Values in fp8, and scales with `axes` of size 1."""
    info, largest = jnp.finfo(jnp.float32), float(jnp.finfo(FP8).max)
    finite = jnp.clip(blocks.astype(jnp.float32), info.min, info.max)
    peak = jnp.max(jnp.abs(finite), axis=axes, keepdims=True)
    # At least the smallest normal number, so that zeros and subnormal blocks have a scale too.
    scales = jnp.maximum(peak / largest, info.tiny)
    # Rounded, a quotient may exceed 448, and a conversion to e4m3 does not saturate by itself.
    return jnp.clip(finite / scales, -largest, largest).astype(FP8), scales


def quantize_rows(x_RK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows in fp8, with a scale for 128 numbers of a row: x is about values * scales.

    Args:
      x_RK: floats; K is a multiple of 128.

    Returns:
      float8_e4m3fn [R, K] and float32 [R, A].

    Raises:
      ValueError: not floats of 2 dimensions, or K is no multiple of 128.
    """
    name = "quantize_rows"
    _common.require_rank(name, 2, x_RK=x_RK)
    _common.require_float(name, x_RK=x_RK)
    rows, contract = x_RK.shape
    require_blocks(name, K=contract)
    values, scales = _quantize(x_RK.reshape(rows, contract // BLOCK, BLOCK), axes=(2,))
    return values.reshape(x_RK.shape), scales[..., 0]


def quantize_weights(w_GNK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights in fp8, with a scale for 128x128 numbers: w is about values * scales.

    Args:
      w_GNK: floats, output by input; N and K are multiples of 128.

    Returns:
      float8_e4m3fn [G, N, K] and float32 [G, B, A].

    Raises:
      ValueError: not floats of 3 dimensions, or N or K is no multiple of 128.
    """
    name = "quantize_weights"
    _common.require_rank(name, 3, w_GNK=w_GNK)
    _common.require_float(name, w_GNK=w_GNK)
    groups, width, contract = w_GNK.shape
    require_blocks(name, N=width, K=contract)
    blocks = w_GNK.reshape(groups, width // BLOCK, BLOCK, contract // BLOCK, BLOCK)
    values, scales = _quantize(blocks, axes=(2, 4))
    return values.reshape(w_GNK.shape), scales[:, :, 0, :, 0]


def dequantize_rows(x_RK: jax.Array, scales_RA: jax.Array) -> jax.Array:
    """values * scales: float32 [R, K]."""
    return x_RK.astype(jnp.float32) * jnp.repeat(scales_RA, BLOCK, axis=1)


def dequantize_weights(w_GNK: jax.Array, scales_GBA: jax.Array) -> jax.Array:
    """values * scales: float32 [G, N, K]."""
    scales_GNK = jnp.repeat(jnp.repeat(scales_GBA, BLOCK, axis=1), BLOCK, axis=2)
    return w_GNK.astype(jnp.float32) * scales_GNK
