"""Mixture of real and identity ("zero-computation") experts (section 2.1.1).

Identity experts return their input: their summed gates scale the token where it stands. They take
no row of the grouped GEMM (model/experts.py) and no communication (parallel/expert.py).

B batch, T tokens, D model, X real experts, F expert width, K selections.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from longcat_jax.config import ModelConfig, ParallelConfig
from longcat_jax.model.router import Router, Routing
from longcat_jax.parallel.expert import Selected, Weights, mixture
from longcat_jax.parameters import matrix


def identity_experts(
    x_BTD: jax.Array, gates_BTK: jax.Array, experts_BTK: jax.Array, num_real: int
) -> jax.Array:
    """x * sum of the gates of the selected identity experts."""
    gate_BT1 = jnp.where(experts_BTK >= num_real, gates_BTK, 0).sum(-1, keepdims=True)
    return (x_BTD.astype(gate_BT1.dtype) * gate_BT1).astype(x_BTD.dtype)


class Experts(nn.Module):
    """Parameters of the real experts."""

    config: ModelConfig
    parallel: ParallelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, routing: Routing) -> tuple[jax.Array, jax.Array]:
        """-> (real experts' part of the MoE [B, T, D], selections left out)."""
        c, D = self.config, x_BTD.shape[-1]
        X, F = c.n_routed_experts, c.expert_ffn_hidden_size
        wide, narrow = (X, D, 2 * F), (X, F, D)
        into = matrix(c, "hidden_size", "expert", "expert_embed", None)
        out_of = matrix(c, "expert_ffn_hidden_size", "expert", None, "expert_embed")
        gate_up = self.param("gate_up_proj", into, wide).astype(x_BTD.dtype)
        down = self.param("down_proj", out_of, narrow).astype(x_BTD.dtype)
        tokens = Selected(x_BTD, routing.gates_BTK, routing.experts_BTK)
        return mixture(tokens, Weights(gate_up, down), config=c, parallel=self.parallel)


class MoE(nn.Module):
    """Router, real experts, identity experts."""

    config: ModelConfig
    parallel: ParallelConfig = ParallelConfig()

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, router_shift_E: jax.Array | None = None
    ) -> tuple[jax.Array, Routing, jax.Array]:
        """-> (gamma * sum of p_i E_i(x) [B, T, D], routing, selections left out)."""
        c = self.config
        routing = Router(c, name="router")(x_BTD, router_shift_E)
        real_BTD, left_out = Experts(c, self.parallel, name="experts")(x_BTD, routing)
        if not c.zero_expert_num:
            return real_BTD, routing, left_out
        gates, experts = routing.gates_BTK, routing.experts_BTK
        identity_BTD = identity_experts(x_BTD, gates, experts, c.n_routed_experts)
        return real_BTD + identity_BTD, routing, left_out
