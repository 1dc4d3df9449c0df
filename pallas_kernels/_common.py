"""What the operators share: checks, the accumulation dtype, the choice of implementation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulation_dtype(dtype: Any) -> jnp.dtype:
    """The dtype sums run in: at least float32, so float64 stays float64."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless the condition holds; for what a caller got wrong."""
    if not condition:
        raise ValueError(message)


def require_rank(operator: str, rank: int, **arrays: jax.Array) -> None:
    """Raises ValueError if one of the named arrays has another number of dimensions."""
    for name, array in arrays.items():
        require(
            array.ndim == rank,
            f"{operator}: {name} has shape {array.shape}, expected {rank} dimensions",
        )


def require_float(operator: str, **arrays: jax.Array) -> None:
    """Raises ValueError unless the named arrays are floating point and of one dtype."""
    dtypes = {name: array.dtype for name, array in arrays.items()}
    for name, dtype in dtypes.items():
        require(
            jnp.issubdtype(dtype, jnp.floating),
            f"{operator}: {name} is {dtype}, expected a floating dtype",
        )
    require(
        len(set(dtypes.values())) == 1,
        f"{operator}: dtypes differ: {', '.join(f'{n} {d}' for n, d in dtypes.items())}",
    )


def require_integer(operator: str, **arrays: jax.Array) -> None:
    """Raises ValueError unless the named arrays hold integers."""
    for name, array in arrays.items():
        require(
            jnp.issubdtype(array.dtype, jnp.integer),
            f"{operator}: {name} is {array.dtype}, expected an integer dtype",
        )


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes of an enclosing shard_map over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The array, marked as varying over these axes too."""
    missing = tuple(sorted(axes - jax.typeof(array).manual_axis_type.varying))
    return lax.pcast(array, missing, to="varying") if missing else array


def vary_together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, all varying over the same axes.

    Under shard_map an array that is the same everywhere, such as a replicated weight, gets the sum
    of all devices' gradients through this: a custom_vjp by itself would not add them.
    """
    axes = varying_axes(*arrays)
    return tuple(vary(array, axes) for array in arrays)


def on_hopper() -> bool:
    """Whether the default backend is a GPU with Hopper's instructions (compute capability 9.0)."""
    if jax.default_backend() != "gpu":
        return False
    return getattr(jax.local_devices()[0], "compute_capability", "") == "9.0"


def require_hopper(operator: str) -> None:
    """Raises ValueError if programs run on a GPU that Mosaic's kernels can't run on.

    Without any GPU it passes: kernels are lowered for other machines and interpreted there.
    """
    require(
        jax.default_backend() != "gpu" or on_hopper(),
        f'{operator}: implementation="mosaic" needs a GPU of compute capability 9.0 (Hopper), this '
        "is another one; choose None or 'reference'",
    )


def select(
    operator: str,
    implementation: str | None,
    available: Mapping[str, Callable[..., Any]],
    *,
    best: str = "reference",
) -> Callable[..., Any]:
    """The implementation called `implementation`, or the one called `best` for None.

    Raises ValueError for a name that is not in `available`.
    """
    name = best if implementation is None else implementation
    require(
        name in available,
        f"{operator}: implementation={name!r} is not available, choose None or one of "
        f"{', '.join(map(repr, available))}",
    )
    return available[name]
