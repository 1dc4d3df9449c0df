"""Shortcut-connected MoE block (section 2.1.2): the MoE leaves after the first attention and joins
at the end.

Between its two ends stand FFN_0, MLA_1 and FFN_1, which don't depend on it: dispatch, experts and
combine have all of that to hide behind.

B batch, T tokens, D model.
"""

import flax.linen as nn
import jax
from flax import struct

from longcat_jax.config import ModelConfig, ParallelConfig
from longcat_jax.model.ffn import FFN
from longcat_jax.model.mla import MLA, AttentionInput, LatentCache
from longcat_jax.model.moe import MoE
from longcat_jax.model.norm import add_norm, add_residual, norm_residual
from longcat_jax.model.remat import keep
from longcat_jax.model.router import Routing
from longcat_jax.parameters import norm_weight
from pallas_kernels.add_norm import Rows


@struct.dataclass
class BlockOutput:
    """What a block gives besides the residual stream."""

    routing: Routing
    left_out: jax.Array
    """Selections that found no room on their way to an expert (parallel/expert.py)."""
    latents: tuple[jax.Array, jax.Array]
    """Both attentions' [B, T, U]."""


class Block(nn.Module):
    """One "layer" of the released checkpoint: two attentions, two dense FFNs, one MoE."""

    config: ModelConfig
    parallel: ParallelConfig = ParallelConfig()

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        tokens: AttentionInput,
        router_shift_E: jax.Array | None = None,
    ) -> tuple[jax.Array, BlockOutput]:
        """[B, T, D] -> ([B, T, D], BlockOutput)."""
        c = self.config

        def norm(name: str, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
            weight_D = self.param(name, norm_weight(c), (c.hidden_size,))
            return norm_residual(x_BTD, weight_D, c.rms_norm_eps)

        x_BTD, h_BTD = norm("input_layernorm_0", x_BTD)
        out, latent_0 = MLA(c, name="self_attn_0")(h_BTD, tokens)
        x_BTD, h_BTD = norm("post_attention_layernorm_0", keep(add_residual(x_BTD, out)))
        moe = MoE(c, self.parallel, name="mlp")
        shortcut, routing, left_out = moe(h_BTD, router_shift_E)
        x_BTD = keep(add_residual(x_BTD, FFN(c, name="mlps_0")(h_BTD)))
        x_BTD, h_BTD = norm("input_layernorm_1", x_BTD)
        out, latent_1 = MLA(c, name="self_attn_1")(h_BTD, tokens)
        x_BTD, h_BTD = norm("post_attention_layernorm_1", keep(add_residual(x_BTD, out)))
        x_BTD = add_residual(x_BTD, FFN(c, name="mlps_1")(h_BTD))
        return add_residual(x_BTD, shortcut), BlockOutput(routing, left_out, (latent_0, latent_1))


class DecodingBlock(nn.Module):
    """The same function of the same parameters, over a cache and in few launches: a step of few
    tokens waits for these and for the weights.

    The residual stream comes and goes as two summands, which the next norm adds: the stream without
    the last FFN, and that FFN's terms.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        terms_SBTD: jax.Array | None,
        tokens: AttentionInput,
        cache: LatentCache,
    ) -> tuple[jax.Array, jax.Array, LatentCache]:
        """([B, T, D], [S, B, T, D] or None, ...) -> (the same, what either attention has written);
        the cache is the first attention's, the second's rows follow. None: where only the shape of
        the terms is asked for.
        """
        c, dtype = self.config, x_BTD.dtype

        def norm(name: str, x: jax.Array, terms: jax.Array | None) -> tuple:
            weight = self.param(name, norm_weight(c), (c.hidden_size,)).astype(dtype)
            return add_norm(Rows(weight, x, terms), eps=c.rms_norm_eps)[0]

        def attention(i: int, h_BTD: jax.Array, cache: LatentCache) -> tuple:
            return MLA(c, name=f"self_attn_{i}")(h_BTD, tokens, cache, summed=False)

        x_BTD, h_BTD = norm("input_layernorm_0", x_BTD, terms_SBTD)
        terms_SBTD, cache = attention(0, h_BTD, cache)
        x_BTD, h_BTD = norm("post_attention_layernorm_0", x_BTD, terms_SBTD)
        shortcut, *_ = MoE(c, name="mlp")(h_BTD)
        terms_SBTD = FFN(c, name="mlps_0")(h_BTD, summed=False)
        x_BTD, h_BTD = norm("input_layernorm_1", x_BTD, terms_SBTD)
        cache = cache.replace(first_row=cache.first_row + x_BTD.shape[0])
        terms_SBTD, cache = attention(1, h_BTD, cache)
        x_BTD, h_BTD = norm("post_attention_layernorm_1", x_BTD, terms_SBTD)
        return x_BTD + shortcut, FFN(c, name="mlps_1")(h_BTD, summed=False), cache
