"""RMSNorm. B batch, T tokens, D the normalised dim."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last dim; statistics in at least float32, weight after the
    downcast (as HF).
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # Not kept: a scale that nothing else reads lets XLA norm rows in one pass on a GPU.
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    weight = jnp.expand_dims(weight_D.astype(x.dtype), range(x.ndim - 1))
    return (wide * scale).astype(x.dtype) * weight
