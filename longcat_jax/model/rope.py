"""Rotary position embedding on interleaved pairs (2i, 2i+1), with YaRN (arXiv 2309.00071).

B batch, T tokens, H heads, P rope dim, I = P/2 pairs.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longcat_jax.config import ModelConfig, RopeScaling


@struct.dataclass
class RopeTable:
    """Cosine and sine of every token's angles, YaRN's gain included."""

    cos_BTI: jax.Array
    sin_BTI: jax.Array


def _mscale(factor: float, value: float) -> float:
    return 0.1 * value * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn_frequencies(frequency_I: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    """Slow pairs are interpolated, fast ones kept, with a ramp between beta_slow and beta_fast
    rotations.
    """
    dim = 2 * len(frequency_I)

    def pair_of(rotations: float) -> float:
        ratio = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), dim - 1)
    ramp_I = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequency_I / scaling.factor * ramp_I + frequency_I * (1 - ramp_I)


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Angle per position of each pair [I] (float64), and the gain on cosine and sine."""
    dim = config.qk_rope_head_dim
    frequency_I = config.rope_theta ** (-np.arange(0, dim, 2) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency_I, 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        gain = _mscale(scaling.factor, scaling.mscale)
        gain /= _mscale(scaling.factor, scaling.mscale_all_dim)
    else:
        gain = _mscale(scaling.factor, 1.0)
    return _yarn_frequencies(frequency_I, scaling, config.rope_theta), gain


def attention_scale(config: ModelConfig) -> float:
    """Softmax scale: qk_head_dim^-0.5, times YaRN's mscale_all_dim gain squared."""
    scaling = config.rope_scaling
    gain = 1.0
    if scaling is not None and scaling.mscale_all_dim:
        gain = _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return config.qk_head_dim**-0.5 * gain


def rope_table(config: ModelConfig, positions_BT: jax.Array) -> RopeTable:
    """Table for the given positions, in at least float32."""
    frequency_I, gain = rope_frequencies(config)
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    angle_BTI = positions_BT.astype(dtype)[..., None] * jnp.asarray(frequency_I, dtype)[None, None]
    return RopeTable(gain * jnp.cos(angle_BTI), gain * jnp.sin(angle_BTI))


def rotate(x_BTHP: jax.Array, table: RopeTable) -> jax.Array:
    """Rotates pairs (2i, 2i+1); the result keeps all first members, then all second ones.

    That order is common to queries and keys, so scores don't see it; it is also what HF caches.
    """
    cos, sin = table.cos_BTI[:, :, None], table.sin_BTI[:, :, None]
    even, odd = x_BTHP[..., 0::2].astype(cos.dtype), x_BTHP[..., 1::2].astype(cos.dtype)
    out = jnp.concatenate([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return out.astype(x_BTHP.dtype)


def _rotate_back(x_BTHP: jax.Array, table: RopeTable) -> jax.Array:
    """The transpose of `rotate`."""
    cos, sin = table.cos_BTI[:, :, None], table.sin_BTI[:, :, None]
    first, second = jnp.split(x_BTHP.astype(cos.dtype), 2, axis=-1)
    even, odd = first * cos + second * sin, second * cos - first * sin
    return jnp.stack([even, odd], axis=-1).reshape(x_BTHP.shape).astype(x_BTHP.dtype)


def _in_last_columns(rotation: Callable, x_BTHQ: jax.Array, table: RopeTable) -> jax.Array:
    width = 2 * table.cos_BTI.shape[-1]
    # Cut out first: XLA then writes into x where it stands.
    last_BTHP = jax.lax.optimization_barrier(x_BTHQ[..., -width:])
    start = x_BTHQ.shape[-1] - width
    return jax.lax.dynamic_update_slice_in_dim(x_BTHQ, rotation(last_BTHP, table), start, -1)


@jax.custom_vjp
def rotate_last(x_BTHQ: jax.Array, table: RopeTable) -> jax.Array:
    """x with its last P columns rotated, the others untouched, in either direction."""
    return _in_last_columns(rotate, x_BTHQ, table)


def _rotate_last_forward(x_BTHQ: jax.Array, table: RopeTable) -> tuple[jax.Array, RopeTable]:
    return rotate_last(x_BTHQ, table), table


def _rotate_last_backward(table: RopeTable, dx_BTHQ: jax.Array) -> tuple[jax.Array, None]:
    return _in_last_columns(_rotate_back, dx_BTHQ, table), None


rotate_last.defvjp(_rotate_last_forward, _rotate_last_backward)
