"""Mixture of real and identity ("zero-computation") experts (section 2.1.1).

Identity experts return their input: their summed gates scale the token where it stands. They take
no row of the grouped GEMM and, when sharded, no communication. Real experts' rows are put in order
of expert, multiplied, and summed back through the inverse permutation in fixed order: gathers only,
in both directions.

B batch, T tokens (B * T in the pure functions), D model, X real experts, F expert width, K
selections, R = T * K rows.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from longcat_jax.config import ModelConfig
from longcat_jax.model.remat import keep
from longcat_jax.model.router import Router, Routing
from longcat_jax.parameters import matrix
from pallas_kernels import gather_combine, gather_rows, grouped_gemm


@struct.dataclass
class Permutation:
    """Order of the (token, selection) slots by expert, identity slots last."""

    token_of_row_R: jax.Array
    row_of_slot_TK: jax.Array
    group_sizes_X: jax.Array


def permute_by_expert(experts_TK: jax.Array, num_real: int) -> Permutation:
    """Stable order, so equal inputs give equal sums whatever the other tokens do."""
    num_selections = experts_TK.shape[1]
    key_R = jnp.minimum(experts_TK, num_real).reshape(-1)
    slot_of_row_R = jnp.argsort(key_R, stable=True)
    row_of_slot = jnp.argsort(slot_of_row_R).reshape(experts_TK.shape)
    sizes = (key_R[:, None] == jnp.arange(num_real)[None]).sum(0, dtype=jnp.int32)
    return Permutation(slot_of_row_R // num_selections, row_of_slot, sizes)


def real_experts(
    x_TD: jax.Array,
    gates_TK: jax.Array,
    experts_TK: jax.Array,
    gate_up_XDF: jax.Array,
    down_XFD: jax.Array,
) -> jax.Array:
    """sum_k gate_k * SwiGLU_k(x) over the selected real experts; gate_up_XDF holds the gate half
    first.
    """
    num_real = gate_up_XDF.shape[0]
    order = permute_by_expert(experts_TK, num_real)
    rows_RD = gather_rows(x_TD, order.token_of_row_R, order.row_of_slot_TK)
    wide_RF = keep(grouped_gemm(rows_RD, gate_up_XDF, order.group_sizes_X))
    gate_RF, up_RF = jnp.split(wide_RF, 2, axis=-1)
    rows_RD = keep(grouped_gemm(jax.nn.silu(gate_RF) * up_RF, down_XFD, order.group_sizes_X))
    gates_TK = jnp.where(experts_TK < num_real, gates_TK, 0)
    return gather_combine(rows_RD, order.row_of_slot_TK, gates_TK)


def identity_experts(
    x_BTD: jax.Array, gates_BTK: jax.Array, experts_BTK: jax.Array, num_real: int
) -> jax.Array:
    """x * sum of the gates of the selected identity experts."""
    gate_BT1 = jnp.where(experts_BTK >= num_real, gates_BTK, 0).sum(-1, keepdims=True)
    return (x_BTD.astype(gate_BT1.dtype) * gate_BT1).astype(x_BTD.dtype)


class Experts(nn.Module):
    """Parameters of the real experts."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, routing: Routing) -> jax.Array:
        """Real experts' part of the MoE [B, T, D]."""
        c, D, K = self.config, x_BTD.shape[-1], self.config.moe_topk
        X, F = c.n_routed_experts, c.expert_ffn_hidden_size
        wide, narrow = (X, D, 2 * F), (X, F, D)
        into = matrix(c, "hidden_size", "expert", "expert_embed", None)
        out_of = matrix(c, "expert_ffn_hidden_size", "expert", None, "expert_embed")
        gate_up = self.param("gate_up_proj", into, wide).astype(x_BTD.dtype)
        down = self.param("down_proj", out_of, narrow).astype(x_BTD.dtype)
        gates_TK, experts_TK = routing.gates_BTK.reshape(-1, K), routing.experts_BTK.reshape(-1, K)
        out_TD = real_experts(x_BTD.reshape(-1, D), gates_TK, experts_TK, gate_up, down)
        return out_TD.reshape(x_BTD.shape)


class MoE(nn.Module):
    """Router, real experts, identity experts."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, router_shift_E: jax.Array | None = None
    ) -> tuple[jax.Array, Routing]:
        """-> (gamma * sum of p_i E_i(x) [B, T, D], routing)."""
        c = self.config
        routing = Router(c, name="router")(x_BTD, router_shift_E)
        real_BTD = Experts(c, name="experts")(x_BTD, routing)
        if not c.zero_expert_num:
            return real_BTD, routing
        gates, experts = routing.gates_BTK, routing.experts_BTK
        return real_BTD + identity_experts(x_BTD, gates, experts, c.n_routed_experts), routing
