"""Router over real and identity experts, and what is counted about its choices (sections 2.1.1,
2.2.3).

p = softmax(W_r h) over N + Z outputs in at least float32; the top K of p + b are selected, b only
takes part in the selection; gates are the unbiased p times gamma, not renormalised.

B batch, T tokens, D model, E = N + Z router outputs, X = N real experts, K selections, G groups of
real experts.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from longcat_jax.config import ModelConfig
from longcat_jax.model.dense import dense
from longcat_jax.model.remat import keep
from longcat_jax.parameters import router_bias, router_matrix
from longcat_jax.sharding import TOKENS, on_shards

PARTS = "classifier_parts"
"""`product_parts` of the classifier, where they stand beside it, made once for many steps."""
FEW_TOKENS = 64
"""So many select by comparing all pairs of experts."""


@struct.dataclass
class Routing:
    """A router's decision."""

    gates_BTK: jax.Array
    """gamma * p of the selected experts."""
    experts_BTK: jax.Array
    """int32 ids; N.. are identity experts."""
    p_BTE: jax.Array


@struct.dataclass
class RouterStatistics:
    """Counts over the tokens outside padding."""

    load_E: jax.Array
    """int32: selections of each expert."""
    balance_B: jax.Array
    """Balance loss of each row before alpha: 1 for a balanced router."""
    real_histogram: jax.Array
    """[K + 1] int32: tokens with 0..K real experts."""
    selected_BTK: jax.Array


def _bfloat16_parts(x: jax.Array, count: int) -> list[jax.Array]:
    """bfloat16 numbers that add up to a float32: each holds 8 bits of its significand, so three
    are exact.
    """
    parts = []
    for _ in range(count):
        # Not a conversion there and back: XLA leaves such pairs out.
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def product_parts(w_DE: jax.Array) -> jax.Array:
    """The three bfloat16 parts of float32 weights [..., E] side by side, and zeros up to a width
    that `skinny_gemm` takes.
    """
    parts = jnp.concatenate(_bfloat16_parts(w_DE, 3), axis=-1)
    missing = -parts.shape[-1] % 64
    return jnp.pad(parts, [(0, 0)] * (parts.ndim - 1) + [(0, missing)])


def _sum_of_parts(x: jax.Array) -> jax.Array:
    large, medium, small = jnp.split(x, 3, axis=-1)
    return large + (medium + small)


@jax.custom_vjp
def wide_product(x_BTD: jax.Array, w_DE: jax.Array) -> jax.Array:
    """bfloat16 x times float32 w, in float32.

    One product with w's three bfloat16 parts side by side: on tensor cores that takes a quarter of
    the time of a float32 product on a GPU's plain ones, and no factor is rounded.
    """
    parts = jnp.concatenate(_bfloat16_parts(w_DE, 3), axis=1)
    return _sum_of_parts(jnp.matmul(x_BTD, parts, preferred_element_type=jnp.float32))


def _wide_forward(x_BTD: jax.Array, w_DE: jax.Array) -> tuple:
    return wide_product(x_BTD, w_DE), (x_BTD, w_DE)


def _wide_backward(residuals: tuple, dout_BTE: jax.Array) -> tuple:
    x_BTD, w_DE = residuals
    (d0, d1, d2), (w0, w1) = _bfloat16_parts(dout_BTE, 3), _bfloat16_parts(w_DE, 2)
    parts = jnp.concatenate([d0, d1, d2], axis=-1)
    product = jnp.einsum("btd,bte->de", x_BTD, parts, preferred_element_type=jnp.float32)
    # Smaller parts would not show in dx, which is rounded to bfloat16. The product gives it in that
    # dtype: of a float32 result XLA's scheduler expects 3 ms instead of 0.1, and "hides" the
    # gradient of dispatch behind it (experiments/LOG.md).
    lhs, rhs = jnp.concatenate([d0, d0, d1], axis=-1), jnp.concatenate([w0, w1, w0], axis=1)
    return jnp.matmul(lhs, rhs.T), _sum_of_parts(product)


wide_product.defvjp(_wide_forward, _wide_backward)


def _product(x_BTD: jax.Array, w_DE: jax.Array) -> jax.Array:
    """x w in the dtype of w, at least float32."""
    if x_BTD.dtype == jnp.bfloat16 and w_DE.dtype == jnp.float32:
        return wide_product(x_BTD, w_DE)
    return jnp.matmul(x_BTD.astype(w_DE.dtype), w_DE, precision=jax.lax.Precision.HIGHEST)


def largest_one_by_one(x_BTE: jax.Array, count: int) -> jax.Array:
    """What `jax.lax.top_k` returns as indices: descending, the lowest of equal ones first.

    But for NaN, and for 0 and -0, which count as equal here, as do -inf and the lowest finite
    number. A maximum at a time; XLA sorts whole rows on a GPU, which takes more than twice as long
    for 12 of 768.
    """
    ids_E, chosen = jnp.arange(x_BTE.shape[-1])[None, None], []
    x_BTE = jnp.maximum(x_BTE, jnp.finfo(x_BTE.dtype).min)  # -inf marks what is taken, no other
    for _ in range(count):
        index_BT = jnp.argmax(x_BTE, axis=-1)
        chosen.append(index_BT.astype(jnp.int32))
        x_BTE = jnp.where(ids_E == index_BT[..., None], -jnp.inf, x_BTE)
    return jnp.stack(chosen, axis=-1)


def largest_by_comparison(x_BTE: jax.Array, count: int) -> jax.Array:
    """The same of few tokens: all pairs are compared, in two kernels instead of one for every
    maximum. A decoding step waits for launches. NaN counts as the largest number.
    """
    E, range_ = x_BTE.shape[-1], jnp.finfo(x_BTE.dtype)
    x_BTE = jnp.where(jnp.isnan(x_BTE), range_.max, jnp.maximum(x_BTE, range_.min))
    ids_E = jnp.arange(E, dtype=jnp.int32)
    one, other = x_BTE[..., :, None], x_BTE[..., None, :]
    earlier_EE = (ids_E[None, :] < ids_E[:, None])[None, None]
    rank_BTE = ((other > one) | ((other == one) & earlier_EE)).sum(-1, dtype=jnp.int32)
    places_K1 = jnp.arange(count, dtype=jnp.int32)[:, None]
    chosen_BTKE = rank_BTE[..., None, :] == places_K1[None, None]
    return jnp.where(chosen_BTKE, ids_E[None, None, None], 0).sum(-1, dtype=jnp.int32)


@jax.custom_vjp
def select(p_BTE: jax.Array, experts_BTK: jax.Array) -> jax.Array:
    """p of the chosen experts; the gradient is a sum over K in fixed order instead of a scatter."""
    return jnp.take_along_axis(p_BTE, experts_BTK, axis=-1)


def _select_forward(p_BTE: jax.Array, experts_BTK: jax.Array) -> tuple:
    return select(p_BTE, experts_BTK), (experts_BTK, jnp.zeros((p_BTE.shape[-1], 0), p_BTE.dtype))


def _select_backward(residuals: tuple, dgates_BTK: jax.Array) -> tuple:
    experts_BTK, carrier = residuals
    ids_E = jnp.arange(carrier.shape[0])[None, None]
    total = jnp.zeros((*experts_BTK.shape[:-1], carrier.shape[0]), carrier.dtype)
    for k in range(experts_BTK.shape[-1]):
        total += jnp.where(experts_BTK[..., k, None] == ids_E, dgates_BTK[..., k, None], 0)
    return total, None


select.defvjp(_select_forward, _select_backward)


def balance_loss(
    p_BTE: jax.Array,
    load_BE: jax.Array,
    valid_BT: jax.Array,
    *,
    config: ModelConfig,
    groups: int,
) -> jax.Array:
    """Device-level balance loss of each row, without alpha [B] (section 2.2.3).

    sum_j f_j P_j over G groups of real experts and, as group G + 1, the identity experts. P_j: mean
    probability of group j. f_j: its selections per token, over K_e / G (real) or K - K_e
    (identity); counted, so no gradient.
    """
    c = config
    tokens_B = jnp.maximum(valid_BT.sum(-1), 1).astype(p_BTE.dtype)
    mean_BE = (p_BTE * valid_BT[..., None]).sum(1) / tokens_B[:, None]
    share_BE = load_BE / tokens_B[:, None]

    def grouped(value_BE: jax.Array) -> jax.Array:
        real = value_BE[:, : c.n_routed_experts]
        return real.reshape(real.shape[0], groups, -1).sum(-1)

    loss_B = (grouped(share_BE) * grouped(mean_BE)).sum(-1) * (groups / c.moe_topk_real)
    if c.zero_expert_num and c.moe_topk > c.moe_topk_real:
        identity = slice(c.n_routed_experts, None)
        f_B = share_BE[:, identity].sum(-1) / (c.moe_topk - c.moe_topk_real)
        loss_B += f_B * mean_BE[:, identity].sum(-1)
    return loss_B


def router_statistics(
    routing: Routing, valid_BT: jax.Array, *, config: ModelConfig, groups: int
) -> RouterStatistics:
    """Loads, balance loss and histogram of one layer's choices."""
    c, experts_BTK = config, routing.experts_BTK
    ids_E = jnp.arange(c.num_router_outputs)[None, None, None]
    hits_BTKE = (experts_BTK[..., None] == ids_E) & valid_BT[..., None, None]
    load_BE = hits_BTKE.sum((1, 2), dtype=jnp.int32)
    real_BT = (experts_BTK < c.n_routed_experts).sum(-1)
    of_count = (real_BT[..., None] == jnp.arange(c.moe_topk + 1)[None, None]) & valid_BT[..., None]
    return RouterStatistics(
        load_E=load_BE.sum(0),
        balance_B=balance_loss(routing.p_BTE, load_BE, valid_BT, config=c, groups=groups),
        real_histogram=of_count.sum((0, 1), dtype=jnp.int32),
        selected_BTK=experts_BTK,
    )


class Router(nn.Module):
    """Parameters of the router; the bias has no gradient, optim/pid_bias.py moves it."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, shift_E: jax.Array | None = None) -> Routing:
        """Routes every token; `shift_E` is added to every p after the softmax (to differentiate by,
        SPEC 3).
        """
        c = self.config
        E = c.num_router_outputs
        w_DE = self.param("classifier", router_matrix(c, "embed", None), (c.hidden_size, E))
        bias_E = self.param("e_score_correction_bias", router_bias(c), (E,))
        if self.has_variable("params", PARTS):
            parts = self.get_variable("params", PARTS)
            product = dense(x_BTD, parts, out_dtype=jnp.float32)
            logits_BTE = _sum_of_parts(product[..., : 3 * E])
        else:
            logits_BTE = _product(x_BTD, w_DE)
        p_BTE = jax.nn.softmax(keep(logits_BTE), axis=-1)
        if shift_E is not None:
            p_BTE = p_BTE + shift_E[None, None]

        def choose(p_BTE: jax.Array, bias_E: jax.Array) -> tuple[jax.Array, jax.Array]:
            few = p_BTE.shape[0] * p_BTE.shape[1] <= FEW_TOKENS
            largest = largest_by_comparison if few else largest_one_by_one
            choice_BTE = jax.lax.stop_gradient(p_BTE) + bias_E[None, None]
            experts_BTK = jax.lax.platform_dependent(
                choice_BTE,
                cuda=lambda x_BTE: largest(x_BTE, c.moe_topk),
                default=lambda x_BTE: jax.lax.top_k(x_BTE, c.moe_topk)[1],
            )
            experts_BTK = keep(experts_BTK)
            return select(p_BTE, experts_BTK), experts_BTK

        # XLA would gather all tokens for the sort.
        on_device = on_shards(choose, (TOKENS, P()), (TOKENS, TOKENS))
        selected_BTK, experts_BTK = on_device(p_BTE, jax.lax.stop_gradient(bias_E))
        return Routing(c.routed_scaling_factor * selected_BTK, experts_BTK, p_BTE)
