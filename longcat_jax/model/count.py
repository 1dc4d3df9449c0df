"""How many parameters a model has and how much arithmetic a token takes. Nothing is allocated.

Counted as SPEC does: totals without the MTP head; active parameters with the unembedding and
without the input embedding.
"""

import math

import jax

from longcat_jax.config import ModelConfig
from longcat_jax.model.longcat import abstract
from longcat_jax.parameters import unbox


def _sizes(config: ModelConfig) -> dict[str, int]:
    """Parameters by top-level name, experts apart."""
    shapes = unbox(abstract(config))
    size = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for name, tree in shapes.items()
    }
    size["experts"] = sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["layers"]["mlp"]["experts"])
    )
    return size


def total_parameters(config: ModelConfig) -> int:
    """Parameters of the main model, MTP head left out."""
    size = _sizes(config)
    return sum(size[name] for name in ("embed_tokens", "layers", "norm", "lm_head"))


def mtp_parameters(config: ModelConfig) -> int:
    """Parameters of the MTP head, its embedding included; 0 without one."""
    return _sizes(config).get("mtp", 0)


def active_parameters(config: ModelConfig, real_experts: float) -> float:
    """Parameters that a token with this many real experts per layer is multiplied with."""
    size = _sizes(config)
    dense = total_parameters(config) - size["embed_tokens"] - size["experts"]
    return dense + size["experts"] * real_experts / config.n_routed_experts


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward: 6 x active + causal attention, MTP not counted, at K_e real
    experts.
    """
    head_width = config.qk_head_dim + config.v_head_dim
    attention = config.num_attention_heads * head_width * sequence_length  # QK' and PV, half masked
    forward = 2 * config.num_layers * attention
    return 6 * active_parameters(config, config.moe_topk_real) + 3 * forward
