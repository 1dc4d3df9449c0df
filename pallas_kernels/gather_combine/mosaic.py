"""Dispatch for Hopper: rows gathered by index at the speed of a copy.

The other direction is the reference's: sums of gathered rows run at that speed in XLA's kernels.

T tokens, R routed rows; a width of D columns is seen as D / 128 lines of 128.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _common, _mosaic
from pallas_kernels.gather_combine import reference

LINE = 128  # columns; one to a thread of a warpgroup
SLOTS = 4  # rows in flight in a CTA
SHARED_BYTES = 200 * 1024  # of shared memory, for all CTAs of an SM
MAX_CTAS_PER_SM = 4


def _grid(row_bytes: int) -> int:
    """CTAs that are resident at a time: a persistent kernel has no second wave."""
    per_cta = (SLOTS + 1) * row_bytes
    return _mosaic.num_sms() * min(MAX_CTAS_PER_SM, SHARED_BYTES // per_cta)


def _rows_kernel(
    x: Any, token_R: Any, out: Any, buffers: Any, zeros: Any, full: Any, *, ctas: int
) -> None:
    """Copies rows through shared memory; loads run SLOTS - 1 rows ahead of the stores."""
    num_tokens, num_rows = x.shape[0], out.shape[0]
    mine, row_of = _mosaic.dealt(num_rows, lax.axis_index("cta"), ctas)
    for line in range(zeros.shape[0]):
        zeros[line] = jnp.zeros(LINE, zeros.dtype)
    plgpu.commit_smem()

    def token_of(i: jax.Array) -> jax.Array:
        return token_R[jnp.minimum(row_of(i), num_rows - 1)]

    def load(i: jax.Array, token: jax.Array) -> None:
        slot = lax.rem(i, jnp.int32(SLOTS))
        inside = jnp.clip(token, 0, num_tokens - 1)
        plgpu.copy_gmem_to_smem(x.at[inside], buffers.at[slot], full.at[slot])

    ahead = SLOTS - 1
    for i in range(ahead):
        first = lax.axis_index("cta") * 0 + i
        pl.when(first < mine)(functools.partial(load, first, token_of(first)))

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        token, ahead_token = carry
        # Both numbers are on their way while the rows before them are copied.
        next_tokens = token_of(i + 1), token_of(i + 1 + ahead)
        slot, target = lax.rem(i, jnp.int32(SLOTS)), out.at[row_of(i)]
        plgpu.barrier_wait(full.at[slot])
        inside = (token >= 0) & (token < num_tokens)
        pl.when(inside)(lambda: plgpu.copy_smem_to_gmem(buffers.at[slot], target))
        pl.when(jnp.logical_not(inside))(lambda: plgpu.copy_smem_to_gmem(zeros, target))

        @pl.when(i + ahead < mine)
        def _() -> None:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the store before has read its slot
            load(i + ahead, ahead_token)

        return next_tokens

    zero = lax.axis_index("cta") * 0
    lax.fori_loop(0, mine, body, (token_of(zero), token_of(zero + ahead)))
    plgpu.wait_smem_to_gmem(0)


def copy_rows(x_TD: jax.Array, token_of_row_R: jax.Array) -> jax.Array:
    """x[token_of_row], zero where that is outside [0, T)."""
    num_tokens, width = x_TD.shape
    num_rows, num_lines = token_of_row_R.shape[0], width // LINE
    grid = _grid(width * x_TD.dtype.itemsize)
    out = plgpu.kernel(
        functools.partial(_rows_kernel, ctas=grid),
        out_type=jax.ShapeDtypeStruct((num_rows, num_lines, LINE), x_TD.dtype),
        scratch_types=(
            plgpu.SMEM((SLOTS, num_lines, LINE), x_TD.dtype),
            plgpu.SMEM((num_lines, LINE), x_TD.dtype),
            plgpu.Barrier(num_barriers=SLOTS),
        ),
        grid=(grid,),
        grid_names=("cta",),
        kernel_name="gather_rows",
    )(x_TD.reshape(num_tokens, num_lines, LINE), token_of_row_R)
    out = _common.vary(out, _common.varying_axes(x_TD))
    return out.reshape(num_rows, width)


TRANSPOSES = reference.transposes(copy_rows)
