"""Bytes on each device: arguments exactly, temporaries by formula.

Arguments are what the compiled step is called with (`memory_analysis().argument_size_in_bytes`).
Temporaries are sums of gradients, and the largest of what stands together while the loss, a block's
backward pass and the embedding's gradient run, one after the other.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from longcat_jax.config import (
    MESH_AXES,
    Config,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ProxyConfig,
    TrainConfig,
)
from longcat_jax.plan.job import Job
from longcat_jax.sharding import batch_sharding
from longcat_jax.train_step import abstract_state
from pallas_kernels.flash_mla import schedule

BATCH = ("tokens", "segment_ids", "positions")


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh without devices."""
    sizes = tuple(getattr(config, name) for name in MESH_AXES)
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def _batch(config: Config, mesh: Any) -> tuple:
    train = config.train
    shape, sharding = (train.global_batch, train.sequence_length + 1), batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, "int32", sharding=sharding) for name in BATCH}
    return batch, jax.ShapeDtypeStruct((config.model.vocab_size,), "int32")


def abstract_arguments(config: Config, mesh: Any) -> tuple:
    """What a train step is called with, as shapes with shardings; the last is the same array
    everywhere.
    """
    return abstract_state(config, mesh), *_batch(config, mesh)


@functools.lru_cache(maxsize=1024)
def _state_bytes(
    model: ModelConfig, optim: OptimConfig, proxy: ProxyConfig, mesh: MeshConfig
) -> tuple[int, int, int]:
    """Bytes on a device of the weights, of the optimizer's state with the step's number, and of the
    copies of weights.
    """
    rows = TrainConfig(steps=1, global_batch=mesh.batch_shards, sequence_length=4 * mesh.context)
    config = Config(model=model, train=rows, optim=optim, mesh=mesh, proxy=proxy)
    state = abstract_state(config, abstract_mesh(mesh))
    kept = state.params, (state.opt_state, state.step), state.copies
    weights, optimizer, copies = map(bytes_per_device, kept)
    return weights, optimizer, copies


def bytes_per_device(abstract: Any) -> int:
    """Bytes that the fullest device holds of a tree of abstract arrays; those without a sharding
    are whole.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)
        * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    weights: int
    optimizer: int
    copies: int
    """Blocks' weights in the dtype that they are computed in, where that is another one."""
    batch: int
    """Tokens, their places, and the table of the tokens' bytes."""
    sums: int
    """Gradients over micro-batches, where there are several."""
    gradients: int
    """One micro-batch's, in the dtype that they are computed in."""
    kept: int
    """Activations between the forward and the backward pass."""
    block: int
    """While a block's backward pass runs: what it makes again, gathered weights, gradients."""
    loss: int
    """While logits are there: a chunk of them, and of the unembedding with its gradient."""
    embedding: int
    """While a lookup table is gathered, or its gradient whole."""
    in_loop: bool
    """Whether a loop over layers has room for all gradients before the first is there; else they
    take the room of kept activations.
    """

    @property
    def arguments(self) -> int:
        """What the step is called with."""
        return self.weights + self.optimizer + self.copies + self.batch

    @property
    def temporaries(self) -> int:
        """What the step needs besides."""
        both = self.kept + self.gradients if self.in_loop else max(self.kept, self.gradients)
        moments = self.kept + self.loss, both + self.block, self.gradients + self.embedding
        return self.sums + max(moments)

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.temporaries


def memory(job: Job) -> Memory:
    """Bytes of the fullest device."""
    config = job.config
    weights, optimizer, copies = _state_bytes(config.model, config.optim, config.proxy, config.mesh)
    in_loop = config.loops_over_layers
    # Gradients of activations take the place of activations that they have used up.
    values, weights_twice = _block_values(job), 2 * _gathered_block(job)
    if config.train.remat == "none":
        kept = values + (0 if job.gathers_again else _gathered_by_hand(job))
        again = 0
    else:
        kept = _kept_values(job)
        # A loop takes what is kept out of its stacks.
        there = 0 if in_loop or config.train.remat == "full" else kept
        again = max(values - there, 0)
    return Memory(
        weights=weights,
        optimizer=optimizer,
        copies=copies,
        batch=bytes_per_device(_batch(config, abstract_mesh(config.mesh))),
        sums=weights if job.micro_batches > 1 else 0,
        gradients=weights * job.itemsize // job.wide,
        kept=job.model.num_layers * kept * job.itemsize,
        block=again * job.itemsize + weights_twice + _attention_scratch(job),
        loss=_loss(job),
        embedding=_embedding(job),
        in_loop=in_loop,
    )


def _key_values(model: ModelConfig) -> int:
    """Values of a token's keys and values in one attention, all heads."""
    return model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim)


def _attention_values(model: ModelConfig) -> tuple[int, int]:
    """Values of a token in one attention: kept selectively, and all that its gradients read."""
    m = model
    heads, value = m.num_attention_heads, m.num_attention_heads * m.v_head_dim
    lse = 2 * heads  # float32
    kept = m.q_lora_rank + heads * m.qk_head_dim + m.latent_dim + value + lse
    low = m.q_lora_rank + m.latent_dim
    return kept, kept + m.hidden_size + low + _key_values(m)


def _attention_scratch(job: Job) -> int:
    """What the gradient of one attention needs besides its results: dS of some heads, and float32
    gradients to the shared part of the keys from each of them.
    """
    m, context, length = job.model, job.mesh.context, job.config.train.sequence_length
    if job.itemsize != 2:
        return 0  # the Mosaic kernels take 16 bits
    queries = length if context == 1 else length // (2 * context)
    rows = job.tokens * context // length
    tiles = rows * schedule.num_tiles(queries, length, None if context == 1 else 0)
    heads = schedule.heads_at_a_time(m.num_attention_heads, tiles)
    return heads * (tiles * schedule.TILE_BYTES + rows * length * m.qk_rope_head_dim * job.wide)


def _kept_values(job: Job) -> int:
    """Values that a micro-batch leaves between the passes in one block on one device."""
    m = job.model
    if job.config.train.remat == "full":
        return job.tokens * m.hidden_size
    router = 2 * m.num_router_outputs  # float32
    token = 4 * m.hidden_size + 2 * _attention_values(m)[0] + 4 * m.ffn_hidden_size + router
    kept = job.tokens * token + job.rows * 2 * m.expert_ffn_hidden_size
    if job.config.train.remat == "selective":
        return kept
    # Every device of the context axis makes the keys and values of whole rows.
    keys = job.tokens * job.mesh.context * 2 * _key_values(m)
    return kept + keys + job.rows * m.expert_ffn_hidden_size


def _mixture_values(job: Job) -> int:
    """Values of a micro-batch between dispatch and combine on one device."""
    m = job.model
    rows = job.rows * (m.hidden_size + 4 * m.expert_ffn_hidden_size)
    return rows + 2 * job.received * m.hidden_size


def _dense_values(job: Job) -> int:
    """Values of a micro-batch on the dense path that gradients read."""
    m = job.model
    ffn = 3 * m.ffn_hidden_size + m.hidden_size
    router = 2 * 2 * m.num_router_outputs  # p and logits, float32
    return job.tokens * (4 * m.hidden_size + 2 * (_attention_values(m)[1] + ffn) + router)


def _block_values(job: Job) -> int:
    return _dense_values(job) + _mixture_values(job)


def _gathered_by_hand(job: Job) -> int:
    """Values of one block's experts and up-projections on a device, whole."""
    layers = job.model.num_layers
    experts = job.part("experts").values // layers // job.mesh.expert
    return experts + job.part("keys and values").values // layers


def _gathered_block(job: Job) -> int:
    """One block's weights as products read them, in the compute dtype; 0 where they lie like that
    anyway.
    """
    dense = job.part("dense")
    if dense.here(job.mesh) == dense.values:
        return 0
    values = (dense.values + job.part("router").values) // job.model.num_layers
    return (values + _gathered_by_hand(job)) * job.itemsize


def _loss(job: Job) -> int:
    chunk = min(job.config.train.vocab_chunk, job.model.vocab_size)
    whole = chunk == job.model.vocab_size
    logits = job.tokens * chunk * ((1 if whole else 2) * job.wide + job.itemsize)
    if whole and job.part("MTP layer").values:
        logits += job.tokens * chunk * job.wide  # those of both predictions are kept
    weights = job.model.hidden_size * chunk * (job.wide + job.itemsize)
    hidden = job.tokens * job.model.hidden_size * (2 * job.wide + job.itemsize)
    return logits + weights + hidden


def _embedding(job: Job) -> int:
    table = job.part("embedding").values
    return table * (job.wide + job.itemsize) if job.mesh.num_devices > 1 else table * job.wide
