"""The operator in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._common import accumulation_dtype


def rms_norm(x_RD: jax.Array, weight_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """x, and x / rms(x) * weight; the weight after the downcast, as HF."""
    wide_RD = x_RD.astype(accumulation_dtype(x_RD.dtype))
    # Not kept: a scale that nothing else reads lets XLA norm rows in one pass on a GPU.
    scale_R1 = lax.rsqrt(jnp.mean(wide_RD * wide_RD, axis=-1, keepdims=True) + eps)
    return x_RD, (wide_RD * scale_R1).astype(x_RD.dtype) * weight_D.astype(x_RD.dtype)[None]
