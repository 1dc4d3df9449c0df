"""RMSNorm. B batch, T tokens, S terms, D the normalised dim."""

import jax
from jax.sharding import PartitionSpec as P

import pallas_kernels
from longcat_jax.sharding import TOKENS, on_shards, whole_implementation
from pallas_kernels.add_norm import Rows
from pallas_kernels.rms_norm import reference


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last dim, by XLA; statistics in at least float32."""
    return reference.rms_norm(x, weight_D, eps)[1]


def add_residual(x_BTD: jax.Array, out_BTD: jax.Array) -> jax.Array:
    """x + out, summed as rows.

    On a GPU a product is added to the stream where it is written. If both are rows, as the product
    is to XLA, the sum is written beside the stream, which is read again; of sums in more dimensions
    XLA makes a copy of the stream first, for the sum to be written over.
    """

    def on_device(x_BTD: jax.Array, out_BTD: jax.Array) -> jax.Array:
        x_RD, out_RD = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, out_BTD))
        return (x_RD + out_RD).reshape(x_BTD.shape)

    return on_shards(on_device, (TOKENS, TOKENS), TOKENS)(x_BTD, out_BTD)


def norm_residual(x_BTD: jax.Array, weight_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The residual stream as it goes on, and its `rms_norm`: on Hopper the gradients of both are
    added in one pass.
    """

    def on_device(x_BTD: jax.Array, weight_D: jax.Array) -> tuple[jax.Array, jax.Array]:
        passed_RD, normed_RD = pallas_kernels.rms_norm(
            x_BTD.reshape(-1, x_BTD.shape[-1]), weight_D, eps
        )
        return passed_RD.reshape(x_BTD.shape), normed_RD.reshape(x_BTD.shape)

    return on_shards(on_device, (TOKENS, P()), (TOKENS, TOKENS))(x_BTD, weight_D)


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

    results = pallas_kernels.add_norm(
        *map(flat, several), eps=eps, implementation=whole_implementation()
    )
    return jax.tree.map(lambda x_MD: x_MD.reshape(*lead, x_MD.shape[1]), results)
