"""The operator in plain jnp, for rows of any number of dimensions."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._common import accumulation_dtype


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """x [..., D], and x / rms(x) * weight; the weight after the downcast (as HF)."""
    wide = x.astype(accumulation_dtype(x.dtype))
    # Not kept: a scale that nothing else reads lets XLA norm rows in one pass on a GPU.
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    weight = jnp.expand_dims(weight_D.astype(x.dtype), range(x.ndim - 1))
    return x, (wide * scale).astype(x.dtype) * weight
