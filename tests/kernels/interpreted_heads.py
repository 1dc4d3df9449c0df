"""Cases of absorb_query and expand_values for tests/kernels/interpreted.py."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels import _common, absorb_query, expand_values
from tests.kernels import helpers


class Case(NamedTuple):
    """Tokens, heads, terms; nope, rope, latent and value dim."""

    tokens: int
    heads: int
    terms: int
    nope: int
    rope: int
    latent: int
    value: int
    dtype: str = "bfloat16"


CASES = {
    # Rows that fill a tile of 8 or don't; latents of more pieces than stages.
    "one token": Case(1, 2, 2, 128, 64, 128, 64),
    "some tokens": Case(11, 3, 1, 64, 64, 64, 128, "float16"),
    "long": Case(64, 1, 3, 64, 64, 640, 64),
}


def heads(case: Case, implementation: str) -> dict[str, Any]:
    """Errors against float64 of latent and rope part, and of values."""
    rng = np.random.default_rng(7)
    M, H, S, N, P, C, V, dtype = case
    wide = _common.accumulation_dtype(dtype)

    def draw(*shape: int, dtype: Any = dtype) -> Any:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    terms, angles = draw(S, M, H * (N + P), dtype=wide), rng.uniform(0, 6, (M, P // 2))
    kv_b, x = draw(C, H, N + V), draw(M, H, C)
    cos, sin = (jnp.asarray(f(angles), wide) for f in (np.cos, np.sin))
    options = {"implementation": implementation}
    q = absorb_query(terms, kv_b, cos, sin, **options)
    values = expand_values(x, kv_b, value_dim=V, **options)
    assert q.dtype == values.dtype == kv_b.dtype

    rounded = np.asarray(terms, np.float64).sum(0).reshape(M, H, N + P)
    weights = np.asarray(kv_b, np.float64)
    turned = rounded[..., N::2] + 1j * rounded[..., N + 1 :: 2]
    turned = turned * np.exp(1j * angles)[:, None]
    error = helpers.relative_error
    latent = np.einsum("mhn,chn->mhc", rounded[..., :N], weights[..., :N])
    wanted = np.einsum("mhc,chv->mhv", np.asarray(x, np.float64), weights[..., N:])
    return {
        "latent": error(q[..., :C], latent),
        "rope": error(q[..., C:], np.concatenate([turned.real, turned.imag], axis=-1)),
        "values": error(values, wanted),
    }
