"""The grouped product in fp8 on one Hopper GPU: against ours in bfloat16 and torch's in fp8.

    python -m experiments.bench.fp8 [--rounds 8]

Draws, groups and timing are those of kernels.py.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from experiments.bench.kernels import SETS, draw_operands, mosaic_gemm, uneven_groups
from pallas_kernels import grouped_gemm_fp8, quantize_rows, quantize_weights
from pallas_kernels.grouped_gemm import shapes
from pallas_kernels.grouped_gemm.schedule import Tiling
from pallas_kernels.grouped_gemm_fp8 import mosaic as fp8_mosaic
from pallas_kernels.grouped_gemm_fp8.quantize import dequantize_rows, dequantize_weights


def _torch_fp8(
    sets: list[Any], weights: list[Any], sizes: np.ndarray
) -> dict[str, timing.Contender]:
    """torch's grouped product in fp8, which has one scale a row and one an output column."""
    try:
        import torch
    except ImportError:
        return {}
    if not hasattr(torch, "_scaled_grouped_mm"):
        print("torch is left out: it has no _scaled_grouped_mm")
        return {}
    offsets = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device="cuda")
    limit = torch.finfo(torch.float8_e4m3fn).max

    def quantize(x: Any) -> tuple[Any, Any]:
        scales = x.abs().amax(dim=-1, keepdim=True).float() / limit
        values = (x.float() / scales).clamp(-limit, limit).to(torch.float8_e4m3fn)
        return values, scales[..., 0].contiguous()

    shared = []
    for (lhs, _, _), rhs_GNK in zip(sets, weights, strict=True):
        left, left_scales = quantize(torch.from_dlpack(lhs))
        right, right_scales = quantize(torch.from_dlpack(rhs_GNK))
        shared.append((left, right.transpose(1, 2), left_scales, right_scales))

    def run(fast: bool) -> list[Any]:
        options = dict(offs=offsets, out_dtype=torch.bfloat16, use_fast_accum=fast)
        return [torch._scaled_grouped_mm(*arrays, **options) for arrays in shared]

    wait = lambda _: torch.cuda.synchronize()  # noqa: E731
    names = {"torch fp8, scales by row": False, "torch fp8, scales by row, fast sums": True}
    found = {}
    for name, fast in names.items():
        try:
            wait(run(fast))
        except RuntimeError as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}")
        else:
            run_it = functools.partial(run, fast)
            found[name] = timing.Contender(run_it, len(shared), wait)
    return found


def _fp8_errors(sets: list[Any], quantized: list[Any], sizes: np.ndarray) -> str:
    """Norm errors on the first and last row of every group: of the kernel's float32 against the
    dequantised operands, and of both kernels' bfloat16 against the operands themselves.
    """
    (lhs, rhs, _), (left, left_scales, right, right_scales) = sets[0], quantized[0]
    ends, sizes_G = np.cumsum(sizes), jnp.asarray(sizes)
    rows = np.stack([ends - sizes, ends - 1], axis=1)
    exact = functools.partial(jnp.einsum, "gik,gnk->gin", precision=jax.lax.Precision.HIGHEST)

    def against(wanted: Any, got: Any) -> float:
        wanted = np.asarray(wanted, np.float64)
        return float(np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted))

    def ours(dtype: Any) -> Any:
        operands = left, left_scales, right, right_scales, sizes_G
        out = grouped_gemm_fp8(*operands, out_dtype=dtype, implementation="mosaic")
        return out[rows].astype(jnp.float32)

    rows_of_groups = dequantize_rows(left[rows.reshape(-1)], left_scales[rows.reshape(-1)])
    dequantised = exact(
        rows_of_groups.reshape(*rows.shape, -1), dequantize_weights(right, right_scales)
    )
    plain = exact(lhs[rows].astype(jnp.float32), rhs.swapaxes(1, 2).astype(jnp.float32))
    bf16 = mosaic_gemm(lhs, rhs, sizes_G)[rows].astype(jnp.float32)
    return (
        f"error {against(dequantised, ours(jnp.float32)):.1e} of the dequantised product; "
        f"{against(plain, ours(jnp.bfloat16)):.1e} of the product, bf16 {against(plain, bf16):.1e}"
    )


def bench(rounds: int) -> None:
    """The forward product in fp8 with scales by block, with several tilings and with its rows
    quantised first, against ours in bfloat16 and torch's in fp8.
    """
    tilings = fp8_mosaic.TILING, Tiling(4, "columns"), Tiling(8, "rows"), Tiling(4, "rows")

    def in_fp8(sets: Any, quantized: Any, sizes: Any, *, tiling: Tiling) -> list[Any]:
        product = functools.partial(fp8_mosaic.grouped_gemm_fp8, dtype=jnp.bfloat16, tiling=tiling)
        return [product(*arrays, sizes) for arrays in quantized]

    def rows_too(sets: Any, quantized: Any, sizes: Any) -> list[Any]:
        product = functools.partial(grouped_gemm_fp8, implementation="mosaic")
        return [
            product(*quantize_rows(arrays[0]), *weights[2:], sizes)
            for arrays, weights in zip(sets, quantized, strict=True)
        ]

    def in_bf16(sets: Any, quantized: Any, sizes: Any) -> list[Any]:
        return [mosaic_gemm(lhs, rhs, sizes) for lhs, rhs, _ in sets]

    for shape in shapes.PRODUCTION:
        sets, sizes = draw_operands(shape), uneven_groups(shape.rows, shape.groups)
        weights = [jnp.swapaxes(rhs, 1, 2) for _, rhs, _ in sets]
        rows_of, weights_of = jax.jit(quantize_rows), jax.jit(quantize_weights)
        quantized = [
            (*rows_of(lhs), *weights_of(w)) for (lhs, _, _), w in zip(sets, weights, strict=True)
        ]
        args = sets, quantized, jnp.asarray(sizes)
        functions = {"bf16": (in_bf16, args), "fp8, rows quantised first": (rows_too, args)}
        for tiling in tilings:
            name = f"fp8, panel {tiling.panel}, pairs along {tiling.pair}"
            functions[name] = functools.partial(in_fp8, tiling=tiling), args
        compiled = timing.compile_all(functions)
        contenders = {n: timing.jax_contender(c, args, SETS) for n, c in compiled.items()}
        contenders |= _torch_fp8(sets, weights, sizes)
        seconds = timing.medians(contenders, rounds=rounds)
        flops = 2 * shape.rows * shape.contract * shape.width
        cells = {
            name: [f"{1e3 * s:.3f}", f"{flops / s / 1e12:.0f}", f"{seconds['bf16'] / s:.2f}"]
            for name, s in seconds.items()
        }
        timing.table(f"fp8, {tuple(shape)}", ["ms", "TFLOP/s", "x bf16"], cells)
        first = f"fp8, panel {tilings[0].panel}, pairs along {tilings[0].pair}"
        equal = timing.repeatable(compiled[first], *args)
        print(f"{_fp8_errors(sets, quantized, sizes)}; {timing.REPEATS} runs bit-equal: {equal}")


def main() -> None:
    """Prints a table for every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {args.rounds} rounds")
    bench(args.rounds)


if __name__ == "__main__":
    main()
