"""Sums of a product's parts and a residual stream, and their RMSNorm, in one launch.

M rows; S terms; D columns, N at least D.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _common
from pallas_kernels.add_norm import reference

_MOSAIC_DTYPES = (jnp.bfloat16, jnp.float16)
_MOSAIC_MULTIPLE = 128  # columns: threads that share a row


class Rows(NamedTuple):
    """base + sum of terms; without either, the other."""

    weight_D: jax.Array
    """Of the norm. Results have its dtype."""
    base_MD: jax.Array | None = None
    """In that dtype, too."""
    terms_SMN: jax.Array | None = None
    """Of which the first D columns are summed, and rounded before they meet the base."""


def _mosaic(*operands: tuple, eps: float) -> tuple:
    from pallas_kernels.add_norm import mosaic  # Pallas is only imported where it is used

    reason = "add_norm: only implementation='reference' has a gradient"
    return _common.inference_only(reason, functools.partial(mosaic.add_norm, eps=eps), *operands)


def _misfit(bases: tuple, terms: tuple, weights: tuple[jax.Array, ...]) -> str:
    dtypes, widths = [w_D.dtype for w_D in weights], [w_D.shape[0] for w_D in weights]
    (*_, rows, _) = jax.tree.leaves((bases, terms))[0].shape
    fits = all(t in _MOSAIC_DTYPES for t in dtypes) and rows > 0
    if fits and all(n > 0 and n % _MOSAIC_MULTIPLE == 0 for n in widths):
        return ""
    return (
        f"takes bfloat16 or float16, at least one row, and positive multiples of "
        f"{_MOSAIC_MULTIPLE} columns, got {', '.join(map(str, dtypes))}, {rows} and {widths}"
    )


_IMPLEMENTATIONS = {
    "reference": _common.Implementation(reference.add_norm),
    "mosaic": _common.Implementation(_mosaic, _misfit),
}


def add_norm(
    *several: Rows, eps: float, implementation: str | None = None
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """x = base + sum of terms, and x / rms(x) * weight; statistics in float32 at least.

    Args:
      *several: as many rows each, of widths of their own.
      eps: added to the mean square.
      implementation: "reference"; "mosaic" for Hopper, 16-bit dtypes and widths that are multiples
        of 128, which has no gradient; None for "mosaic" where it runs and "reference" elsewhere.

    Returns:
      (x [M, D], its norm [M, D]) of each.

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "add_norm"
    _common.require(bool(several), f"{name}: no rows given")
    counts = set()
    for weight_D, base_MD, terms_SMN in several:
        _common.require_rank(name, 1, weight_D=weight_D)
        _common.require_float(name, weight_D=weight_D)
        (D,) = weight_D.shape
        if base_MD is not None:
            _common.require_rank(name, 2, base_MD=base_MD)
            _common.require_float(name, weight_D=weight_D, base_MD=base_MD)
            fits = base_MD.shape[1] == D
            _common.require(fits, f"{name}: {D} weights, base_MD has shape {base_MD.shape}")
            counts.add(base_MD.shape[0])
        if terms_SMN is not None:
            _common.require_rank(name, 3, terms_SMN=terms_SMN)
            _common.require_float(name, terms_SMN=terms_SMN)
            fits = terms_SMN.shape[0] > 0 and terms_SMN.shape[2] >= D
            _common.require(fits, f"{name}: {D} weights, terms_SMN has shape {terms_SMN.shape}")
            counts.add(terms_SMN.shape[1])
    _common.require(len(counts) == 1, f"{name}: numbers of rows are {sorted(counts)}")
    weights, bases, terms = zip(*several, strict=True)
    run = _common.choose(name, implementation, _IMPLEMENTATIONS, bases, terms, weights)
    return run(bases, terms, weights, eps=eps)
