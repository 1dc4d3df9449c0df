"""Causal attention of MLA in training and prefill: keys wider than values, one rope key shared by
all heads.

B batch, T tokens (queries), S keys (S == T but for `q_offset`), H heads, Q query and key width, V
value width, P rope width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _common
from pallas_kernels.flash_mla import reference

_MOSAIC_DTYPES = (jnp.bfloat16, jnp.float16)
_MOSAIC_MULTIPLE = 64  # of the widths: a swizzled row of shared memory
_MOSAIC_WIDTH, _MOSAIC_WIDTHS = 256, 384  # at most, of keys or values and of both together


def _mosaic(*operands: jax.Array, **options: Any) -> jax.Array:
    from pallas_kernels.flash_mla import mosaic  # Pallas is only imported where it is used

    return mosaic.flash_mla(*operands, **options)


def _misfit(
    q_BTHQ: jax.Array, k_BSHQ: jax.Array, v_BSHV: jax.Array, rope_width: int, scale: float
) -> str:
    width, value_width = q_BTHQ.shape[3], v_BSHV.shape[3]
    parts = k_BSHQ.shape[3], rope_width, value_width
    if (
        q_BTHQ.dtype in _MOSAIC_DTYPES
        and all(part % _MOSAIC_MULTIPLE == 0 for part in parts)
        and 0 < max(width, value_width) <= _MOSAIC_WIDTH
        and width + value_width <= _MOSAIC_WIDTHS
        and scale > 0
        and q_BTHQ.size > 0
    ):
        return ""
    return (
        "takes bfloat16 or float16, widths of keys, rope and values that are multiples of "
        f"{_MOSAIC_MULTIPLE}, queries and values at most {_MOSAIC_WIDTH} wide and "
        f"{_MOSAIC_WIDTHS} together, a positive scale and at least one query, got {q_BTHQ.dtype}, "
        f"{parts[0]}, {parts[1]} and {parts[2]}, scale {scale} and queries {q_BTHQ.shape}"
    )


_IMPLEMENTATIONS = {
    "reference": _common.Implementation(reference.flash_mla),
    "mosaic": _common.Implementation(_mosaic, _misfit),
}


def flash_mla(
    q_BTHQ: jax.Array,
    k_BSHQ: jax.Array,
    v_BSHV: jax.Array,
    *,
    scale: float,
    segment_ids: jax.Array | None = None,
    k_rope: jax.Array | None = None,
    q_offset: jax.Array | int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale * q k^T) v over the keys s <= q_offset + t of the same segment; softmax in
    float32 at least.

    Args:
      q_BTHQ: queries.
      k_BSHQ: keys; with `k_rope` the part without rope only, P narrower than the queries.
      v_BSHV: values.
      scale: factor of the scores, before the softmax.
      segment_ids: [B, S] integers; a query sees the keys of its own id only. None: one segment.
      k_rope: [B, S, P], the key part shared by all heads; it meets the last P columns of the
        queries.
      q_offset: place of the first query among the keys, 0 <= q_offset <= S - T, one integer for all
        rows, traced or not (not checked); queries stand at the next T places. None: T == S.
      implementation: "reference"; "mosaic" for Hopper, 16-bit dtypes and widths of keys, rope and
        values that are multiples of 64, queries and values at most 256 wide and 384 together;
        None for the best.

    Returns:
      [B, T, H, V] in the dtype of q.

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "flash_mla"
    _common.require_rank(name, 4, q_BTHQ=q_BTHQ, k_BSHQ=k_BSHQ, v_BSHV=v_BSHV)
    _common.require_float(name, q_BTHQ=q_BTHQ, k_BSHQ=k_BSHQ, v_BSHV=v_BSHV)
    key_width = k_BSHQ.shape[3]
    if k_rope is not None:
        _common.require_rank(name, 3, k_rope=k_rope)
        _common.require_float(name, q_BTHQ=q_BTHQ, k_rope=k_rope)
        _common.require(
            k_rope.shape[:2] == k_BSHQ.shape[:2],
            f"{name}: k_rope is {k_rope.shape}, k_BSHQ {k_BSHQ.shape}",
        )
        key_width += k_rope.shape[2]
    (B, T, H, _), S = q_BTHQ.shape, k_BSHQ.shape[1]
    _common.require(
        k_BSHQ.shape[:3] == v_BSHV.shape[:3] == (B, S, H) and (T == S or q_offset is not None),
        f"{name}: q_BTHQ {q_BTHQ.shape}, k_BSHQ {k_BSHQ.shape} and v_BSHV {v_BSHV.shape} must "
        "agree in batch, tokens and heads (with q_offset there may be more keys than queries)",
    )
    _common.require(T <= S, f"{name}: {T} queries, {S} keys: must be at most as many")
    _common.require(
        q_BTHQ.shape[3] == key_width,
        f"{name}: queries are {q_BTHQ.shape[3]} wide, keys (with k_rope) {key_width}",
    )
    if segment_ids is not None:
        _common.require_integer(name, segment_ids=segment_ids)
        _common.require(
            segment_ids.shape == (B, S),
            f"{name}: segment_ids is {segment_ids.shape}, expected {(B, S)}",
        )
    rope_width = 0 if k_rope is None else k_rope.shape[2]
    run = _common.choose(
        name, implementation, _IMPLEMENTATIONS, q_BTHQ, k_BSHQ, v_BSHV, rope_width, scale
    )
    present = [x for x in (q_BTHQ, k_BSHQ, v_BSHV, k_rope) if x is not None]
    q_BTHQ, k_BSHQ, v_BSHV, *rope = _common.vary_together(*present)
    return run(
        q_BTHQ,
        k_BSHQ,
        v_BSHV,
        scale=scale,
        segment_ids=segment_ids,
        k_rope=rope[0] if rope else None,
        q_offset=q_offset,
    )
