"""Token embedding lookup with a deterministic gradient. B batch, T tokens, D model, W
vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import scatter_add


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table_WD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of the table as `dtype`; the gradient is a fixed-order sum (section 4.2: deterministic
    scatter-add).
    """
    return jnp.take(table_WD, tokens_BT, axis=0, mode="clip").astype(dtype)


def _forward(
    table_WD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    shape_carrier = jnp.zeros((table_WD.shape[0], 0), table_WD.dtype)
    return embed(table_WD, tokens_BT, dtype), (tokens_BT, shape_carrier)


def _backward(
    dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], dout_BTD: jax.Array
) -> tuple[jax.Array, None]:
    tokens_BT, carrier = residuals
    rows = dout_BTD.reshape(-1, dout_BTD.shape[-1])  # read as they are, summed in at least float32
    total_WD = scatter_add(rows, tokens_BT.reshape(-1), carrier.shape[0])
    return total_WD.astype(carrier.dtype), None


embed.defvjp(_forward, _backward)
