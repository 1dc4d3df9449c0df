"""Counts the copies of the residual stream in a program for an H100, made without one.

    python -m tests.model.residual_copies      prints {how sums are written: copies} as JSON

Needs the extra [aot]. B batch, T tokens, D model.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longcat_jax.config import MeshConfig
from longcat_jax.model.norm import add_residual, norm_residual
from longcat_jax.parallel import hlo
from longcat_jax.parallel.compiler import compiler_options
from longcat_jax.plan.deviceless import h100s
from longcat_jax.sharding import make_mesh
from pallas_kernels import HOPPER, made_for

B, T, D = 2, 512, 1024


def copies(device: jax.Device, add: Callable[..., jax.Array]) -> int:
    """Of as many bytes as the stream, three sums of which are kept."""

    def run(x_RD: jax.Array, w_DD: jax.Array, weight_D: jax.Array) -> list[jax.Array]:
        x_BTD, sums = x_RD.reshape(B, T, D), []
        for _ in range(3):
            x_BTD, normed_BTD = norm_residual(x_BTD, weight_D, 1e-5)
            x_BTD = add(x_BTD, normed_BTD @ w_DD)
            sums.append(x_BTD)
        return sums

    sharding = jax.sharding.SingleDeviceSharding(device)

    def rows(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    mesh = make_mesh(MeshConfig(), [device])
    options = compiler_options(mesh, deterministic=True, loop=False)
    with made_for(HOPPER):
        lowered = jax.jit(run, compiler_options=options).lower(rows(B * T, D), rows(D, D), rows(D))
    program = hlo.parse(lowered.compile().as_text())
    found = [line for lines in program.computations.values() for line in lines]
    stream = 2 * B * T * D
    return sum(line.opcode == "copy" and line.shapes[0].bytes == stream for line in found)


def main() -> None:
    """Compiles both, and prints what was found."""
    (device,) = h100s(1)
    ways = {"rows": add_residual, "plain": lambda x_BTD, out_BTD: x_BTD + out_BTD}
    print(json.dumps({name: copies(device, add) for name, add in ways.items()}))


if __name__ == "__main__":
    main()
