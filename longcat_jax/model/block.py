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
from longcat_jax.model.norm import rms_norm
from longcat_jax.model.remat import keep
from longcat_jax.model.router import Routing
from longcat_jax.parameters import norm_weight


@struct.dataclass
class BlockOutput:
    """What a block gives besides the residual stream."""

    routing: Routing
    left_out: jax.Array
    """Selections that found no room on their way to an expert (parallel/expert.py)."""
    attention: tuple[jax.Array, jax.Array] | tuple[LatentCache, LatentCache]
    """Both attentions' latents [B, T, U] of these tokens, or their extended caches, of which the
    second holds what either has written.
    """


class Block(nn.Module):
    """One "layer" of the released checkpoint: two attentions, two dense FFNs, one MoE."""

    config: ModelConfig
    parallel: ParallelConfig = ParallelConfig()

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        tokens: AttentionInput,
        cache: LatentCache | None = None,
        router_shift_E: jax.Array | None = None,
    ) -> tuple[jax.Array, BlockOutput]:
        """[B, T, D] -> ([B, T, D], BlockOutput); the cache is the first attention's, the second's
        rows follow.
        """
        c = self.config

        def norm(name: str, x: jax.Array) -> jax.Array:
            return rms_norm(x, self.param(name, norm_weight(c), (c.hidden_size,)), c.rms_norm_eps)

        def later(module: str, *names: str) -> tuple[jax.Array, ...]:
            """Weights of a module still to come, where a step over a cache waits for them."""
            if cache is None:
                return ()
            given = self.variables["params"][module]
            return tuple(given[name].astype(x_BTD.dtype) for name in names)

        ahead = later("mlps_0", "gate_proj", "up_proj")
        h_BTD = norm("input_layernorm_0", x_BTD)
        out, latent_0 = MLA(c, name="self_attn_0")(h_BTD, tokens, cache, ahead)
        if cache is not None:
            cache = latent_0.replace(first_row=cache.first_row + x_BTD.shape[0])
        x_BTD = keep(x_BTD + out)
        h_BTD = norm("post_attention_layernorm_0", x_BTD)
        moe = MoE(c, self.parallel, name="mlp")
        shortcut, routing, left_out = moe(h_BTD, router_shift_E)
        ahead = later("self_attn_1", "q_a_proj", "kv_a_proj_with_mqa")
        x_BTD = keep(x_BTD + FFN(c, name="mlps_0")(h_BTD, ahead))
        ahead = later("mlps_1", "gate_proj", "up_proj")
        h_BTD = norm("input_layernorm_1", x_BTD)
        out, latent_1 = MLA(c, name="self_attn_1")(h_BTD, tokens, cache, ahead)
        x_BTD = keep(x_BTD + out)
        x_BTD += FFN(c, name="mlps_1")(norm("post_attention_layernorm_1", x_BTD))
        return x_BTD + shortcut, BlockOutput(routing, left_out, (latent_0, latent_1))
