"""The operator in plain jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels._common import accumulation_dtype


def grouped_swiglu(wide_RF: jax.Array, gates_R: jax.Array, num_rows: jax.Array) -> jax.Array:
    """silu(gate half) * up half * gates of the first rows, zeros after them."""
    in_use_R = jnp.arange(wide_RF.shape[0], dtype=jnp.int32) < num_rows.astype(jnp.int32)

    def used(x_RX: jax.Array) -> jax.Array:
        return jnp.where(in_use_R[:, None], x_RX, 0).astype(accumulation_dtype(wide_RF.dtype))

    gate_RF, up_RF = jnp.split(used(wide_RF), 2, axis=1)
    return (jax.nn.silu(gate_RF) * up_RF * used(gates_R[:, None])).astype(wide_RF.dtype)
