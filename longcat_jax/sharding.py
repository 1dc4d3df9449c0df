"""The mesh, and the one table from a parameter's logical axes to mesh axes.

Axes in order: data, fsdp, pipeline, context, expert (expert innermost: neighbours on NVLink). Axes
of size 1 stay, so specs never depend on the mesh. Dense parts run in Auto mode: XLA places the
collectives, constraints stand at block boundaries (`constrain_activations`). Kernels are opaque to
XLA, which would run them whole on every device: a function that calls one goes through `on_shards`.
Adding a logical axis: one line in RULES.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
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
TOKEN_AXES = (*BATCH_AXES, "context")
TOKENS = P(BATCH_AXES, "context")
"""[B, T, ...] arrays: rows over the batch axes, the sequence over context."""


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
    return lax.with_sharding_constraint(x_BTD, TOKENS)


def axis_size(axis: str) -> int:
    """Devices along a mesh axis; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def several_devices() -> bool:
    """Whether the mesh in force has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def whole_implementation() -> str | None:
    """What operators are asked for that see whole arrays, outside of `on_shards`: XLA can't cut a
    kernel's rows.
    """
    return "reference" if several_devices() else None


def without_mesh() -> Any:
    """Context manager in which functions are traced as for one device."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def on_shards(function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    """`function`, run on every device's part of its arguments (shard_map, types checked).

    Without a mesh of several devices it is the function itself, on whole arrays, and the
    collectives of this module do nothing in it. Axes of one device are left out of the specs, else
    gradients would be summed over them.
    """
    if not several_devices():
        return function

    def cut(spec: P) -> P:
        parts = (names if isinstance(names, tuple) else (names,) for names in spec)
        return P(*(tuple(name for name in part if axis_size(name) > 1) for part in parts))

    specs = jax.tree.map(cut, (in_specs, out_specs))
    return jax.shard_map(function, in_specs=specs[0], out_specs=specs[1])


def _inside_shards() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _cutting(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the axes that have several devices, inside of `on_shards`."""
    return tuple(axis for axis in axes if axis_size(axis) > 1) if _inside_shards() else ()


def num_parts(axes: tuple[str, ...]) -> int:
    """Into how many parts mesh `axes` cut an array; 1 outside of `on_shards`."""
    return math.prod(axis_size(axis) for axis in _cutting(axes))


def vary_with_tokens(x: jax.Array) -> jax.Array:
    """`x` as one that differs between devices as tokens do; inside of `on_shards`.

    A weight that every device has gets the sum of all their gradients through this, a loop's start
    the type of its steps.
    """
    here = jax.typeof(x).manual_axis_type.varying
    missing = tuple(axis for axis in _cutting(TOKEN_AXES) if axis not in here)
    return lax.pcast(x, missing, to="varying") if missing else x


def gather_parts(part: jax.Array, axes: tuple[str, ...], *, dim: int) -> jax.Array:
    """The whole array of its parts along mesh `axes`, inside of `on_shards`."""
    cutting = _cutting(axes)
    return lax.all_gather(part, cutting, axis=dim, tiled=True) if cutting else part


def scatter_sum(whole: jax.Array, axes: tuple[str, ...], *, dim: int) -> jax.Array:
    """This device's part of the sum over mesh `axes`: the transpose of `gather_parts`."""
    cutting = _cutting(axes)
    if not cutting:
        return whole
    return lax.psum_scatter(whole, cutting, scatter_dimension=dim, tiled=True)


def sum_over_tokens(x: jax.Array) -> jax.Array:
    """The sum over all devices that tokens are cut over; inside of `on_shards`."""
    return lax.psum(x, _cutting(TOKEN_AXES))


def gather_weight(part: jax.Array, axes: tuple[str, ...], *, dim: int) -> jax.Array:
    """The whole weight of its parts, inside of `on_shards`.

    Its gradient is summed over all devices' tokens: scattered back in the same parts first, then
    reduced over the axes that don't cut it.
    """
    return gather_parts(vary_with_tokens(part), axes, dim=dim)
