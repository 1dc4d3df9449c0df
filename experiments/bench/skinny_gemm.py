"""Products of few rows on one Hopper GPU, as a decoding step has them: ours against XLA and torch.

    python -m experiments.bench.skinny_gemm [--rounds 8]

Microseconds of a call, and terabytes of weights per second. A program multiplies with several sets
of matrices, together larger than the L2 cache, so that every weight comes from memory.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax
import jax.numpy as jnp

from experiments.bench import timing
from pallas_kernels import skinny_gemm
from pallas_kernels.skinny_gemm import shapes

BYTES = 2e8  # of all sets together, at least
SETS = 4, 24  # at least, at most


def weight_bytes(shape: shapes.Shape) -> int:
    """Of one set of matrices in bfloat16."""
    return 2 * shape.contracted * sum(shape.widths)


def draw(shape: shapes.Shape) -> tuple[jax.Array, list[tuple[jax.Array, ...]]]:
    """Rows, and the sets of matrices."""
    least, most = SETS
    number = min(most, max(least, round(BYTES / weight_bytes(shape))))
    keys = iter(jax.random.split(jax.random.key(0), 1 + number * len(shape.widths)))
    x = jax.random.normal(next(keys), (shape.rows, shape.contracted), jnp.bfloat16)
    sets = [
        tuple(
            jax.random.normal(next(keys), (shape.contracted, width), jnp.bfloat16)
            for width in shape.widths
        )
        for _ in range(number)
    ]
    return x, sets


def _ours(x: jax.Array, sets: Any) -> Any:
    return [skinny_gemm(x, *matrices, implementation="mosaic") for matrices in sets]


def _xla(x: jax.Array, sets: Any) -> Any:
    return [[x @ w for w in matrices] for matrices in sets]


def _torch(x: jax.Array, sets: Any) -> timing.Contender:
    import torch

    rows = torch.from_dlpack(x)
    shared = [[torch.from_dlpack(w) for w in matrices] for matrices in sets]

    def run() -> Any:
        return [[rows @ w for w in matrices] for matrices in shared]

    return timing.Contender(run, len(sets), lambda _: torch.cuda.synchronize())


def bench(shape: shapes.Shape, rounds: int) -> None:
    """Prints a table of one shape."""
    x, sets = draw(shape)
    compiled = timing.compile_all({"ours": (_ours, (x, sets)), "XLA": (_xla, (x, sets))})
    contenders = {
        name: timing.jax_contender(function, (x, sets), len(sets))
        for name, function in compiled.items()
    }
    try:
        contenders["torch"] = _torch(x, sets)
    except ImportError:
        print("torch is left out: not installed")
    seconds = timing.medians(contenders, rounds=rounds)
    rows = {
        name: [
            f"{1e6 * each:.2f}",
            f"{weight_bytes(shape) / each / 1e12:.2f}",
            f"{each / seconds['ours']:.2f}",
        ]
        for name, each in seconds.items()
    }
    timing.table(str(tuple(shape)), ["us", "TB/s", "times ours"], rows)


def main() -> None:
    """Parses the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.rounds} rounds")
    for shape in shapes.PRODUCTION:
        bench(shape, args.rounds)


if __name__ == "__main__":
    main()
