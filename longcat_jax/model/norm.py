"""RMSNorm. B batch, T tokens, D the normalised dim."""

import jax
from jax.sharding import PartitionSpec as P

from longcat_jax.sharding import TOKENS, on_shards
from pallas_kernels import rms_norm as norm_rows
from pallas_kernels.rms_norm import reference


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last dim; statistics in at least float32."""
    return reference.rms_norm(x, weight_D, eps)[1]


def norm_residual(x_BTD: jax.Array, weight_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The residual stream as it goes on, and its `rms_norm`: on Hopper the gradients of both are
    added in one pass.
    """

    def on_device(x_BTD: jax.Array, weight_D: jax.Array) -> tuple[jax.Array, jax.Array]:
        passed_RD, normed_RD = norm_rows(x_BTD.reshape(-1, x_BTD.shape[-1]), weight_D, eps)
        return passed_RD.reshape(x_BTD.shape), normed_RD.reshape(x_BTD.shape)

    return on_shards(on_device, (TOKENS, P()), (TOKENS, TOKENS))(x_BTD, weight_D)
