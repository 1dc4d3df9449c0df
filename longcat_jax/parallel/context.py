"""Sequences cut over the context axis: every device has queries of its own and the keys of all.

Keys travel as the latents they are made from, 576 wide in the released model where keys and values
of all heads are 20480; each device projects them up itself. Gathered, their gradient is scattered
back in the same parts.

Causal attention gives late queries more keys than early ones. So a row is cut into 2 c chunks for c
devices, and device i has chunks i and 2 c - 1 - i ("zigzag"): as many pairs of query and key as any
other. Everything but attention treats tokens alike: rows are put into this order once, as token ids
(`zigzag`), and stay in it up to the losses.

B batch, T tokens of a device, S tokens of a row, H heads, Q query width, V value width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from longcat_jax.sharding import axis_size

AXIS = "context"


def zigzag_order(num_tokens: int, num_devices: int) -> np.ndarray:
    """Natural place of the token at each place [S], device after device."""
    chunks = np.arange(num_tokens).reshape(2 * num_devices, -1)
    return np.stack([chunks, chunks[::-1]], axis=1)[:num_devices].reshape(-1)


def zigzag(x_BS: jax.Array) -> jax.Array:
    """Rows of whole sequences in the order of the mesh; as they are where nothing is cut."""
    devices = axis_size(AXIS)
    return x_BS if devices == 1 else x_BS[:, zigzag_order(x_BS.shape[1], devices)]


def natural(x_BS: jax.Array) -> jax.Array:
    """The inverse of `zigzag`."""
    devices = axis_size(AXIS)
    if devices == 1:
        return x_BS
    return x_BS[:, np.argsort(zigzag_order(x_BS.shape[1], devices))]


def gather_row(x_BTU: jax.Array) -> jax.Array:
    """The whole row [B, S, ...] in natural order, of its parts in zigzag order; inside of
    `on_shards`.
    """
    devices = axis_size(AXIS)
    if devices == 1:
        return x_BTU
    parts = jnp.split(lax.all_gather(x_BTU, AXIS, axis=1, tiled=True), 2 * devices, axis=1)
    return jnp.concatenate(parts[0::2] + parts[::-2], axis=1)


def attend_in_place(
    attend: Callable[[jax.Array, jax.Array | None], jax.Array], q_BTHQ: jax.Array
) -> jax.Array:
    """`attend(queries, place of the first one in the row)` of this device's queries; inside of
    `on_shards`.

    The place is None where the queries are the whole row.
    """
    devices = axis_size(AXIS)
    if devices == 1:
        return attend(q_BTHQ, None)
    early, late = jnp.split(q_BTHQ, 2, axis=1)
    index, length = lax.axis_index(AXIS), early.shape[1]
    last = 2 * devices - 1
    outputs = [attend(early, index * length), attend(late, (last - index) * length)]
    return jnp.concatenate(outputs, axis=1)
