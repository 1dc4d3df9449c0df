"""RMSNorm. B batch, T tokens, S terms, D the normalised dim."""

import jax
import jax.numpy as jnp

import pallas_kernels
from longcat_jax.sharding import several_devices
from pallas_kernels.add_norm import Rows


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last dim; statistics in at least float32, weight after the
    downcast (as HF).
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # Not kept: a scale that nothing else reads lets XLA norm rows in one pass on a GPU.
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    weight = jnp.expand_dims(weight_D.astype(x.dtype), range(x.ndim - 1))
    return (wide * scale).astype(x.dtype) * weight


def add_norm(*several: Rows, eps: float) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """(base + sum of terms, its RMSNorm) of each, in one launch of a decoding step.

    Args:
      *several: with bases [B, T, D] and terms [S, B, T, N] in place of rows.
      eps: of `rms_norm`.
    """
    base, terms = several[0].base_MD, several[0].terms_SMN
    lead = (terms[0] if base is None else base).shape[:-1]

    def flat(rows: Rows) -> Rows:
        weight, base, terms = rows
        base = None if base is None else base.reshape(-1, base.shape[-1])
        terms = None if terms is None else terms.reshape(len(terms), -1, terms.shape[-1])
        return Rows(weight, base, terms)

    plain = "reference" if several_devices() else None  # XLA can't cut a kernel's rows
    results = pallas_kernels.add_norm(*map(flat, several), eps=eps, implementation=plain)
    return jax.tree.map(lambda x_MD: x_MD.reshape(*lead, x_MD.shape[1]), results)
