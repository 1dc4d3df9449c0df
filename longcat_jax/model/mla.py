"""Multi-head latent attention with scale correction (arXiv 2509.01322, section 2.2.1; SPEC names).

Two forms of the same function: `expanded` (training, prefill: K and V of every head are made from
the latent) and `absorbed` (decoding: W_kb is folded into the query, W_vb into the output, attention
runs over the cached latent).

B batch, T tokens, R rows of a cache, S cache entries, D model, H heads, Q query rank, C latent
rank, N nope dim, P rope dim, V value dim, U = C + P the cached width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from longcat_jax.config import ModelConfig
from longcat_jax.model.dense import dense, products
from longcat_jax.model.norm import add_norm, rms_norm
from longcat_jax.model.remat import keep, keep_if_ample
from longcat_jax.model.rope import RopeTable, attention_scale, rotate, rotate_last
from longcat_jax.parallel.context import attend_in_place, gather_row
from longcat_jax.parameters import matrix, norm_weight
from longcat_jax.sharding import (
    BATCH_AXES,
    DENSE,
    TOKENS,
    gather_weight,
    on_shards,
    whole_implementation,
)
from pallas_kernels import absorb_query, expand_values, flash_mla, mla_decode
from pallas_kernels.add_norm import Rows


@struct.dataclass
class AttentionInput:
    """What attention needs to know of the tokens besides their activations, shared by all
    layers.
    """

    rope: RopeTable
    segment_ids_BT: jax.Array | None = None
    """Tokens see tokens of their own segment only; None: one segment a row. In natural order, also
    where the tokens themselves are in that of the mesh (parallel/context.py).
    """


@struct.dataclass
class LatentCache:
    """One attention's cache: B rows of all that the attentions of a model hold together.

    They are passed on together, written in place and read where they are: kernels take slices by
    their address.
    """

    entries_RSU: jax.Array
    """Normed and scaled latent, then the rotated rope key."""
    lengths_B: jax.Array
    """Entries in use, int32, the tokens of this call included."""
    first_row: jax.Array | int = 0
    """This attention's row b is row first_row + b."""


def _write(cache: LatentCache, latent_BTU: jax.Array) -> LatentCache:
    """Writes every row's last T entries."""
    T, entries_RSU = latent_BTU.shape[1], cache.entries_RSU
    places_BT = cache.lengths_B[:, None] + jnp.arange(-T, 0, dtype=cache.lengths_B.dtype)[None]
    rows_B = cache.first_row + jnp.arange(places_BT.shape[0], dtype=jnp.int32)
    rows_BT = jnp.broadcast_to(rows_B[:, None], places_BT.shape)
    entries_RSU = entries_RSU.at[rows_BT, places_BT].set(
        latent_BTU.astype(entries_RSU.dtype), unique_indices=True
    )
    return cache.replace(entries_RSU=entries_RSU)


def _query(config: ModelConfig, low_BTQ: jax.Array, weights: dict, rope: RopeTable) -> jax.Array:
    """Queries [B, T, H, N + P] of the normed latent, nope part first, the rope part rotated; not
    scaled.
    """
    c, (B, T, _) = config, low_BTQ.shape
    q = dense(low_BTQ, weights["q_b_proj"]).reshape(B, T, c.num_attention_heads, c.qk_head_dim)
    return rotate_last(q, rope)


def _scale(config: ModelConfig) -> float:
    """Of the scores: the softmax's, and the scale correction of the queries, alpha_q."""
    return attention_scale(config) * (config.hidden_size / config.q_lora_rank) ** 0.5


def _latent(
    config: ModelConfig, low_BTC: jax.Array, k_rope_BTP: jax.Array, rope: RopeTable
) -> jax.Array:
    """What a cache holds of each token [B, T, U], of the normed latent; the rope key is shared by
    all heads and not scaled.
    """
    low_BTC = low_BTC * (config.hidden_size / config.kv_lora_rank) ** 0.5  # alpha_kv
    k_rope_BTP = rotate(k_rope_BTP[:, :, None], rope)[:, :, 0]
    return jnp.concatenate([low_BTC, k_rope_BTP], axis=-1)


def _up_projections(config: ModelConfig, kv_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """kv_b_proj as W_uk [C, H, N] and W_uv [C, H, V]."""
    c = config
    w = kv_b.reshape(c.kv_lora_rank, c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim)
    return w[..., : c.qk_nope_head_dim], w[..., c.qk_nope_head_dim :]


def _attend(
    config: ModelConfig,
    q_BTHQ: jax.Array,
    latent_BTU: jax.Array,
    kv_b: jax.Array,
    segment_ids_BS: jax.Array | None,
) -> jax.Array:
    """A device's queries against the keys of the whole row [B, T, H, V]."""
    c, latent_BSU = config, gather_row(latent_BTU)
    # The weights are cut in two, not what they give: that is 2 T / C times as much to copy.
    w_uk_CHN, w_uv_CHV = _up_projections(c, gather_weight(kv_b, DENSE, dim=0))
    latent_BSC, k_rope_BSP = jnp.split(latent_BSU, [c.kv_lora_rank], axis=-1)
    k_BSHN = keep_if_ample(jnp.einsum("bsc,chn->bshn", latent_BSC, w_uk_CHN))
    v_BSHV = keep_if_ample(jnp.einsum("bsc,chv->bshv", latent_BSC, w_uv_CHV))

    def attend(q_BTHQ: jax.Array, offset: jax.Array | None) -> jax.Array:
        return flash_mla(
            q_BTHQ,
            k_BSHN,
            v_BSHV,
            scale=_scale(c),
            segment_ids=segment_ids_BS,
            k_rope=k_rope_BSP,
            q_offset=offset,
        )

    return attend_in_place(attend, q_BTHQ)


def expanded(
    config: ModelConfig, x_BTD: jax.Array, weights: dict, tokens: AttentionInput
) -> tuple[jax.Array, jax.Array]:
    """Causal attention among the T tokens themselves -> (output [B, T, D], latent [B, T, U])."""
    c, (B, T, _) = config, x_BTD.shape
    # One product, and so is its gradient to x.
    down = jnp.concatenate([weights["q_a_proj"], weights["kv_a_proj_with_mqa"]], axis=1)
    low_BTQ, low_BTU = jnp.split(keep(x_BTD @ down), [c.q_lora_rank], axis=-1)
    low_BTC, k_rope_BTP = jnp.split(low_BTU, [c.kv_lora_rank], axis=-1)
    low_BTQ, low_BTC = (
        rms_norm(low, weights[name], c.mla_norm_eps)
        for low, name in ((low_BTQ, "q_a_layernorm"), (low_BTC, "kv_a_layernorm"))
    )
    latent_BTU = _latent(c, low_BTC, k_rope_BTP, tokens.rope)
    q_BTHQ = keep(_query(c, low_BTQ, weights, tokens.rope))
    on_device = on_shards(
        functools.partial(_attend, c), (TOKENS, TOKENS, P(DENSE), P(BATCH_AXES)), TOKENS
    )
    out_BTHV = on_device(q_BTHQ, latent_BTU, weights["kv_b_proj"], tokens.segment_ids_BT)
    return dense(out_BTHV.reshape(B, T, -1), weights["o_proj"]), latent_BTU


def absorbed(
    config: ModelConfig,
    x_BTD: jax.Array,
    weights: dict,
    tokens: AttentionInput,
    cache: LatentCache,
    summed: bool = True,
) -> tuple[jax.Array, LatentCache]:
    """Writes the T tokens to the cache and attends over it.

    Args:
      config: architecture.
      x_BTD: activations.
      weights: of the attention.
      tokens: positions.
      cache: whose lengths include these tokens.
      summed: False: not the output, but its terms.

    Returns:
      output [B, T, D] or terms [S, B, T, D], and the cache.
    """
    c, (B, T, _) = config, x_BTD.shape
    down = weights["q_a_proj"], weights["kv_a_proj_with_mqa"]
    low_SBTQ, low_SBTU = products(x_BTD, *down, summed=False)
    (_, low_BTQ), (_, low_BTC) = add_norm(
        Rows(weights["q_a_layernorm"], terms_SMN=low_SBTQ),
        Rows(weights["kv_a_layernorm"], terms_SMN=low_SBTU),
        eps=c.mla_norm_eps,
    )
    k_rope_BTP = low_SBTU[..., c.kv_lora_rank :].sum(0).astype(x_BTD.dtype)
    cache = _write(cache, _latent(c, low_BTC, k_rope_BTP, tokens.rope))
    (terms_SBTX,) = products(low_BTQ, weights["q_b_proj"], summed=False)
    kv_b_CHY = weights["kv_b_proj"].reshape(c.kv_lora_rank, c.num_attention_heads, -1)
    implementation = whole_implementation()
    q_MHU = absorb_query(
        terms_SBTX.reshape(len(terms_SBTX), B * T, -1),
        kv_b_CHY,
        *(table_BTI.reshape(B * T, -1) for table_BTI in (tokens.rope.cos_BTI, tokens.rope.sin_BTI)),
        implementation=implementation,
    )
    out_BTHC = mla_decode(
        q_MHU.reshape(B, T, *q_MHU.shape[1:]),
        jax.lax.dynamic_slice_in_dim(cache.entries_RSU, cache.first_row, B),
        cache.lengths_B,
        scale=_scale(c),
        value_dim=c.kv_lora_rank,
        implementation=implementation,
    )
    out_BTHV = expand_values(
        out_BTHC.reshape(B * T, *out_BTHC.shape[2:]),
        kv_b_CHY,
        value_dim=c.v_head_dim,
        implementation=implementation,
    )
    out_BTX = out_BTHV.reshape(B, T, -1)
    return dense(out_BTX, weights["o_proj"], summed=summed), cache


class MLA(nn.Module):
    """Parameters of one attention; `expanded` without a cache, `absorbed` with one."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        tokens: AttentionInput,
        cache: LatentCache | None = None,
        *,
        summed: bool = True,
    ) -> tuple[jax.Array, jax.Array | LatentCache]:
        """-> (output [B, T, D], latent [B, T, U] of these tokens or the cache with them written);
        with a cache and not `summed`, the output's terms [S, B, T, D].
        """
        c = self.config
        D, Q, C, U, H = (
            c.hidden_size,
            c.q_lora_rank,
            c.kv_lora_rank,
            c.latent_dim,
            c.num_attention_heads,
        )
        kv_width, out_width = H * (c.qk_nope_head_dim + c.v_head_dim), H * c.v_head_dim
        by_D, by_Q, by_C = (
            matrix(c, "hidden_size", "embed", None),
            matrix(c, "q_lora_rank", "q_rank", None),
            matrix(c, "kv_lora_rank", "kv_rank", None),
        )
        weights = {
            "q_a_proj": self.param("q_a_proj", by_D, (D, Q)),
            "q_a_layernorm": self.param("q_a_layernorm", norm_weight(c), (Q,)),
            "q_b_proj": self.param("q_b_proj", by_Q, (Q, H * c.qk_head_dim)),
            "kv_a_proj_with_mqa": self.param("kv_a_proj_with_mqa", by_D, (D, U)),
            "kv_a_layernorm": self.param("kv_a_layernorm", norm_weight(c), (C,)),
            "kv_b_proj": self.param("kv_b_proj", by_C, (C, kv_width)),
            "o_proj": self.param(
                "o_proj", matrix(c, "num_attention_heads", None, "embed"), (out_width, D)
            ),
        }
        weights = {name: w.astype(x_BTD.dtype) for name, w in weights.items()}
        if cache is None:
            return expanded(c, x_BTD, weights, tokens)
        return absorbed(c, x_BTD, weights, tokens, cache, summed=summed)
