"""RMSNorm. B batch, T tokens, D the normalised dim."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from longcat_jax.sharding import TOKENS, on_shards
from pallas_kernels import rms_norm as row_norm


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last dim; statistics in at least float32, weight after the
    downcast (as HF).
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # Not kept: a scale that nothing else reads lets XLA norm rows in one pass on a GPU.
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    weight = jnp.expand_dims(weight_D.astype(x.dtype), range(x.ndim - 1))
    return (wide * scale).astype(x.dtype) * weight


def norm_residual(
    x_BTD: jax.Array, weight_D: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The residual stream as it goes on, and its `rms_norm`: on Hopper the gradients of both are
    added in one pass.
    """

    def on_device(x_BTD: jax.Array, weight_D: jax.Array) -> tuple[jax.Array, jax.Array]:
        passed_RD, normed_RD = row_norm(x_BTD.reshape(-1, x_BTD.shape[-1]), weight_D, eps)
        return passed_RD.reshape(x_BTD.shape), normed_RD.reshape(x_BTD.shape)

    return on_shards(on_device, (TOKENS, P()), (TOKENS, TOKENS))(x_BTD, weight_D)
