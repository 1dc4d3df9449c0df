"""The operators in plain jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels._common import accumulation_dtype


def skinny_swiglu(x_MK: jax.Array, gate_KF: jax.Array, up_KF: jax.Array) -> jax.Array:
    """silu(x gate) * (x up), rounded once."""
    wide = accumulation_dtype(x_MK.dtype)
    gate, up = (jnp.matmul(x_MK, w, preferred_element_type=wide) for w in (gate_KF, up_KF))
    return (jax.nn.silu(gate) * up).astype(x_MK.dtype)


def skinny_experts(
    x_MD: jax.Array,
    gates_MK: jax.Array,
    experts_MK: jax.Array,
    gate_up_XDF: jax.Array,
    down_XFD: jax.Array,
) -> jax.Array:
    """Every expert computes every row; the gates of those that didn't select it are zero."""
    wide, X = accumulation_dtype(x_MD.dtype), gate_up_XDF.shape[0]
    ids_X = jnp.arange(X, dtype=experts_MK.dtype)
    hits_MKX = experts_MK[:, :, None] == ids_X[None, None]
    gates_MX = jnp.where(hits_MKX, gates_MK[:, :, None].astype(wide), 0).sum(1)
    wide_XMF = jnp.einsum("md,xdf->xmf", x_MD, gate_up_XDF, preferred_element_type=wide)
    gate_XMF, up_XMF = jnp.split(wide_XMF, 2, axis=-1)
    narrow_XMF = (jax.nn.silu(gate_XMF) * up_XMF * gates_MX.T[:, :, None]).astype(x_MD.dtype)
    narrow_XMF = jnp.where(hits_MKX.any(1).T[:, :, None], narrow_XMF, 0)
    sums_MD = jnp.einsum("xmf,xfd->md", narrow_XMF, down_XFD, preferred_element_type=wide)
    return sums_MD.astype(x_MD.dtype)
