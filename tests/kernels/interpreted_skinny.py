"""Cases of skinny_gemm for tests/kernels/interpreted.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import skinny_gemm
from tests.kernels import helpers


class Case(NamedTuple):
    """x [rows, contracted] and a matrix of each width."""

    rows: int
    contracted: int
    widths: tuple[int, ...]
    dtype: str = "bfloat16"


CASES = {
    # Rows that fill a tile of 8 or don't; many splits of a step, and one of more steps than stages.
    "one row": Case(1, 256, (64, 192)),
    "two matrices": Case(13, 1472, (128, 64), "float16"),
    "long": Case(64, 832, (384, 320)),
}


def skinny(case: Case, implementation: str) -> dict[str, Any]:
    """Errors of values and gradients against float64, and of results as wide as sums; 0 if
    terms add up to the same bits.
    """
    rng = np.random.default_rng(4)
    shapes = (case.rows, case.contracted), *((case.contracted, n) for n in case.widths)
    x, *matrices = (jnp.asarray(rng.standard_normal(s), case.dtype) for s in shapes)
    douts = [jnp.asarray(rng.standard_normal((case.rows, n)), case.dtype) for n in case.widths]

    def run(x: jax.Array, *matrices: jax.Array) -> tuple[jax.Array, ...]:
        return skinny_gemm(x, *matrices, implementation=implementation)

    terms = skinny_gemm(x, *matrices, summed=False, implementation=implementation)
    outs, vjp = jax.vjp(run, x, *matrices)
    sums = [terms_SMN.sum(axis=0).astype(x.dtype) for terms_SMN in terms]
    dx, *dmatrices = vjp(tuple(douts))
    exact_x, *exact = (np.asarray(a, np.float64) for a in (x, *matrices))
    exact_douts = [np.asarray(d, np.float64) for d in douts]
    errors = {
        "dx": helpers.relative_error(dx, sum(map(np.matmul, exact_douts, (w.T for w in exact))))
    }
    for name, got, wanted in (
        ("outs", outs, [exact_x @ w for w in exact]),
        ("dmatrices", dmatrices, [exact_x.T @ d for d in exact_douts]),
    ):
        errors[name] = max(map(helpers.relative_error, got, wanted))
    wide_dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    (wide,) = skinny_gemm(x, matrices[0], out_dtype=wide_dtype, implementation=implementation)
    return errors | {
        "float32": helpers.relative_error(wide, exact_x @ exact[0]),
        "terms": 0.0 if all(map(helpers.same_bits, sums, outs)) else 1.0,
    }
