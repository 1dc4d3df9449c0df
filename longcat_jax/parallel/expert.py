"""Tokens travel to the devices that hold their experts, and the experts' sums travel back.

Only real experts are here: identity experts act where the token stands and cost no traffic
(arXiv 2509.01322, section 2.1.1). Back-ends, all of one result:

dense: XLA's partitioner decides; the oracle.
allgather: every device gets all tokens of its expert group, computes what its own experts give, and
  the sums are reduced and scattered back.
all_to_all: a token goes once to each device that has any of its experts, in a buffer of fixed size
  per pair of devices, and comes back as one sum per device.

Shapes are static. `dropless` has room for the worst case, every token on every device. Without it
buffers and rows have room for capacity_factor times what a balanced router that keeps to its budget
K_e asks for; selections beyond that are left out of the sums, and counted.

B batch, T tokens of a device or chunk, D model, X experts of a device, F expert width, K
selections, G devices of the expert axis, C places in a buffer, M = G * C tokens received.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from longcat_jax.config import MeshConfig, ModelConfig, ParallelConfig
from longcat_jax.model.experts import real_experts
from longcat_jax.sharding import (
    TOKENS,
    axis_size,
    gather_parts,
    gather_weight,
    on_shards,
    scatter_sum,
    several_devices,
    sum_over_tokens,
)
from pallas_kernels import gather_rows, gather_sum

AXIS = "expert"
LARGE = 16
"""Devices of the expert axis from which all_to_all is the default and dropless is not."""


@struct.dataclass
class Selected:
    """Tokens with their selections."""

    x_TD: jax.Array
    gates_TK: jax.Array
    experts_TK: jax.Array
    """Ids; those past the last real expert are nobody's."""


@struct.dataclass
class Weights:
    """Matrices of the real experts."""

    gate_up_XDF: jax.Array
    """Gate half first."""
    down_XFD: jax.Array


def _compute(tokens: Selected, weights: Weights, num_rows: int | None) -> tuple:
    """This device's experts on tokens of the whole group -> (sums [T, D], selections left out)."""
    num_experts = len(weights.down_XFD)
    first = lax.axis_index(AXIS) * num_experts if axis_size(AXIS) > 1 else 0
    own_TK = tokens.experts_TK - first
    own_TK = jnp.where((own_TK >= 0) & (own_TK < num_experts), own_TK, num_experts)
    out_TD = real_experts(
        tokens.x_TD,
        tokens.gates_TK,
        own_TK,
        weights.gate_up_XDF,
        weights.down_XFD,
        num_rows=num_rows,
    )
    wanted = (own_TK < num_experts).sum(dtype=jnp.int32)
    return out_TD, jnp.maximum(wanted - (own_TK.size if num_rows is None else num_rows), 0)


def _allgather(tokens: Selected, weights: Weights, capacity: int | None) -> tuple:
    """-> (sums of this device's tokens [T, D], selections left out here)."""
    everyone = jax.tree.map(lambda a: gather_parts(a, (AXIS,), dim=0), tokens)
    out, left_out = _compute(everyone, weights, capacity)
    return scatter_sum(out, (AXIS,), dim=0), left_out


def _exchange(buffers_M: jax.Array) -> jax.Array:
    """Buffer g of every device goes to device g; what is received stands in order of sender."""
    if axis_size(AXIS) == 1:
        return buffers_M
    return lax.all_to_all(buffers_M, AXIS, 0, 0, tiled=True)


def _places(experts_TK: jax.Array, num_experts: int, room: int) -> tuple[jax.Array, jax.Array]:
    """Where tokens stand in the buffers [G * room], first come first served.

    Returns:
      slots_TK: place of the token, at the first of its selections with a device; outside of the
        buffers for its other selections there and where there is no room.
      not sent: number of selections whose token found no room.
    """
    K, G = experts_TK.shape[1], axis_size(AXIS)
    target_TK = jnp.minimum(experts_TK // num_experts, G)  # G: an identity expert, at home
    same_TKK = target_TK[:, :, None] == target_TK[:, None, :]
    first_TK = ~(same_TKK & jnp.tri(K, k=-1, dtype=bool)[None]).any(-1)
    goes_TG = (target_TK[:, :, None] == jnp.arange(G)[None, None]).any(1)
    place_TG = jnp.cumsum(goes_TG, axis=0, dtype=jnp.int32) - 1
    place_TK = jnp.take_along_axis(place_TG, jnp.minimum(target_TK, G - 1), axis=1)
    travels_TK = target_TK < G
    fits_TK = travels_TK & (place_TK < room)
    slots_TK = jnp.where(first_TK & fits_TK, target_TK * room + place_TK, G * room)
    return slots_TK.astype(jnp.int32), (travels_TK & ~fits_TK).sum(dtype=jnp.int32)


def _all_to_all(tokens: Selected, weights: Weights, capacity: int | None) -> tuple:
    """-> (sums of this device's tokens [T, D], selections left out here)."""
    (T, K), num_experts, G = tokens.experts_TK.shape, len(weights.down_XFD), axis_size(AXIS)
    room = T if capacity is None else min(T, -(-capacity // G))
    slots_TK, not_sent = _places(tokens.experts_TK, num_experts, room)
    token_TK = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[:, None], (T, K))
    token_of_place_M = jnp.full(G * room, T, jnp.int32).at[slots_TK].set(token_TK, mode="drop")
    experts_TK = jnp.pad(tokens.experts_TK, ((0, 1), (0, 0)), constant_values=G * num_experts)
    received = Selected(
        _exchange(gather_rows(tokens.x_TD, token_of_place_M, slots_TK)),
        _exchange(gather_rows(tokens.gates_TK, token_of_place_M, slots_TK)),
        _exchange(experts_TK[token_of_place_M]),  # empty places select nobody
    )
    sums_MD, left_out = _compute(received, weights, capacity)
    return gather_sum(_exchange(sums_MD), token_of_place_M, slots_TK), left_out + not_sent


EXCHANGES = {"allgather": _allgather, "all_to_all": _all_to_all}


def capacity(num_tokens: int, config: ModelConfig, parallel: ParallelConfig) -> int:
    """Without dropless: rows that a device computes, and tokens that it sends in all, where
    `num_tokens` are its own.
    """
    return math.ceil(num_tokens * config.moe_topk_real * parallel.capacity_factor)


def chosen(parallel: ParallelConfig, devices: int) -> tuple[str, bool]:
    """Back-end, and whether it is dropless, on an expert axis of so many devices."""
    large, backend, dropless = devices >= LARGE, parallel.expert_backend, parallel.dropless
    if backend == "auto":
        backend = "all_to_all" if large else "allgather"
    return backend, not large if dropless is None else dropless


def described(parallel: ParallelConfig, mesh: MeshConfig) -> str:
    """How tokens reach experts on this mesh, in words."""
    backend, dropless = chosen(parallel, mesh.expert)
    if mesh.num_devices == 1 or backend == "dense":
        return "dense, dropless"
    return f"{backend}, " + ("dropless" if dropless else f"room for {parallel.capacity_factor:g}x")


def mixture(
    tokens: Selected, weights: Weights, *, config: ModelConfig, parallel: ParallelConfig
) -> tuple[jax.Array, jax.Array]:
    """sum_k gate_k * SwiGLU_k(x) over the selected real experts, on the mesh in force.

    Args:
      tokens: [B, T, ...] each, rows over the batch axes.
      weights: as parameters lie (sharding.RULES).
      config: K_e.
      parallel: how.

    Returns:
      sums [B, T, D] and the number of selections left out, over all devices.
    """
    backend, dropless = chosen(parallel, axis_size(AXIS))

    def flat(a_BTD: jax.Array) -> jax.Array:
        return a_BTD.reshape(-1, a_BTD.shape[-1])

    if backend == "dense" or not several_devices():
        arrays = jax.tree.map(flat, tokens)
        out_TD = real_experts(
            arrays.x_TD, arrays.gates_TK, arrays.experts_TK, weights.gate_up_XDF, weights.down_XFD
        )
        return out_TD.reshape(tokens.x_TD.shape), jnp.zeros((), jnp.int32)

    def on_device(tokens: Selected, weights: Weights) -> tuple[jax.Array, jax.Array]:
        shape, chunks = tokens.x_TD.shape, parallel.token_chunks
        whole = Weights(
            gather_weight(weights.gate_up_XDF, ("fsdp",), dim=1),
            gather_weight(weights.down_XFD, ("fsdp",), dim=2),
        )
        pieces = jax.tree.map(lambda a: jnp.split(flat(a), chunks), tokens)
        # A Python loop, so that a chunk's exchange can run beside another chunk's products.
        parts = []
        for x_TD, gates_TK, experts_TK in zip(
            pieces.x_TD, pieces.gates_TK, pieces.experts_TK, strict=True
        ):
            limit = None if dropless else capacity(len(x_TD), config, parallel)
            chunk = Selected(x_TD, gates_TK, experts_TK)
            parts.append(EXCHANGES[backend](chunk, whole, limit))
        out_TD = jnp.concatenate([out for out, _ in parts])
        if dropless:
            return out_TD.reshape(shape), jnp.zeros((), jnp.int32)
        left_out = sum(number for _, number in parts)
        return out_TD.reshape(shape), sum_over_tokens(left_out)

    specs = Weights(P("expert", "fsdp", None), P("expert", None, "fsdp"))
    return on_shards(on_device, (TOKENS, specs), (TOKENS, P()))(tokens, weights)
