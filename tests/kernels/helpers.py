"""What the kernel tests share."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _common

ROOT = Path(__file__).parents[2]
# Dtypes of indices, a number of rows, an index outside: what fits one need not fit the other.
INDEX_DTYPES = (
    ("uint8", 200, 255),
    ("uint8", 300, None),
    ("int8", 300, -1),
    ("uint16", 70000, None),
    ("int16", 40000, -2),
    ("uint32", 300, 2**32 - 1),
    ("int64", 300, 2**32 + 5),
    ("uint64", 300, 2**64 - 2),
)


def values_of_many_magnitudes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal numbers times powers of two, 24 binary orders.

    Sums of plain normal numbers are often exact in float32: every order gives the same bits.
    """
    return rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)


def paged(
    rng: np.random.Generator, cache_BSU: Any, lengths: Sequence[int], page: int
) -> tuple[jax.Array, jax.Array]:
    """The cache in pages in random order, and the block table, wild where the row has ended."""
    batch, entries, width = cache_BSU.shape
    pages = cache_BSU.reshape(batch * entries // page, page, width)
    order = rng.permutation(len(pages))
    tables = np.argsort(order).reshape(batch, -1)
    ended = np.arange(0, entries, page)[None] >= np.asarray(lengths)[:, None]
    return pages[order], jnp.asarray(np.where(ended, -(10**6), tables), jnp.int32)


def relative_error(actual: Any, expected: Any) -> float:
    """Norm of the difference over the norm of the expected array, in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-300))


def same_bits(first: Any, second: Any) -> bool:
    """Whether all leaves are equal, byte by byte."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for leaf in jax.tree.leaves(parameter, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(leaf, "jaxpr", leaf)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def errors_of(result: dict[str, Any]) -> dict[str, Any]:
    """What a case of tests/kernels/interpreted.py returned, without what is said of its run."""
    return {k: v for k, v in result.items() if k not in ("case", "seconds", "launches", "races")}


def require_hopper() -> None:
    """Skips the test where there is no GPU that Mosaic's kernels run on."""
    if _common.compute_capability() != _common.HOPPER:
        pytest.skip("needs a GPU of compute capability 9.0")


def compiled_float_scatters(text: str) -> list[str]:
    """Every scatter of floating-point numbers in the text of a compiled program."""
    return [line for line in text.splitlines() if " scatter(" in line and "= s32" not in line]


def float_scatters(function: Callable[..., Any], *args: Any) -> list[str]:
    """Every scatter of floating-point numbers in the traced and in the compiled function."""
    traced = jax.jit(function).trace(*args)
    found = [
        str(equation.primitive)
        for equation in _equations(traced.jaxpr.jaxpr)
        if equation.primitive.name.startswith("scatter")
        and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
    ]
    return found + compiled_float_scatters(traced.lower().compile().as_text())


@contextlib.contextmanager
def strict_types() -> Iterator[None]:
    """float64 enabled, no implicit promotion of dtypes or ranks."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield


def interpret(*cases: str) -> dict[str, dict[str, Any]]:
    """Results of tests/kernels/interpreted.py by case."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted", *cases],
        cwd=ROOT,
        env=os.environ
        | {"NPROC": "16", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {result["case"]: result for result in results}
