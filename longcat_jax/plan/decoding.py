"""Decoding by the memory's rate: a token takes no less than reading weights and cache once.

Every device holds the dense weights whole and its share of the experts, and decodes sequences of
its own; tokens go to their experts' devices. Weights and cache have the model's dtype, the router
float32.
"""

import dataclasses
import math

import jax.numpy as jnp

from longcat_jax.config import ModelConfig
from longcat_jax.plan.hardware import USABLE, Hardware
from longcat_jax.plan.training import attention_weights

MILLION = 1e6
BATCHES = (1, 8, 32, 96, 256)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A batch size with its bound."""

    batch: int
    """Sequences of a device."""
    seconds: float
    """Of a token, at least."""
    dollars: float
    """Of a million tokens, at least."""

    @property
    def tokens_per_second(self) -> float:
        """What a user sees at most."""
        return 1 / self.seconds


def _dense_bytes(model: ModelConfig) -> int:
    m, size = model, jnp.dtype(model.dtype).itemsize
    ffn = 3 * m.hidden_size * m.ffn_hidden_size
    block = 2 * (attention_weights(m) + ffn) * size + 4 * m.hidden_size * m.num_router_outputs
    return m.num_layers * block + m.vocab_size * m.hidden_size * size


def _expert_bytes(model: ModelConfig) -> int:
    """Of one expert in all layers."""
    size = jnp.dtype(model.dtype).itemsize
    return model.num_layers * 3 * model.hidden_size * model.expert_ffn_hidden_size * size


def cache_bytes(model: ModelConfig) -> int:
    """Of one token: both attentions' latents in all layers."""
    return 2 * model.num_layers * model.latent_dim * jnp.dtype(model.dtype).itemsize


def shards(model: ModelConfig, devices: int) -> int:
    """Ways in which the experts are divided."""
    return math.gcd(devices, model.n_routed_experts)


def room(model: ModelConfig, devices: int, context: int, hardware: Hardware) -> int:
    """Sequences of this length that a device has room for beside the weights; below 0: none for
    the weights.
    """
    table = model.vocab_size * model.hidden_size * jnp.dtype(model.dtype).itemsize
    experts = model.n_routed_experts // shards(model, devices) * _expert_bytes(model)
    free = USABLE * hardware.memory - _dense_bytes(model) - table - experts
    return math.floor(free / (context * cache_bytes(model)))


def decoding(model: ModelConfig, devices: int, context: int, hardware: Hardware) -> list[Decoding]:
    """The bound by batch size, up to the largest that fits."""
    most = room(model, devices, context, hardware)
    ways = shards(model, devices)
    found = []
    for batch in sorted({size for size in (*BATCHES, most) if 1 <= size <= most}):
        # Of a group's tokens each selects K_e of N experts; an expert is read if any token did.
        missed = (1 - model.moe_topk_real / model.n_routed_experts) ** (batch * ways)
        touched = model.n_routed_experts / ways * (1 - missed)
        read = _dense_bytes(model) + touched * _expert_bytes(model)
        read += batch * context * cache_bytes(model)
        time = read / hardware.memory_rate
        dollars = hardware.dollars_per_hour / 3600 * time / batch * MILLION
        found.append(Decoding(batch, time, dollars))
    return found


def least_devices(model: ModelConfig, context: int, hardware: Hardware) -> int:
    """The smallest power of two that has room for the weights and one sequence each, or all that
    the experts can be divided by.
    """
    devices = 1
    while (
        room(model, devices, context, hardware) < 1 and model.n_routed_experts % (2 * devices) == 0
    ):
        devices *= 2
    return devices
