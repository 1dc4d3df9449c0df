"""The latent cache of a whole model, and the two passes that fill it.

`prefill` runs whole prompts through the training forward pass and keeps their latents; `extend`
runs a few more tokens per row in absorbed form (model/mla.py) over what is cached.

L layers, A the two attentions of a block, B batch, R = L A B rows, T tokens of this pass, S
capacity, D model, U cached width.
"""

import jax
import jax.numpy as jnp
from flax import struct

from longcat_jax.config import ModelConfig
from longcat_jax.model.block import DecodingBlock
from longcat_jax.model.embed import embed
from longcat_jax.model.experts import reads_in_place
from longcat_jax.model.longcat import Params, Sequence, trunk
from longcat_jax.model.mla import AttentionInput, LatentCache
from longcat_jax.model.norm import add_norm
from longcat_jax.model.rope import rope_table
from pallas_kernels.add_norm import Rows

UNROLLED = 8
"""Layers to a turn of the loop over them, where a turn is a graph of kernels that read weights
where they lie, and waits for the last. Elsewhere XLA would copy the weights of as many.
"""


def layers_to_a_turn(x_BTD: jax.Array, down_LXFD: jax.Array) -> int:
    """1, or UNROLLED at most, of few tokens on a Hopper GPU."""
    few = reads_in_place(x_BTD.reshape(-1, x_BTD.shape[-1]), down_LXFD[0])
    return min(len(down_LXFD), UNROLLED) if few else 1


@struct.dataclass
class Cache:
    """What decoding remembers of the tokens so far."""

    entries_LABSU: jax.Array
    """Normed, scaled latent and rotated rope key; beyond a row's length anything, never read."""
    lengths_B: jax.Array
    """Tokens of each row, int32. Setting one back forgets the row's last tokens."""


def prefill(
    params: Params, config: ModelConfig, sequence: Sequence, *, capacity: int
) -> tuple[jax.Array, Cache]:
    """Runs prompts padded on the right (segment 0) -> (hidden [B, T, D], their cache).

    Args:
      params: plain parameter tree.
      config: architecture.
      sequence: B rows of T tokens, each one segment from position 0, then padding.
      capacity: S, at least T.
    """
    out = trunk(params, config, sequence)
    spare = capacity - sequence.tokens_BT.shape[1]
    entries = jnp.pad(jnp.stack(out.latents, axis=1), [(0, 0)] * 3 + [(0, spare), (0, 0)])
    lengths_B = (sequence.segment_ids_BT != 0).sum(-1, dtype=jnp.int32)
    return out.hidden_BTD, Cache(entries, lengths_B)


def extend(
    params: Params, config: ModelConfig, tokens_BT: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Appends T tokens to every row -> (hidden [B, T, D] after the final norm, longer cache).

    The caller sees to it that no length grows past the capacity.
    """
    c, (L, A, B, S, U) = config, cache.entries_LABSU.shape
    T = tokens_BT.shape[1]
    positions_BT = cache.lengths_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    tokens = AttentionInput(rope_table(c, positions_BT))
    lengths_B = cache.lengths_B + T

    def layer(index: jax.Array, carry: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        # Of weights and cache a kernel takes a layer's part by its address, which XLA knows from
        # the loop's index. The cache is updated in place, never copied.
        x_BTD, terms_SBTD, entries_RSU = carry
        weights = jax.tree.map(
            lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), params["layers"]
        )
        latents = LatentCache(entries_RSU, lengths_B, index * (A * B))
        x_BTD, terms_SBTD, latents = DecodingBlock(c).apply(
            {"params": weights}, x_BTD, terms_SBTD, tokens, latents
        )
        return x_BTD, terms_SBTD, latents.entries_RSU

    x_BTD = embed(params["embed_tokens"], tokens_BT, jnp.dtype(c.dtype))
    entries_RSU = cache.entries_LABSU.reshape(L * A * B, S, U)
    _, terms, _ = jax.eval_shape(layer, jnp.int32(0), (x_BTD, None, entries_RSU))
    start = x_BTD, jnp.zeros(terms.shape, terms.dtype), entries_RSU
    turn = layers_to_a_turn(x_BTD, params["layers"]["mlp"]["experts"]["down_proj"])
    x_BTD, terms_SBTD, entries_RSU = jax.lax.fori_loop(0, L, layer, start, unroll=turn)
    last = Rows(params["norm"].astype(c.dtype), x_BTD, terms_SBTD)
    ((_, hidden_BTD),) = add_norm(last, eps=c.rms_norm_eps)
    return hidden_BTD, Cache(entries_RSU.reshape(L, A, B, S, U), lengths_B)
