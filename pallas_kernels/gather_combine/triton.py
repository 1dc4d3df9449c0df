"""Dispatch for GPUs before Hopper: rows gathered by index at the speed of a copy.

The other direction is the reference's, as for Hopper.

T tokens, R routed rows, D width.
"""

import jax
import triton
import triton.language as tl

from pallas_kernels import _triton
from pallas_kernels.gather_combine import reference

MAX_TILE = 2048  # columns of a program
WARPS = 4


@triton.jit
def _rows_kernel(
    x, token_R, out, NUM_TOKENS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    tiles: tl.constexpr = (WIDTH + TILE - 1) // TILE
    row = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    token = tl.load(token_R + row)
    inside = (columns < WIDTH) & (token >= 0) & (token < NUM_TOKENS)
    values = tl.load(x + token.to(tl.int64) * WIDTH + columns, mask=inside, other=0.0)
    tl.store(out + row.to(tl.int64) * WIDTH + columns, values, mask=columns < WIDTH)


def copy_rows(x_TD: jax.Array, token_of_row_R: jax.Array) -> jax.Array:
    """x[token_of_row], zero where that is outside [0, T)."""
    (num_tokens, width), num_rows = x_TD.shape, token_of_row_R.shape[0]
    tile = min(MAX_TILE, triton.next_power_of_2(width))
    return _triton.launch(
        _rows_kernel,
        (x_TD, token_of_row_R),
        out=jax.ShapeDtypeStruct((num_rows, width), x_TD.dtype),
        programs=num_rows * triton.cdiv(width, tile),
        warps=WARPS,
        NUM_TOKENS=num_tokens,
        WIDTH=width,
        TILE=tile,
    )


TRANSPOSES = reference.transposes(copy_rows)
