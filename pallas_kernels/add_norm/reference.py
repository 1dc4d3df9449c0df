"""The operator in plain jnp."""

from typing import Any

import jax

from pallas_kernels.rms_norm.reference import rms_norm


def _one(base: Any, terms: Any, weight_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    total = base
    if terms is not None:
        sums = terms[..., : weight_D.shape[0]].sum(axis=0).astype(weight_D.dtype)
        total = sums if base is None else base + sums
    return rms_norm(total, weight_D, eps)


def add_norm(
    bases: tuple, terms: tuple, weights: tuple[jax.Array, ...], *, eps: float
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """(sum, its norm) of every triple."""
    triples = zip(bases, terms, weights, strict=True)
    return tuple(_one(*triple, eps) for triple in triples)
