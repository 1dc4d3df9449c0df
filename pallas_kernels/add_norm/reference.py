"""The operator in plain jnp."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._common import accumulation_dtype


def _one(base: Any, terms: Any, weight_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    dtype, total = weight_D.dtype, base
    if terms is not None:
        sums = terms[..., : weight_D.shape[0]].sum(axis=0).astype(dtype)
        total = sums if base is None else base + sums
    wide = total.astype(accumulation_dtype(dtype))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, (wide * scale).astype(dtype) * weight_D[None]


def add_norm(
    bases: tuple, terms: tuple, weights: tuple[jax.Array, ...], *, eps: float
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """(sum, its norm) of every triple."""
    triples = zip(bases, terms, weights, strict=True)
    return tuple(_one(*triple, eps) for triple in triples)
