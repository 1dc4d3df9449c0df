"""The mesh, and the one table from a parameter's logical axes to mesh axes.

Axes in order: data, fsdp, pipeline, context, expert (expert innermost: neighbours on NVLink). Axes
of size 1 stay, so specs never depend on the mesh. Everything runs in Auto mode: XLA places the
collectives, constraints stand at block boundaries (`constrain_activations`). Adding a logical axis:
one line in RULES.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longcat_jax.config import MESH_AXES, ConfigError, MeshConfig
from longcat_jax.parameters import Box, is_box

DENSE = ("fsdp", "expert")
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    "layer": "pipeline",
    "embed": DENSE,  # D as a matrix' fan-in or fan-out
    "q_rank": DENSE,
    "kv_rank": DENSE,
    "vocab": DENSE,  # of lookup tables: cut over D they'd be rematerialised whole
    "expert": "expert",
    "expert_embed": "fsdp",  # D of an expert's matrices, whose expert dim has taken the expert axis
}
BATCH_AXES = ("data", "fsdp", "expert")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh of `config.num_devices` devices, the first ones of `devices` (default: all).

    Raises:
      ConfigError: fewer devices than the mesh needs.
    """
    devices = jax.devices() if devices is None else devices
    if config.num_devices > len(devices):
        sizes = " * ".join(f"{name}={getattr(config, name)}" for name in MESH_AXES)
        raise ConfigError(
            f"mesh: {sizes} needs {config.num_devices} devices, {len(devices)} are here"
        )
    shape = tuple(getattr(config, name) for name in MESH_AXES)
    grid = np.asarray(devices[: config.num_devices]).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def partition_specs(boxed: Any) -> Any:
    """Tree of PartitionSpecs from a (possibly abstract) tree of boxes."""

    def one(box: Box) -> P:
        return P(*(RULES[name] for name in box.axes))

    return jax.tree.map(one, boxed, is_leaf=is_box)


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Tree of NamedShardings from a (possibly abstract) tree of boxes."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(boxed))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of [B, ...] arrays of tokens."""
    return NamedSharding(mesh, P(BATCH_AXES))


def constrain_activations(x_BTD: jax.Array) -> jax.Array:
    """Pins batch and sequence dims of an activation to their mesh axes; nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x_BTD
    return jax.lax.with_sharding_constraint(x_BTD, P(BATCH_AXES, "context"))
