"""What stands on either side of absorbed MLA attention, head by head: queries, summed, with the
key up-projection folded in, and rotated; and the value up-projection of what attention gives.

M tokens; H heads; N nope dim, P rope dim of I pairs; C latent dim, V value dim; S terms.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _common
from pallas_kernels.mla_heads import reference

MAX_TOKENS = 64
"""Of the kernels: the rows that a wgmma has."""
_MOSAIC_DTYPES = (jnp.bfloat16, jnp.float16)
_MOSAIC_ROPE, _MOSAIC_MULTIPLE = 64, 64  # of the other dims
_MOSAIC_PIECES = 12  # of a head's columns, in terms, sum and matrix: what shared memory holds


def _mosaic_query(*operands: jax.Array) -> jax.Array:
    from pallas_kernels.mla_heads import mosaic  # Pallas is only imported where it is used

    reason = "absorb_query: only implementation='reference' has a gradient"
    return _common.inference_only(reason, mosaic.absorb_query, *operands)


def _mosaic_values(*operands: jax.Array, value_dim: int) -> jax.Array:
    from pallas_kernels.mla_heads import mosaic

    reason = "expand_values: only implementation='reference' has a gradient"
    run = functools.partial(mosaic.expand_values, value_dim=value_dim)
    return _common.inference_only(reason, run, *operands)


def _query_misfit(terms_SMX: jax.Array, kv_b_CHY: jax.Array, cos_MI: jax.Array) -> str:
    (S, M, X), (C, H, _), dtype = terms_SMX.shape, kv_b_CHY.shape, kv_b_CHY.dtype
    rope, width = 2 * cos_MI.shape[1], kv_b_CHY.shape[2]
    nope = X // H - rope
    if (
        dtype in _MOSAIC_DTYPES
        and terms_SMX.dtype == cos_MI.dtype == jnp.float32
        and 0 < M <= MAX_TOKENS
        and rope == _MOSAIC_ROPE
        and all(n > 0 and n % _MOSAIC_MULTIPLE == 0 for n in (nope, C, width))
        and (nope + rope) // _MOSAIC_MULTIPLE * (S + 1) <= _MOSAIC_PIECES
    ):
        return ""
    return (
        f"takes bfloat16 or float16 weights and float32 terms, 1 to {MAX_TOKENS} tokens, a rope "
        f"dim of {_MOSAIC_ROPE}, positive multiples of {_MOSAIC_MULTIPLE} as nope dim, latent dim "
        f"and width of a head's weights, and few terms, got {dtype} and {terms_SMX.dtype}, {M}, "
        f"{rope}, {nope}, {C} and {width}, {S}"
    )


def _values_misfit(x_MHC: jax.Array, kv_b_CHY: jax.Array, value_dim: int) -> str:
    (M, _, C), keys = x_MHC.shape, kv_b_CHY.shape[2] - value_dim
    sizes = {"latent": C, "value": value_dim, "key": keys}
    if (
        x_MHC.dtype in _MOSAIC_DTYPES
        and 0 < M <= MAX_TOKENS
        and all(n > 0 and n % _MOSAIC_MULTIPLE == 0 for n in sizes.values())
    ):
        return ""
    return (
        f"takes bfloat16 or float16, 1 to {MAX_TOKENS} tokens and positive multiples of "
        f"{_MOSAIC_MULTIPLE} as dims, got {x_MHC.dtype}, {M} and {sizes}"
    )


_QUERY = {
    "reference": _common.Implementation(reference.absorb_query),
    "mosaic": _common.Implementation(_mosaic_query, _query_misfit),
}
_VALUES = {
    "reference": _common.Implementation(reference.expand_values),
    "mosaic": _common.Implementation(_mosaic_values, _values_misfit),
}


def absorb_query(
    terms_SMX: jax.Array,
    kv_b_CHY: jax.Array,
    cos_MI: jax.Array,
    sin_MI: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """[q_nope W_uk^T | rotated q_rope] of every head, where q is the sum of terms.

    Args:
      terms_SMX: float32 at least; heads' nope and rope parts, X = H (N + P).
      kv_b_CHY: up-projections of keys and values; the first N of a head's columns are the keys'.
      cos_MI: of every token's angles.
      sin_MI: likewise.
      implementation: "reference"; "mosaic" for Hopper, 16-bit dtypes, 1 to 64 tokens, a rope dim of
        64 and other dims that are multiples of 64, which has no gradient; None for "mosaic" where
        it runs and "reference" elsewhere.

    Returns:
      [M, H, C + P] in the dtype of the weights; pairs (2i, 2i + 1) of the rope part become members
      i and I + i.

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "absorb_query"
    _common.require_rank(name, 3, terms_SMX=terms_SMX, kv_b_CHY=kv_b_CHY)
    _common.require_rank(name, 2, cos_MI=cos_MI, sin_MI=sin_MI)
    _common.require_float(name, terms_SMX=terms_SMX, cos_MI=cos_MI, sin_MI=sin_MI)
    _common.require_float(name, kv_b_CHY=kv_b_CHY)
    (S, M, X), (_, H, Y), angles = terms_SMX.shape, kv_b_CHY.shape, cos_MI.shape
    _common.require(
        angles == sin_MI.shape and angles[0] == M,
        f"{name}: {M} tokens, cosines {angles} and sines {sin_MI.shape}",
    )
    nope = X // H - 2 * angles[1]
    _common.require(
        S > 0 and X % H == 0 and 0 < nope <= Y,
        f"{name}: terms {terms_SMX.shape}, weights {kv_b_CHY.shape} and angles {angles} don't fit",
    )
    run = _common.choose(name, implementation, _QUERY, terms_SMX, kv_b_CHY, cos_MI)
    return run(*_common.vary_together(terms_SMX, kv_b_CHY, cos_MI, sin_MI))


def expand_values(
    x_MHC: jax.Array,
    kv_b_CHY: jax.Array,
    *,
    value_dim: int,
    implementation: str | None = None,
) -> jax.Array:
    """x W_uv of every head.

    Args:
      x_MHC: what attention over latents gives.
      kv_b_CHY: up-projections of keys and values; the last V of a head's columns are the values'.
      value_dim: V.
      implementation: as of `absorb_query`; "mosaic" takes any key dim that is a multiple of 64.

    Returns:
      [M, H, V].

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "expand_values"
    _common.require_rank(name, 3, x_MHC=x_MHC, kv_b_CHY=kv_b_CHY)
    _common.require_float(name, x_MHC=x_MHC, kv_b_CHY=kv_b_CHY)
    (_, H, C), (_, _, Y) = x_MHC.shape, kv_b_CHY.shape
    _common.require(
        kv_b_CHY.shape[:2] == (C, H) and 0 < value_dim <= Y,
        f"{name}: values {x_MHC.shape}, weights {kv_b_CHY.shape} and {value_dim=} don't fit",
    )
    run = _common.choose(name, implementation, _VALUES, x_MHC, kv_b_CHY, value_dim)
    return run(*_common.vary_together(x_MHC, kv_b_CHY), value_dim=value_dim)
