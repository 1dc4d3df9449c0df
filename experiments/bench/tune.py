"""Regenerates the table of tilings of the Mosaic grouped GEMM from times on one Hopper GPU.

    python -m experiments.bench.tune [--rounds 9] [--shapes 0 1 2 3] [--write]

Times every pass of the production shapes in pallas_kernels/grouped_gemm/shapes.py, or of those
with the given numbers, with every tiling, and the first tiling twice: what differs between these
two is noise, and another tiling must beat both by more. Prints the times; --write replaces
pallas_kernels/grouped_gemm/tilings.py, and only times of all shapes may.
"""

import argparse
import math
import pprint
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import kernels, timing
from pallas_kernels.grouped_gemm import mosaic, tilings
from pallas_kernels.grouped_gemm.schedule import Tiling
from pallas_kernels.grouped_gemm.shapes import PRODUCTION, Shape

CANDIDATES = {
    "forward": [Tiling(8, "columns"), Tiling(4, "columns"), Tiling(8, "rows")],
    "gradient to lhs": [Tiling(8, "columns"), Tiling(4, "columns"), Tiling(8, "rows")],
    "gradient to rhs": [Tiling(8, "rows"), Tiling(4, "rows"), Tiling(8, "columns")],
}
LEAST_GAIN = 0.02  # however quiet the run
HEADER = '''"""How the Mosaic grouped GEMM cuts up its products.

Written by `python -m experiments.bench.tune --write` on one {device}.
"""

from pallas_kernels.grouped_gemm.schedule import Tiling

# (pass, (rows, contract, width, groups) of the forward product): for a shape where another tiling
# than the pass' own, under None, was faster by more than the noise.
TILINGS = {{
'''

Times = dict[tuple[Tiling, int], float]  # seconds by tiling and number of the try


def _pass(name: str, tiling: Tiling) -> Callable[..., jax.Array]:
    def run(lhs: jax.Array, rhs: jax.Array, dout: jax.Array, sizes: jax.Array) -> jax.Array:
        if name == "forward":
            return mosaic.product(lhs, rhs, sizes, dtype=lhs.dtype, tiling=tiling)
        if name == "gradient to lhs":
            return mosaic.product(dout, rhs, sizes, dtype=lhs.dtype, transposed=True, tiling=tiling)
        return mosaic.weight_gradient(lhs, dout, sizes, dtype=lhs.dtype, tiling=tiling)

    return jax.jit(run)  # one trace for all sets of operands


def measure(shape: Shape, rounds: int) -> dict[str, Times]:
    """Seconds of every pass with every tiling; the first tiling of a pass is tried twice."""
    sets = kernels.draw_operands(shape)
    args = sets, jnp.asarray(kernels.uneven_groups(shape.rows, shape.groups))
    functions: dict[Any, Any] = {}
    for name, candidates in CANDIDATES.items():
        for tiling in candidates:
            run = _pass(name, tiling)
            functions[name, tiling] = (
                lambda sets, sizes, run=run: [run(*arrays, sizes) for arrays in sets],
                args,
            )
    contenders = {}
    for (name, tiling), compiled in timing.compile_all(functions).items():
        for attempt in range(2 if tiling == CANDIDATES[name][0] else 1):
            contenders[name, tiling, attempt] = timing.jax_contender(compiled, args, len(sets))
    times: dict[str, Times] = {name: {} for name in CANDIDATES}
    for (name, tiling, attempt), seconds in timing.medians(contenders, rounds=rounds).items():
        times[name][tiling, attempt] = seconds
    return times


def _gain(times: list[Times], tiling: Tiling, own: Tiling) -> float:
    """Geometric mean over the shapes of how much faster a tiling is than the pass' own."""
    ratios = [min(t[own, 0], t[own, 1]) / t[tiling, 0] for t in times]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) - 1


def choose(measured: dict[Shape, dict[str, Times]]) -> dict[Any, Tiling]:
    """The table: a pass' tiling for all shapes, and the shapes that want another one."""
    table = {}
    for name, (first, *others) in CANDIDATES.items():
        times = {shape: passes[name] for shape, passes in measured.items()}
        noise = max(abs(t[first, 0] / t[first, 1] - 1) for t in times.values())
        least = max(noise, LEAST_GAIN)
        best = max(others, key=lambda tiling: _gain(list(times.values()), tiling, first))
        own = best if _gain(list(times.values()), best, first) > least else first
        table[name, None] = own
        for shape, t in times.items():
            fastest = min(t, key=t.get)[0]
            if t[own, 0] / t[fastest, 0] - 1 > least:
                table[name, tuple(shape)] = fastest
        print(f"{name}: noise {noise:.1%}, gains below {least:.1%} do not count", flush=True)
    return table


def write(table: dict[Any, Tiling], path: Path) -> None:
    """Replaces the module of tilings."""
    lines = [
        f"    {pprint.pformat(key, width=200)}: {tiling!r},".replace("'", '"')
        for key, tiling in table.items()
    ]
    header = HEADER.format(device=jax.devices()[0].device_kind)
    path.write_text(header + "\n".join(lines) + "\n}\n")


def main() -> None:
    """Parses the command line, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(PRODUCTION)))
    parser.add_argument("--write", action="store_true", help="replace the checked-in table")
    args = parser.parse_args()
    if args.write and set(args.shapes) != set(range(len(PRODUCTION))):
        parser.error("--write replaces the table of all shapes: leave out --shapes")
    measured = {}
    for shape in (PRODUCTION[i] for i in args.shapes):
        measured[shape] = measure(shape, args.rounds)
        flops = 2 * shape.rows * shape.contract * shape.width
        for name, times in measured[shape].items():
            rows = {
                f"{tiling.pair}, panel {tiling.panel}{' again' if attempt else ''}": [
                    f"{1e3 * seconds:.3f}",
                    f"{flops / seconds / 1e12:.0f}",
                ]
                for (tiling, attempt), seconds in times.items()
            }
            timing.table(f"{name}, {tuple(shape)}", ["ms", "TFLOP/s"], rows)
    table = choose(measured)
    print(*(f"{key}: {tiling}" for key, tiling in table.items()), sep="\n", flush=True)
    if args.write:
        write(table, Path(tilings.__file__))


if __name__ == "__main__":
    main()
