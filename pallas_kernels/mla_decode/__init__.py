"""Absorbed MLA attention of a few new tokens over a latent cache.

B batch, T new tokens (1 to a few), S cache entries, P pages of a row, H heads, U cache width
(latent and rope), C latent width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _common
from pallas_kernels.mla_decode import reference

_MOSAIC_DTYPES = (jnp.bfloat16, jnp.float16)
_MOSAIC_MULTIPLE = 64  # of the widths and of the number of entries
_MOSAIC_VALUES, _MOSAIC_WIDTH = 512, 576  # the most that registers and shared memory hold


def _mosaic(*operands: jax.Array, **options: Any) -> jax.Array:
    from pallas_kernels.mla_decode import mosaic  # Pallas is only imported where it is used

    return mosaic.mla_decode(*operands, **options)


def _mosaic_misfit(cache_BSU: jax.Array, value_dim: int) -> str:
    _, entries, width = cache_BSU.shape
    if (
        cache_BSU.dtype in _MOSAIC_DTYPES
        and all(n % _MOSAIC_MULTIPLE == 0 for n in (entries, width, value_dim))
        and entries > 0
        and value_dim <= _MOSAIC_VALUES
        and width <= _MOSAIC_WIDTH
    ):
        return ""
    return (
        f"takes bfloat16 or float16 and positive multiples of {_MOSAIC_MULTIPLE}: a value_dim up "
        f"to {_MOSAIC_VALUES}, entries up to {_MOSAIC_WIDTH} wide, and their number; got "
        f"{cache_BSU.dtype}, {value_dim}, {width} and {entries}"
    )


_IMPLEMENTATIONS = {
    "reference": _common.Implementation(reference.mla_decode),
    "mosaic": _common.Implementation(_mosaic, _mosaic_misfit),
}


NO_GRADIENT = (
    "mla_decode: only implementation='reference' over a cache without block tables has a gradient"
)


def mla_decode(
    q_BTHU: jax.Array,
    cache_BSU: jax.Array,
    lengths_B: jax.Array,
    *,
    scale: float,
    value_dim: int,
    block_tables_BP: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale * q cache^T) cache[:, :, :value_dim]; softmax in float32 at least.

    Query t of row b is the token at position lengths[b] - T + t and sees the cache entries up to
    its own position, so the new tokens' entries are already in the cache. A query at a negative
    position sees nothing and gives zeros, as does any query of an empty cache.

    Args:
      q_BTHU: queries with the key up-projection folded in: latent part first, rope part last.
      cache_BSU: normed, scaled latent and rotated rope key of every token; what lies past the
        length is not used, NaN included. With block tables, pages of entries [pages, entries of a
        page, U].
      lengths_B: integer number of valid entries per row, at most S.
      scale: factor of the scores, before the softmax.
      value_dim: width C of the latent, the first columns of the cache, which are the values.
      block_tables_BP: integer; block_tables[b, i] is the page that holds row b's entries from
        i * (entries of a page) on. What belongs to entries past the length is not used.
      implementation: "reference"; "mosaic" for Hopper, 16-bit dtypes, widths and S (or entries of a
        page) that are multiples of 64, C up to 512 and U up to 576; None for "mosaic" where it runs
        and "reference" elsewhere. Only the reference without block tables has a gradient.

    Returns:
      [B, T, H, value_dim] in the dtype of q; the value up-projection is the caller's.

    Raises:
      ValueError: shapes or dtypes don't fit, or the implementation is not available.
    """
    name = "mla_decode"
    tables = () if block_tables_BP is None else (block_tables_BP,)
    _common.require_rank(name, 4, q_BTHU=q_BTHU)
    _common.require_rank(name, 3, cache_BSU=cache_BSU)
    _common.require_rank(name, 1, lengths_B=lengths_B)
    _common.require_float(name, q_BTHU=q_BTHU, cache_BSU=cache_BSU)
    _common.require_integer(name, lengths_B=lengths_B)
    for table in tables:
        _common.require_rank(name, 2, block_tables_BP=table)
        _common.require_integer(name, block_tables_BP=table)
    # With block tables the cache has no batch of its own, the table has.
    owner = "block_tables_BP" if tables else "cache_BSU"
    batch = (*tables, cache_BSU)[0].shape[0]
    _common.require(
        q_BTHU.shape[0] == batch == lengths_B.shape[0],
        f"{name}: batch is {q_BTHU.shape[0]} in q_BTHU, {batch} in {owner}, "
        f"{lengths_B.shape[0]} in lengths_B",
    )
    _common.require(
        q_BTHU.shape[3] == cache_BSU.shape[2],
        f"{name}: queries are {q_BTHU.shape[3]} wide, cache entries {cache_BSU.shape[2]}",
    )
    _common.require(
        0 < value_dim <= cache_BSU.shape[2],
        f"{name}: value_dim is {value_dim}, expected 1 to {cache_BSU.shape[2]}",
    )
    run = _common.choose(name, implementation, _IMPLEMENTATIONS, cache_BSU, value_dim)
    if any(x.size == 0 for x in (q_BTHU, cache_BSU, *tables)):
        shape = (*q_BTHU.shape[:3], value_dim)
        return _common.zeros_varying(shape, q_BTHU.dtype, q_BTHU, cache_BSU, lengths_B, *tables)
    run = functools.partial(run, scale=scale, value_dim=value_dim)
    operands = _common.vary_together(q_BTHU, cache_BSU, lengths_B, *tables)
    if tables or run.func is _mosaic:
        return _common.inference_only(NO_GRADIENT, run, *operands)
    return run(*operands)
