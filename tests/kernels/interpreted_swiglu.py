"""Cases of grouped_swiglu for tests/kernels/interpreted.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _common, grouped_swiglu
from tests.kernels import helpers


class Case(NamedTuple):
    """One call: `used` of `rows` rows."""

    rows: int
    used: int
    width: int
    dtype: str = "bfloat16"


CASES = {
    # Tiles of rows that are whole, cut, and not in use; more pieces than stages; a last tile that
    # is not all there.
    "cut": Case(200, 100, 320),
    "all": Case(70, 70, 64, "float16"),
    "none": Case(64, 0, 128),
}


def swiglu(case: Case, implementation: str) -> dict[str, Any]:
    """Errors of value and gradients against float64, and what is made of rows that are not in use,
    which hold NaN.
    """
    rng = np.random.default_rng(3)
    dtype = jnp.dtype(case.dtype)
    wide = jnp.asarray(3 * rng.standard_normal((case.rows, 2 * case.width)), dtype)
    dout = jnp.asarray(rng.standard_normal((case.rows, case.width)), dtype)
    gates = jnp.asarray(rng.random(case.rows), _common.accumulation_dtype(dtype))
    wide, dout, gates = (x.at[case.used :].set(jnp.nan) for x in (wide, dout, gates))

    def run(wide: jax.Array, gates: jax.Array) -> jax.Array:
        return grouped_swiglu(wide, gates, jnp.int32(case.used), implementation=implementation)

    out, vjp = jax.vjp(run, wide, gates)
    got = (out, *vjp(dout))
    gate, up = np.split(np.asarray(wide, np.float64), 2, axis=1)
    sigmoid, weights = 1 / (1 + np.exp(-gate)), np.asarray(gates, np.float64)[:, None]
    d, silu = np.asarray(dout, np.float64), gate * sigmoid
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    dwide = np.concatenate([d * weights * up * slope, d * weights * silu], axis=1)
    wanted = (silu * up * weights, dwide, (d * silu * up).sum(1))
    used = slice(0, case.used)
    result = {
        name: helpers.relative_error(a[used], b[used]) if case.used else 0.0
        for name, a, b in zip(("out", "dwide", "dgates"), got, wanted, strict=True)
    }
    tail = [np.abs(np.asarray(a[case.used :], np.float64)).sum() for a in got]
    return result | {"tail": float(sum(tail))}
