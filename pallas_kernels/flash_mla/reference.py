"""MLA attention in plain jnp; long sequences in chunks of queries, so that no [T, S] scores stand
whole.

B batch, T tokens (queries), S keys, H heads, Q query width, N key width without rope, P rope width,
V value width, C queries of a chunk.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._common import accumulation_dtype, named_result

CHUNK = 256
WHOLE_UP_TO = 512


def _attend(
    q_BCHQ: jax.Array,
    k_BSHN: jax.Array,
    v_BSHV: jax.Array,
    k_rope: jax.Array | None,
    mask_BCS: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """One chunk of queries against all keys. Operands keep their dtype, sums and softmax run in the
    accumulation's.
    """
    dtype = accumulation_dtype(q_BCHQ.dtype)
    nope = k_BSHN.shape[3]
    scores_BHCS = jnp.einsum(
        "bchn,bshn->bhcs", q_BCHQ[..., :nope], k_BSHN, preferred_element_type=dtype
    )
    if k_rope is not None:
        scores_BHCS += jnp.einsum(
            "bchp,bsp->bhcs", q_BCHQ[..., nope:], k_rope, preferred_element_type=dtype
        )
    # A finite stand-in for -inf. The diagonal is never masked, so every row has a key and the rest
    # underflow to 0.
    scores_BHCS = jnp.where(mask_BCS[:, None], scores_BHCS * scale, jnp.finfo(dtype).min)
    weights_BHCS = jax.nn.softmax(scores_BHCS, axis=-1).astype(v_BSHV.dtype)
    out_BCHV = jnp.einsum("bhcs,bshv->bchv", weights_BHCS, v_BSHV, preferred_element_type=dtype)
    return out_BCHV.astype(q_BCHQ.dtype)


def flash_mla(
    q_BTHQ: jax.Array,
    k_BSHQ: jax.Array,
    v_BSHV: jax.Array,
    *,
    scale: float,
    segment_ids: jax.Array | None,
    k_rope: jax.Array | None,
    q_offset: jax.Array | int | None,
) -> jax.Array:
    """The public operator, arguments already checked."""
    num_tokens, num_keys = q_BTHQ.shape[1], k_BSHQ.shape[1]
    if segment_ids is None:
        segment_ids = jnp.zeros((1, num_keys), jnp.int32)
    offset = jnp.asarray(0 if q_offset is None else q_offset, jnp.int32)
    place_T = offset + jnp.arange(num_tokens, dtype=jnp.int32)
    segment_BT = lax.dynamic_slice_in_dim(segment_ids, offset, num_tokens, axis=1)

    def mask(place_C: jax.Array, segment_BC: jax.Array) -> jax.Array:
        causal_CS = jnp.arange(num_keys, dtype=jnp.int32)[None, :] <= place_C[:, None]
        return causal_CS[None] & (segment_BC[:, :, None] == segment_ids[:, None, :])

    if num_tokens <= WHOLE_UP_TO:
        mask_BTS = mask(place_T, segment_BT)
        return named_result(_attend(q_BTHQ, k_BSHQ, v_BSHV, k_rope, mask_BTS, scale=scale))

    # Every chunk adds to the gradients of all keys: the loop sums them in the dtype of what it
    # closes over.
    wide = accumulation_dtype(q_BTHQ.dtype)
    keys_wide = jax.tree.map(lambda x: x.astype(wide), (k_BSHQ, v_BSHV, k_rope))

    @jax.checkpoint
    def attend_chunk(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_BCHQ, place_C, segment_BC = chunk
        keys = jax.tree.map(lambda x: x.astype(q_BTHQ.dtype), keys_wide)
        return _attend(q_BCHQ, *keys, mask(place_C, segment_BC), scale=scale)

    num_chunks = -(-num_tokens // CHUNK)
    # Padding queries repeat the last one's place, so that they too have a key.
    row_T = jnp.minimum(jnp.arange(num_chunks * CHUNK), num_tokens - 1)
    padding = num_chunks * CHUNK - num_tokens
    q_padded = jnp.pad(q_BTHQ, ((0, 0), (0, padding), (0, 0), (0, 0)))

    def chunks(x_BT: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], num_chunks, CHUNK, *x_BT.shape[2:]), 1, 0)

    out = lax.map(
        attend_chunk,
        (chunks(q_padded), place_T[row_T].reshape(num_chunks, CHUNK), chunks(segment_BT[:, row_T])),
    )
    out_BTHV = jnp.moveaxis(out, 0, 1).reshape(*q_padded.shape[:3], v_BSHV.shape[3])
    return named_result(out_BTHV[:, :num_tokens])
