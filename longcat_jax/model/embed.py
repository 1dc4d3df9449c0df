"""Token embedding lookup with a deterministic gradient. B batch, T tokens, D model, W
vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from longcat_jax.sharding import (
    DENSE,
    TOKENS,
    gather_parts,
    num_parts,
    on_shards,
    scatter_sum,
    vary_with_tokens,
)
from pallas_kernels import scatter_add


def embed(table_WD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of the table as `dtype`; the gradient is a fixed-order sum (section 4.2: deterministic
    scatter-add).
    """

    def on_device(part_WD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        return _lookup(vary_with_tokens(part_WD), tokens_BT, dtype)

    return on_shards(on_device, (P(DENSE), TOKENS), TOKENS)(table_WD, tokens_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(part_WD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if num_parts(DENSE) > 1:
        part_WD = gather_parts(part_WD.astype(dtype), DENSE, dim=0)
    return jnp.take(part_WD, tokens_BT, axis=0, mode="clip").astype(dtype)


def _forward(
    part_WD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    shape_carrier = jnp.zeros((part_WD.shape[0], 0), part_WD.dtype)
    return _lookup(part_WD, tokens_BT, dtype), (tokens_BT, shape_carrier)


def _backward(
    dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], dout_BTD: jax.Array
) -> tuple[jax.Array, None]:
    tokens_BT, carrier = residuals
    rows = dout_BTD.reshape(-1, dout_BTD.shape[-1])  # read as they are, summed in at least float32
    total_WD = scatter_add(rows, tokens_BT.reshape(-1), num_parts(DENSE) * carrier.shape[0])
    return scatter_sum(total_WD, DENSE, dim=0).astype(carrier.dtype), None


_lookup.defvjp(_forward, _backward)
