"""Cases of rms_norm for tests/kernels/interpreted.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _common, rms_norm
from tests.kernels import helpers

EPS = 1e-5


class Case(NamedTuple):
    """One call."""

    rows: int
    width: int
    dtype: str = "bfloat16"


CASES = {
    # A last block of one row, and widths of which a thread loads 1, 2, 4 and 8 columns at a time.
    "a row left": Case(33, 384),
    "one row": Case(1, 1280, "float16"),
    "narrow": Case(16, 512),
    "wide": Case(20, 2048),
}


def norm(case: Case, implementation: str) -> dict[str, Any]:
    """Errors of value and gradients against float64, of the worst row where there are rows; whether
    x goes through untouched.

    Rows of x have many magnitudes, beside the smallest of which eps is not small. All parts of a
    row's gradient are of one size: dnormed is not orthogonal to x, dpassed as large as what comes
    from the norm.
    """
    rng = np.random.default_rng(5)
    unit, other, third = (rng.standard_normal((case.rows, case.width)) for _ in range(3))
    size = np.logspace(-3, 2, case.rows)[:, None]
    operands = unit * size, other / np.sqrt(size**2 + EPS), third + unit
    x, dpassed, dnormed = (jnp.asarray(values, case.dtype) for values in operands)
    weight_dtype = _common.accumulation_dtype(case.dtype)
    weight = jnp.asarray(1 + 0.3 * rng.standard_normal(case.width), weight_dtype)

    def run(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rms_norm(x, weight, EPS, implementation=implementation)

    (passed, normed), vjp = jax.vjp(run, x, weight)
    dx, dweight = vjp((dpassed, dnormed))
    # Where it multiplies the weight has the dtype of x.
    given = x, weight.astype(x.dtype), dpassed, dnormed
    x64, w64, dp64, dn64 = (np.asarray(a, np.float64) for a in given)
    scale = 1 / np.sqrt((x64 * x64).mean(axis=1, keepdims=True) + EPS)
    unit, dunit = x64 * scale, dn64 * w64
    wanted = {
        "normed": (normed, unit * w64),
        "dx": (dx, dp64 + scale * (dunit - unit * (dunit * unit).mean(axis=1, keepdims=True))),
        "dweight": (dweight, (dn64 * unit).sum(axis=0)),
    }

    def error(a: jax.Array, b: np.ndarray) -> float:
        difference = np.linalg.norm(np.asarray(a, np.float64) - b, axis=-1)
        return float((difference / np.linalg.norm(b, axis=-1)).max())

    errors = {name: error(*pair) for name, pair in wanted.items()}
    return errors | {"passed": helpers.same_bits(passed, x)}
