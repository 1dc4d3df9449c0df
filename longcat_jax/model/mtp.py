"""Multi-token prediction head (section 2.1.3): one dense layer that drafts the token after the
next.

For position t it reads the main model's final normed hidden state and the embedding of token t + 1,
and predicts token t + 2 through the main unembedding. Its embedding table is its own (checkpoints
hold a separate one).

B batch, T tokens, D model, W vocabulary.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from longcat_jax.config import ModelConfig
from longcat_jax.model.embed import embed
from longcat_jax.model.ffn import FFN
from longcat_jax.model.mla import MLA, AttentionInput
from longcat_jax.model.norm import add_residual, norm_residual, rms_norm
from longcat_jax.parameters import embedding, matrix, norm_weight


class MTPHead(nn.Module):
    """The draft layer's parameters."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        hidden_BTD: jax.Array,
        next_tokens_BT: jax.Array,
        tokens: AttentionInput,
    ) -> tuple[jax.Array, jax.Array]:
        """-> (final normed hidden [B, T, D], latent [B, T, U] of these tokens)."""
        c, D, dtype = self.config, self.config.hidden_size, hidden_BTD.dtype

        def norm(name: str, x: jax.Array, how: Callable = rms_norm) -> Any:
            return how(x, self.param(name, norm_weight(c), (D,)), c.rms_norm_eps)

        table = self.param("embed_tokens", embedding(c, "vocab", None), (c.vocab_size, D))
        joint = [
            norm("enorm", embed(table, next_tokens_BT, dtype)),
            norm("hnorm", hidden_BTD),
        ]
        w = self.param("eh_proj", matrix(c, "hidden_size", "embed", None), (2 * D, D))
        x_BTD = jnp.concatenate(joint, axis=-1) @ w.astype(dtype)
        x_BTD, h_BTD = norm("input_layernorm", x_BTD, norm_residual)
        out, latent = MLA(c, name="self_attn")(h_BTD, tokens)
        x_BTD = add_residual(x_BTD, out)
        x_BTD, h_BTD = norm("post_attention_layernorm", x_BTD, norm_residual)
        x_BTD = add_residual(x_BTD, FFN(c, name="mlp")(h_BTD))
        return norm("norm", x_BTD), latent
