"""A job's sizes on one device: parts of the model, tokens, rows of experts.

A part is a group of parameters that are cut, gathered and computed with alike.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from longcat_jax.config import MESH_AXES, Config, ConfigError, MeshConfig, ModelConfig
from longcat_jax.model.longcat import abstract
from longcat_jax.parallel.expert import capacity, chosen
from longcat_jax.parameters import Box, is_box
from longcat_jax.sharding import RULES

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """A group of parameters."""

    name: str
    values: int
    """Of the whole model."""
    cut: Axes
    """Mesh axes that cut it."""
    small: int
    """Values of it that nothing cuts: norms, biases."""

    def here(self, mesh: MeshConfig) -> int:
        """Values on each device."""
        return (self.values - self.small) // ways(mesh, self.cut) + self.small


def ways(mesh: MeshConfig, axes: Axes) -> int:
    """Product of the sizes of these axes."""
    return math.prod(getattr(mesh, axis) for axis in axes)


def _part_name(path: tuple[str, ...]) -> str:
    if path[0] == "layers":
        named = [name for name in ("experts", "router", "kv_b_proj") if name in path]
        return {"kv_b_proj": "keys and values"}.get(named[0], named[0]) if named else "dense"
    if path[-1] == "embed_tokens":
        return "MTP embedding" if path[0] == "mtp" else "embedding"
    return {"lm_head": "head", "mtp": "MTP layer"}.get(path[0], "dense")


def _axes(box: Box) -> Axes:
    """Mesh axes that cut a parameter."""
    found = [RULES[name] for name in box.axes]
    flat = [axis for one in found if one for axis in ((one,) if isinstance(one, str) else one)]
    return tuple(axis for axis in MESH_AXES if axis in flat)


@functools.lru_cache(maxsize=8)
def parts(model: ModelConfig) -> dict[str, Part]:
    """The model's parts by name; nothing is allocated."""
    values: dict[str, int] = {}
    small: dict[str, int] = {}
    cut: dict[str, Axes] = {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract(model), is_leaf=is_box)
    for keys, box in leaves:
        name = _part_name(tuple(key.key for key in keys))
        size, axes = math.prod(box.value.shape), _axes(box)
        values[name] = values.get(name, 0) + size
        if axes in ((), ("pipeline",)):
            small[name] = small.get(name, 0) + size
        else:
            cut[name] = axes
    return {
        name: Part(name, size, cut.get(name, ()), small.get(name, 0))
        for name, size in values.items()
    }


@dataclasses.dataclass(frozen=True)
class Job:
    """A configuration with the numbers that formulas need.

    Raises:
      ConfigError: experts on several devices, and their exchange left to XLA's partitioner.
    """

    config: Config

    def __post_init__(self) -> None:
        if self.mesh.expert > 1 and self.backend == "dense":
            raise ConfigError(
                "parallel.expert_backend='dense': must be auto, allgather or all_to_all where "
                "mesh.expert > 1; what XLA's partitioner sends is not planned"
            )

    @property
    def model(self) -> ModelConfig:
        """Its architecture."""
        return self.config.model

    @property
    def mesh(self) -> MeshConfig:
        """Its devices."""
        return self.config.mesh

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return jnp.dtype(self.model.dtype).itemsize

    @property
    def wide(self) -> int:
        """Bytes of a master weight, a gradient, a logit: at least float32's."""
        return jnp.promote_types(self.model.dtype, jnp.float32).itemsize

    @property
    def gathers_again(self) -> bool:
        """Whether weights that are gathered by hand are so once more for the backward pass
        (model/remat.py).
        """
        return self.config.train.remat != "none" or self.mesh.fsdp > 1

    @property
    def micro_batches(self) -> int:
        """Per optimizer step."""
        return self.config.train.accumulate

    @property
    def rows_per_device(self) -> int:
        """Sequences of one micro-batch that a device has, each whole or the context axis' share of
        it.
        """
        return self.config.train.global_batch // (self.micro_batches * self.mesh.batch_shards)

    @property
    def tokens(self) -> int:
        """Of one micro-batch on one device."""
        return self.rows_per_device * self.config.train.sequence_length // self.mesh.context

    @property
    def parts(self) -> dict[str, Part]:
        """The model's parts by name."""
        return parts(self.model)

    def part(self, name: str) -> Part:
        """One of `parts`; an empty one where the model has none of that name."""
        return self.parts.get(name, Part(name, 0, (), 0))

    @property
    def backend(self) -> str:
        """How tokens reach experts; `one` where all experts are on the device itself."""
        if self.mesh.num_devices == 1:
            return "one"
        return chosen(self.config.parallel, self.mesh.expert)[0]

    def with_backend(self, backend: str) -> "Job":
        """The job with its tokens sent that way."""
        parallel = dataclasses.replace(self.config.parallel, expert_backend=backend)
        return Job(dataclasses.replace(self.config, parallel=parallel))

    @property
    def dropless(self) -> bool:
        """Whether there is room for the worst case."""
        return self.backend == "one" or chosen(self.config.parallel, self.mesh.expert)[1]

    @property
    def received(self) -> int:
        """Tokens of a micro-batch that stand on a device for its experts, room for them counted."""
        if self.backend != "all_to_all":
            return self.tokens * self.mesh.expert
        chunks, experts = self.config.parallel.token_chunks, self.mesh.expert
        one = self.tokens // chunks
        limit = one if self.dropless else -(-self._capacity(one) // experts)
        return chunks * experts * min(one, limit)

    @property
    def rows(self) -> int:
        """Rows of the experts' products on a device, room for them counted."""
        experts = self.model.n_routed_experts // self.mesh.expert
        most = self.received * min(self.model.moe_topk, experts)
        chunks = self.config.parallel.token_chunks
        limit = chunks * self._capacity(self.tokens // chunks)
        return most if self.dropless else min(most, limit)

    def _capacity(self, tokens: int) -> int:
        return capacity(tokens, self.model, self.config.parallel)
