"""Absorbed MLA decode in plain jnp.

B batch, T new tokens, S cache entries, P pages of a row, H heads, U cache width, C latent width.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._common import accumulation_dtype


def mla_decode(
    q_BTHU: jax.Array,
    cache_BSU: jax.Array,
    lengths_B: jax.Array,
    *tables: jax.Array,
    scale: float,
    value_dim: int,
) -> jax.Array:
    """The public operator, arguments already checked; `tables` holds the block table, if any."""
    for table_BP in tables:
        # Pages of entries past the length may be any number.
        pages_BPSU = cache_BSU.at[table_BP].get(mode="clip")
        cache_BSU = pages_BPSU.reshape(q_BTHU.shape[0], -1, q_BTHU.shape[3])
    dtype = accumulation_dtype(q_BTHU.dtype)
    num_tokens, num_entries = q_BTHU.shape[1], cache_BSU.shape[1]
    lengths_B1 = lengths_B[:, None].astype(jnp.int32)
    entry_1S = jnp.arange(num_entries, dtype=jnp.int32)[None]
    position_BT = lengths_B1 - num_tokens + jnp.arange(num_tokens, dtype=jnp.int32)[None]
    mask_BTS = entry_1S[:, None] <= position_BT[:, :, None]
    # Entries past the length may hold anything, and 0 * NaN is NaN.
    cache_BSU = jnp.where((entry_1S < lengths_B1)[..., None], cache_BSU, 0)
    scores_BTHS = jnp.einsum("bthu,bsu->bths", q_BTHU, cache_BSU, preferred_element_type=dtype)
    scores_BTHS = jnp.where(mask_BTS[:, :, None], scores_BTHS * scale, jnp.finfo(dtype).min)
    weights_BTHS = jax.nn.softmax(scores_BTHS, axis=-1)
    weights_BTHS = jnp.where(mask_BTS[:, :, None], weights_BTHS, 0).astype(cache_BSU.dtype)
    out_BTHC = jnp.einsum(
        "bths,bsc->bthc", weights_BTHS, cache_BSU[:, :, :value_dim], preferred_element_type=dtype
    )
    return out_BTHC.astype(q_BTHU.dtype)
