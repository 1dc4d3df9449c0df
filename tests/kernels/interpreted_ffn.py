"""Cases of skinny_swiglu and skinny_experts for tests/kernels/interpreted.py."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import skinny_experts, skinny_swiglu
from tests.kernels import helpers


class Case(NamedTuple):
    """x [rows, model], experts of a width, selections a row; of the ids so many are nobody's."""

    rows: int
    model: int
    width: int
    experts: int
    selected: int
    others: int
    dtype: str = "bfloat16"


CASES = {
    # Rows that fill a tile of 8 or don't; experts that nobody selects; more steps than stages, of
    # one piece of work or of several; experts added up by twos, and one left over.
    "one row": Case(1, 128, 64, 5, 3, 4),
    "some rows": Case(13, 192, 128, 3, 2, 1, "float16"),
    "long": Case(64, 576, 192, 4, 2, 2),
    "many experts": Case(29, 128, 192, 8, 3, 2),
}


def ffn(case: Case, implementation: str) -> dict[str, Any]:
    """Errors of values and gradients against float64."""
    rng = np.random.default_rng(5)
    D, F, X = case.model, case.width, case.experts

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * shape[-2] ** -0.5, case.dtype)

    x = jnp.asarray(rng.standard_normal((case.rows, D)), case.dtype)
    gate, up, gate_up, down = draw(D, F), draw(D, F), draw(X, D, 2 * F), draw(X, F, D)
    orders = [rng.permutation(X + case.others)[: case.selected] for _ in range(case.rows)]
    experts = np.array(orders, np.int32)
    experts[experts == 1] = X  # nobody's
    gates = jnp.asarray(rng.random(experts.shape), case.dtype)

    def run(x: Any, gate: Any, up: Any, gates: Any, gate_up: Any, down: Any) -> Any:
        options = {"implementation": implementation}
        dense = skinny_swiglu(x, gate, up, **options)
        return dense, skinny_experts(x, gates, jnp.asarray(experts), gate_up, down, **options)

    def plain(x: Any, gate: Any, up: Any, gates: Any, gate_up: Any, down: Any) -> Any:
        dense, total = jax.nn.silu(x @ gate) * (x @ up), jnp.zeros_like(x)
        for expert in range(X):
            weights = jnp.where(experts == expert, gates, 0).sum(axis=1)
            half, other = jnp.split(x @ gate_up[expert], 2, axis=1)
            total += (jax.nn.silu(half) * other * weights[:, None]) @ down[expert]
        return dense, total

    def plain_and_gradients(operands: Any, douts: Any) -> Any:
        values, vjp = jax.vjp(plain, *operands)
        return values, vjp(douts)

    operands = x, gate, up, gates, gate_up, down
    values, vjp = jax.vjp(run, *operands)
    douts = tuple(jnp.asarray(rng.standard_normal(v.shape), v.dtype) for v in values)
    gradients = vjp(douts)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(a, np.float64)) for a in operands]
        exact_douts = tuple(jnp.asarray(np.asarray(d, np.float64)) for d in douts)
        wanted, wanted_gradients = jax.jit(plain_and_gradients)(exact, exact_douts)
    error = helpers.relative_error
    return {
        "swiglu": error(values[0], wanted[0]),
        "experts": error(values[1], wanted[1]),
        "gradients": max(map(error, gradients, wanted_gradients)),
    }


def left_out(implementation: str) -> dict[str, Any]:
    """Largest result where nobody is selected, and of rows beside an expert whose results for them
    are no numbers.
    """
    rng = np.random.default_rng(6)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    x, gate_up, down = draw(18, 128), draw(4, 128, 128), draw(4, 64, 128)
    gates, ids = jnp.ones((18, 2), jnp.bfloat16), jnp.repeat(jnp.asarray([[0, 1], [2, 3]]), 9, 0)
    run = functools.partial(skinny_experts, implementation=implementation)
    spoilt = run(x, gates, ids, gate_up.at[2].mul(1e30), down)
    return {
        "nobody": float(jnp.abs(run(x, gates, jnp.full_like(ids, 4), gate_up, down)).max()),
        "beside": float(jnp.abs(spoilt[:9]).max()),
        "spoilt": float(jnp.abs(spoilt[9:]).max()),
    }
