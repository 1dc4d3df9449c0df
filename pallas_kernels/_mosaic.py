"""What the Mosaic GPU kernels share.

Importing it needs no GPU: kernels lower for CUDA on any machine and run in the CPU interpreter
under `plgpu.force_gpu_interpret_mode`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Streaming multiprocessors of the H100 and H200 in their SXM form, for programs that are compiled
# where there is no GPU.
HOPPER_SMS = 132
SWIZZLE_BYTES = 128
TILE_ROWS = 8  # of swizzled shared memory
WARPGROUP = 128  # threads


def num_sms() -> int:
    """Streaming multiprocessors of the GPU that a persistent kernel spreads over."""
    device = jax.local_devices()[0]
    return device.core_count if device.platform == "gpu" else HOPPER_SMS


def tiled(
    dtype: Any, rows: int = TILE_ROWS
) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The layout of shared memory that TMA writes and wgmma reads, 128 bytes to a row.

    With `rows=1` the bytes are the same, but single rows may be sliced.
    """
    tiling = plgpu.TilingTransform((rows, SWIZZLE_BYTES // jnp.dtype(dtype).itemsize))
    return tiling, plgpu.SwizzleTransform(SWIZZLE_BYTES)


def spread(width: int, most: int) -> plgpu.Layout:
    """Columns of a row over the threads of a warpgroup, up to `most` side by side, a power of 2, as
    the width, a multiple of 128, allows.
    """
    vector = most
    while width % (WARPGROUP * vector):
        vector //= 2
    return plgpu.Layout.WG_STRIDED((width,), vector)


def row_window(rows: int) -> Any:
    """Slice of all rows in whole tiles; what a copy finds past the last one is zero, and is not
    stored.
    """
    # Not a literal: where a slice ends is only checked of those.
    first = pl.multiple_of(lax.axis_index("cta") * 0, TILE_ROWS)
    return pl.ds(first, -(-rows // TILE_ROWS) * TILE_ROWS)


def in_whole_tiles(rows: int) -> int:
    """So many rows, or up to whole tiles where there is more than one: copies take no others."""
    return rows if rows <= TILE_ROWS else -(-rows // TILE_ROWS) * TILE_ROWS


def whole_tiles(x: jax.Array, axis: int = 0) -> jax.Array:
    """x with zeros up to `in_whole_tiles` rows."""
    missing = in_whole_tiles(x.shape[axis]) - x.shape[axis]
    return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)])


def divmod_by(value: jax.Array, divisor: Any) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of int32 numbers that are not negative."""
    divisor = jnp.int32(divisor)
    quotient = lax.div(value, divisor)
    return quotient, value - quotient * divisor


def dealt(
    total: Any, worker: jax.Array, workers: Any
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """How many of `total` things a worker takes, every so many-th, and which is its i-th.

    Args:
      total: an int or traced.
      worker: number below `workers`.
      workers: among whom they are dealt out; an int or traced.
    """
    workers = jnp.int32(workers)
    return lax.div(total - worker + workers - 1, workers), lambda i: worker + i * workers


def multiply_add(sums: jax.Array, a: Any, b: Any) -> jax.Array:
    """sums + a b, finished on return.

    The interpreter knows neither sums nor an `a` that come from registers: tests replace this.

    Args:
      sums: float32 in registers.
      a: in registers or shared memory.
      b: in shared memory.
    """
    return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(sums))


def add_smem_to_gmem(part: Any, out: Any) -> None:
    """Starts adding shared memory to device memory, in L2: the values there never come here.

    Bitwise repeatable where no other addition touches the same numbers; subnormal ones may become
    zero. The interpreter does not know it: tests replace this.

    Args:
      part: what is added, in shared memory.
      out: float32 in device memory.
    """
    plgpu.copy_smem_to_gmem(part, out, reduction_op="add")
