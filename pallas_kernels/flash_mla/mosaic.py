"""Causal attention for Hopper: custom_vjp around the kernel of the forward and the two of the
backward.

B batch, T tokens (queries), S keys, H heads, Q query and key width, V value width, P rope width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _common
from pallas_kernels.flash_mla import mosaic_backward, mosaic_forward, mosaic_queries, schedule


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    scale: float,
    q_BTHQ: jax.Array,
    keys: tuple[jax.Array, ...],
    v_BSHV: jax.Array,
    segment_ids: jax.Array | None,
    offset: jax.Array | None,
) -> jax.Array:
    return _forward(scale, q_BTHQ, keys, v_BSHV, segment_ids, offset)[0]


def _forward(scale: float, *operands: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    out, lse = mosaic_forward.attend(*operands, scale=scale)
    out, lse = _common.named_result(out), _common.named_result(lse)
    return out, (operands, out, lse)


def _backward(scale: float, residuals: tuple[Any, ...], dout_BTHV: jax.Array) -> tuple[Any, ...]:
    (q_BTHQ, keys, v_BSHV, segment_ids, offset), out_BTHV, lse_BHT = residuals
    batch, tokens, heads, _ = q_BTHQ.shape
    wide = [x.astype(jnp.float32) for x in (out_BTHV, dout_BTHV)]
    delta_BHT = jnp.swapaxes(jnp.sum(wide[0] * wide[1], axis=3), 1, 2)
    operands = mosaic_backward.Operands(q_BTHQ, keys, v_BSHV, dout_BTHV, lse_BHT, delta_BHT)
    tiles = batch * schedule.num_tiles(tokens, v_BSHV.shape[1], offset)
    group = schedule.heads_at_a_time(heads, tiles)

    def gradients(first: jax.Array | None) -> tuple[Any, ...]:
        own = schedule.Heads(first, group)
        dkeys, dv, ds = mosaic_backward.key_gradients(
            operands, segment_ids, offset, scale=scale, heads=own
        )
        dq = mosaic_queries.query_gradient(
            keys, ds, tokens, segment_ids, offset, scale=scale, heads=own
        )
        return dq, dkeys, dv

    def join(x_GBTHD: jax.Array) -> jax.Array:
        groups, batch, tokens, _, width = x_GBTHD.shape
        return jnp.moveaxis(x_GBTHD, 0, 2).reshape(batch, tokens, groups * group, width)

    if group == heads:
        dq, dkeys, dv = gradients(None)
    else:
        starts = jnp.arange(0, heads, group, dtype=jnp.int32)[:, None]
        dq, dkeys, dv = jax.tree.map(join, lax.map(gradients, starts))
    dkeys = tuple(_over_heads(dk, k) for dk, k in zip(dkeys, keys, strict=True))
    return dq, dkeys, dv, None, None


def _over_heads(dk: jax.Array, key: jax.Array) -> jax.Array:
    """The gradient of a part of the keys; of the one for all heads, the sum of every head's."""
    if key.ndim == 4:
        return dk
    return jnp.sum(dk, axis=2).astype(key.dtype)


_attend.defvjp(_forward, _backward)


def flash_mla(
    q_BTHQ: jax.Array,
    k_BSHQ: jax.Array,
    v_BSHV: jax.Array,
    *,
    scale: float,
    segment_ids: jax.Array | None,
    k_rope: jax.Array | None,
    q_offset: jax.Array | int | None,
) -> jax.Array:
    """The public operator, arguments already checked."""
    tokens = q_BTHQ.shape[1]
    keys = (k_BSHQ,) if k_rope is None else (k_BSHQ, k_rope)
    offset = None if q_offset is None else jnp.asarray(q_offset, jnp.int32).reshape(1)
    q_BTHQ, v_BSHV, *keys = (_in_tiles(x) for x in (q_BTHQ, v_BSHV, *keys))
    return _attend(scale, q_BTHQ, tuple(keys), v_BSHV, segment_ids, offset)[:, :tokens]


def _in_tiles(x_BT: jax.Array) -> jax.Array:
    """Zeros after the last token: all tiles are whole, for what reads them without TMA."""
    tokens = x_BT.shape[1]
    padded = pl.cdiv(tokens, schedule.PADDING) * schedule.PADDING
    return jnp.pad(x_BT, ((0, 0), (0, padded - tokens), *((0, 0),) * (x_BT.ndim - 2)))
