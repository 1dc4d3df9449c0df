"""The operator for Hopper: rows in use are read once and written once, in either direction.

A CTA is one warpgroup and has 64 rows; it walks their columns, 64 at a time. The gradient to a
row's gate is a sum over them, in that order.

R rows, F expert width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _common, _mosaic

ROWS = 64
PIECE = 64  # columns of a swizzled row of shared memory, 16 bits each
SHAPE = (ROWS, PIECE)
STAGES = 3  # pieces of the operands in shared memory
SLOTS = 2  # pieces of the results there
MATRIX = plgpu.Layout.WGMMA
ALONG_ROWS = MATRIX.reduce(1)


class Buffers(NamedTuple):
    """Shared memory: pieces of operands and results, their stages first; sums; barriers."""

    sources: Any
    targets: Any
    sums: Any
    full: Any


class Part(NamedTuple):
    """Columns of a matrix in device memory, from `column` on."""

    matrix: Any
    column: Any = 0

    def piece(self, row: jax.Array, i: jax.Array) -> Any:
        """The i-th piece of the rows from `row` on."""
        column = pl.multiple_of(self.column + i * PIECE, PIECE)
        return self.matrix.at[pl.ds(row, ROWS), pl.ds(column, PIECE)]


def _buffer_types(sources: int, targets: int, dtype: Any) -> Buffers:
    tiles = functools.partial(plgpu.SMEM, dtype=dtype, transforms=_mosaic.tiled(dtype))
    return Buffers(
        sources=tiles((STAGES, sources, *SHAPE)),
        targets=tiles((SLOTS, targets, *SHAPE)),
        sums=plgpu.SMEM((ROWS,), jnp.float32),
        full=plgpu.Barrier(num_arrivals=sources, num_barriers=STAGES),
    )


def _walk(
    compute: Callable[..., tuple[Any, list[jax.Array]]],
    sources: list[Part],
    targets: list[Part],
    row: jax.Array,
    pieces: int,
    buffers: Buffers,
    carry: Any,
) -> Any:
    """Runs compute(carry, *pieces of the sources) -> (carry, pieces of the targets) on all pieces
    of the rows from `row` on; the last stores are in flight.
    """

    def load(i: jax.Array) -> None:
        stage = lax.rem(i, jnp.int32(STAGES))
        for n, source in enumerate(sources):
            to = buffers.sources.at[stage, n]
            plgpu.copy_gmem_to_smem(source.piece(row, i), to, buffers.full.at[stage])

    for i in range(min(STAGES - 1, pieces)):
        load(jnp.int32(i))

    def step(i: jax.Array, carry: Any) -> Any:
        stage, slot = lax.rem(i, jnp.int32(STAGES)), lax.rem(i, jnp.int32(SLOTS))
        plgpu.barrier_wait(buffers.full.at[stage])
        read = [buffers.sources.at[stage, n] for n in range(len(sources))]
        values = [plgpu.load(piece, layout=MATRIX).astype(jnp.float32) for piece in read]
        # All threads have read the piece before: they met when its results were committed.
        pl.when(i + STAGES - 1 < pieces)(lambda: load(i + STAGES - 1))
        carry, results = compute(carry, *values)
        plgpu.wait_smem_to_gmem((SLOTS - 1) * len(targets), wait_read_only=True)
        for n, result in enumerate(results):
            buffers.targets[slot, n] = result.astype(buffers.targets.dtype)
        plgpu.commit_smem()
        for n, target in enumerate(targets):
            plgpu.copy_smem_to_gmem(buffers.targets.at[slot, n], target.piece(row, i))
        return carry

    return lax.fori_loop(jnp.int32(0), jnp.int32(pieces), step, carry)


def _clear(matrix: Any, row: jax.Array, buffers: Buffers) -> None:
    """Starts writing zeros to the rows from `row` on."""
    buffers.targets[0, 0] = plgpu.layout_cast(jnp.zeros(SHAPE, buffers.targets.dtype), MATRIX)
    plgpu.commit_smem()

    def copy(i: jax.Array, _: None) -> None:
        plgpu.copy_smem_to_gmem(buffers.targets.at[0, 0], Part(matrix).piece(row, i))

    lax.fori_loop(jnp.int32(0), jnp.int32(matrix.shape[1] // PIECE), copy, None)


class _Tile:
    """The 64 rows of a CTA, and how many rows are in use in all."""

    def __init__(self, num_rows: Any) -> None:
        self.row = lax.axis_index("tile") * ROWS
        self.num_rows = num_rows[0]
        self.in_use = self.row < self.num_rows

    def gates(self, gates: Any) -> jax.Array:
        """[ROWS, PIECE]."""
        rows = gates.at[pl.ds(self.row, ROWS)]
        gates_R = plgpu.load(rows, layout=ALONG_ROWS, optimized=False)
        return self.only_used(lax.broadcast_in_dim(gates_R, SHAPE, [0]))

    def only_used(self, values: jax.Array) -> jax.Array:
        """Zero from the last row in use on."""
        rows = plgpu.broadcasted_iota(jnp.int32, SHAPE, 0, layout=MATRIX) + self.row
        return jnp.where(rows < self.num_rows, values, 0.0)


def _forward_kernel(wide: Any, gates: Any, num_rows: Any, out: Any, buffers: Buffers) -> None:
    tile, width = _Tile(num_rows), out.shape[1]

    @pl.when(tile.in_use)
    def _() -> None:
        weights = tile.gates(gates)

        def compute(_: None, gate: jax.Array, up: jax.Array) -> tuple[None, list[jax.Array]]:
            gate, up = tile.only_used(gate), tile.only_used(up)
            return None, [gate / (1 + jnp.exp(-gate)) * up * weights]

        sources, pieces = [Part(wide), Part(wide, width)], width // PIECE
        _walk(compute, sources, [Part(out)], tile.row, pieces, buffers, None)

    pl.when(jnp.logical_not(tile.in_use))(lambda: _clear(out, tile.row, buffers))
    plgpu.wait_smem_to_gmem(0)


def _backward_kernel(
    wide: Any, gates: Any, num_rows: Any, dout: Any, dwide: Any, dgates: Any, buffers: Buffers
) -> None:
    tile, width = _Tile(num_rows), dout.shape[1]
    sources = [Part(wide), Part(wide, width), Part(dout)]
    targets = [Part(dwide), Part(dwide, width)]
    none = plgpu.layout_cast(jnp.zeros(ROWS, jnp.float32), ALONG_ROWS)

    @pl.when(tile.in_use)
    def _() -> None:
        weights = tile.gates(gates)

        def compute(
            sums_R: jax.Array, gate: jax.Array, up: jax.Array, dout: jax.Array
        ) -> tuple[jax.Array, list[jax.Array]]:
            gate, up, dout = (tile.only_used(x) for x in (gate, up, dout))
            sigmoid = 1 / (1 + jnp.exp(-gate))
            silu, through = gate * sigmoid, dout * weights
            slope = sigmoid * (1 + gate - silu)
            return sums_R + (dout * silu * up).sum(axis=1), [through * up * slope, through * silu]

        pieces = width // PIECE
        buffers.sums[...] = _walk(compute, sources, targets, tile.row, pieces, buffers, none)

    @pl.when(jnp.logical_not(tile.in_use))
    def _() -> None:
        _clear(dwide, tile.row, buffers)
        buffers.sums[...] = none

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffers.sums, dgates.at[pl.ds(tile.row, ROWS)])
    plgpu.wait_smem_to_gmem(0)


def _call(kernel: Any, name: str, parts: tuple[int, int], out_type: Any, *operands: Any) -> Any:
    wide_RF = operands[0]
    results = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=(_buffer_types(*parts, wide_RF.dtype),),
        grid=(pl.cdiv(wide_RF.shape[0], ROWS),),
        grid_names=("tile",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)
    axes = _common.varying_axes(*operands)
    return jax.tree.map(lambda x: _common.vary(x, axes), results)


@jax.custom_vjp
def _swiglu(wide_RF: jax.Array, gates_R: jax.Array, num_rows_1: jax.Array) -> jax.Array:
    out = jax.ShapeDtypeStruct((wide_RF.shape[0], wide_RF.shape[1] // 2), wide_RF.dtype)
    operands = wide_RF, gates_R, num_rows_1
    return _call(_forward_kernel, "grouped_swiglu", (2, 1), out, *operands)


def _swiglu_forward(*operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _swiglu(*operands), operands


def _swiglu_backward(residuals: tuple[jax.Array, ...], dout_RF: jax.Array) -> tuple[Any, ...]:
    wide_RF, gates_R, num_rows_1 = residuals
    types = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (wide_RF, gates_R))
    operands = wide_RF, gates_R, num_rows_1, dout_RF
    return *_call(_backward_kernel, "grouped_swiglu_gradient", (3, 2), types, *operands), None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def grouped_swiglu(wide_RF: jax.Array, gates_R: jax.Array, num_rows: jax.Array) -> jax.Array:
    """The public operator, arguments already checked."""
    rows = wide_RF.shape[0]
    missing = -rows % ROWS  # in the last tile
    wide_RF = jnp.pad(wide_RF, ((0, missing), (0, 0)))
    gates_R = jnp.pad(gates_R.astype(jnp.float32), (0, missing))
    num_rows_1 = jnp.minimum(num_rows.astype(jnp.int32), rows).reshape(1)
    return _swiglu(wide_RF, gates_R, num_rows_1)[:rows]
