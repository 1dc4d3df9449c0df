"""The operators in plain jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels._common import accumulation_dtype


def absorb_query(
    terms_SMX: jax.Array, kv_b_CHY: jax.Array, cos_MI: jax.Array, sin_MI: jax.Array
) -> jax.Array:
    """The public operator, arguments already checked."""
    H, dtype, M = kv_b_CHY.shape[1], kv_b_CHY.dtype, terms_SMX.shape[1]
    wide, rope = accumulation_dtype(dtype), 2 * cos_MI.shape[1]
    q_MHX = terms_SMX.sum(axis=0).astype(dtype).reshape(M, H, -1)
    q_MHN, q_MHP = jnp.split(q_MHX, [q_MHX.shape[2] - rope], axis=-1)
    w_CHN = kv_b_CHY[:, :, : q_MHN.shape[2]]
    latent_MHC = jnp.einsum("mhn,chn->mhc", q_MHN, w_CHN, preferred_element_type=wide)
    even, odd = (q_MHP[:, :, i::2].astype(wide) for i in range(2))
    cos, sin = cos_MI[:, None], sin_MI[:, None]
    parts = latent_MHC, even * cos - odd * sin, odd * cos + even * sin
    return jnp.concatenate([part.astype(dtype) for part in parts], axis=-1)


def expand_values(x_MHC: jax.Array, kv_b_CHY: jax.Array, *, value_dim: int) -> jax.Array:
    """The public operator, arguments already checked."""
    w_CHV = kv_b_CHY[:, :, kv_b_CHY.shape[2] - value_dim :]
    wide = accumulation_dtype(x_MHC.dtype)
    out_MHV = jnp.einsum("mhc,chv->mhv", x_MHC, w_CHV, preferred_element_type=wide)
    return out_MHV.astype(x_MHC.dtype)
