"""What the operators share: checks, the accumulation dtype, the choice of implementation."""

import contextlib
import contextvars
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

HOPPER = (9, 0)  # compute capabilities
AMPERE = (8, 0)
AUTO = "auto"
KINDS = (AUTO, "reference")


RESULT = "kernel_result"
"""Name of what a kernel made and its gradient reads, for `jax.checkpoint_policies`."""


def named_result(x: jax.Array) -> jax.Array:
    """x, under the name that a policy keeps it by instead of running the kernel again."""
    return checkpoint_name(x, RESULT)


def accumulation_dtype(dtype: Any) -> jnp.dtype:
    """The dtype sums run in: at least float32, so float64 stays float64."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless the condition holds; for what a caller got wrong."""
    if not condition:
        raise ValueError(message)


def choose_dtype(operator: str, wanted: Any, allowed: Sequence[Any], why: str = "") -> jnp.dtype:
    """The dtype of a result, for None the first that is allowed; raises ValueError for another, and
    for what names none.
    """
    choices = {str(dtype): dtype for dtype in map(jnp.dtype, allowed)}
    if wanted is None:
        return next(iter(choices.values()))
    with contextlib.suppress(TypeError):
        wanted = jnp.dtype(wanted)
    names = " or ".join(choices)
    require(str(wanted) in choices, f"{operator}: out_dtype={wanted}{why}, choose {names}")
    return choices[str(wanted)]


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


def bounded(index: jax.Array, size: int) -> jax.Array:
    """The indices in int32, with `size` for those outside [0, size).

    Narrow ones are widened first, since `size` may not fit, and wide ones compared as they are,
    since they may come to lie inside when cut.
    """
    if index.dtype.itemsize < 4:
        index = index.astype(jnp.int32)
    return jnp.where((index >= 0) & (index < size), index, size).astype(jnp.int32)


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes of an enclosing shard_map over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The array, marked as varying over these axes too."""
    missing = tuple(sorted(axes - jax.typeof(array).manual_axis_type.varying))
    return lax.pcast(array, missing, to="varying") if missing else array


def zeros_varying(shape: tuple[int, ...], dtype: Any, *arrays: jax.Array) -> jax.Array:
    """Zeros, varying over the axes of these arrays."""
    return vary(jnp.zeros(shape, dtype), varying_axes(*arrays))


def vary_together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, all varying over the same axes.

    Under shard_map an array that is the same everywhere, such as a replicated weight, gets the sum
    of all devices' gradients through this: a custom_vjp by itself would not add them.
    """
    axes = varying_axes(*arrays)
    return tuple(vary(array, axes) for array in arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def inference_only(reason: str, run: Callable[..., Any], *operands: Any) -> Any:
    """run(*operands); ValueError(reason) for who wants a gradient."""
    del reason
    return run(*operands)


@inference_only.defjvp
def _refuse(reason: str, *_: Any) -> None:
    raise ValueError(reason)


class Implementation(NamedTuple):
    """One way to compute an operator.

    Attributes:
      run: the function.
      misfit: says of the operands what the function takes and what it got instead, in words that
        follow "implementation=... "; "" if they fit.
    """

    run: Callable[..., Any]
    misfit: Callable[..., str] = lambda *operands: ""


_made_for: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "made_for", default=None
)


@contextlib.contextmanager
def made_for(capability: tuple[int, int]) -> Iterator[None]:
    """Programs that are traced inside are for GPUs of this compute capability, whatever this
    machine has.
    """
    token = _made_for.set(capability)
    try:
        yield
    finally:
        _made_for.reset(token)


_kind: contextvars.ContextVar[str] = contextvars.ContextVar("kind", default=AUTO)


@contextlib.contextmanager
def kernels(kind: str) -> Iterator[None]:
    """Operators that are traced inside and name no implementation take that of this kind: AUTO, the
    best one for the machine, or "reference".
    """
    require(kind in KINDS, f"kernels({kind!r}): choose one of {', '.join(KINDS)}")
    token = _kind.set(kind)
    try:
        yield
    finally:
        _kind.reset(token)


def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of the GPU that programs are for: inside of `made_for` its own, else that of
    the one they run on by default; None without a GPU, (0, 0) for one that is not NVIDIA's.
    """
    if _made_for.get():
        return _made_for.get()
    if jax.default_backend() != "gpu":
        return None
    numbers = str(getattr(jax.local_devices()[0], "compute_capability", "")).split(".")
    if len(numbers) != 2 or not all(n.isdigit() for n in numbers):
        return 0, 0
    return int(numbers[0]), int(numbers[1])


def _missing(name: str) -> str:
    """What the machine lacks to run an implementation of this name, "" if nothing."""
    capability = compute_capability()
    found = "none" if capability is None else ".".join(map(str, capability))
    # Without any GPU Mosaic's kernels are lowered for other machines and interpreted.
    if name == "mosaic" and capability not in (None, HOPPER):
        return f"needs a GPU of compute capability 9.0 (Hopper), found {found}"
    if name == "triton" and (capability is None or capability < AMPERE):
        return f"needs an NVIDIA GPU of compute capability 8.0 or higher, found {found}"
    if name == "triton" and importlib.util.find_spec("jax_triton") is None:
        return "needs the package jax_triton: pip install 'longcat_jax[triton]'"
    return ""


def _preferred() -> str:
    """The kind of kernel that is made for the machine, unless `kernels` says otherwise."""
    if _kind.get() != AUTO:
        return _kind.get()
    capability = compute_capability()
    if capability == HOPPER:
        return "mosaic"
    return "triton" if capability is not None and AMPERE <= capability < HOPPER else "reference"


def choose(
    operator: str,
    implementation: str | None,
    available: Mapping[str, Implementation],
    *operands: Any,
) -> Callable[..., Any]:
    """The implementation called `implementation`, or for None the best one for the machine.

    That is "mosaic" on Hopper, "triton" on Ampere and Ada, if the operator has it and it takes the
    operands; else "reference". What was named, and what is made for the machine, is used or
    refused, never replaced.

    Raises:
      ValueError: the name is not in `available`, its function does not take the operands, or the
        machine lacks what it needs, be it a GPU or a package.
    """
    name = implementation
    if name is None:
        name = _preferred()
        made_for_it = available.get(name)
        if not made_for_it or made_for_it.misfit(*operands):
            name = "reference"
    require(
        name in available,
        f"{operator}: implementation={name!r} is not available, choose None or one of "
        f"{', '.join(map(repr, available))}",
    )
    for problem in (_missing(name), available[name].misfit(*operands)):
        alternative = "'reference'" if implementation is None else "None or 'reference'"
        require(
            not problem,
            f'{operator}: implementation="{name}" {problem}; choose {alternative}',
        )
    return available[name].run
