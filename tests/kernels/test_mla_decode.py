import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mla_decode
from tests.kernels import helpers

BATCH, TOKENS, HEADS, ENTRIES, LATENT, ROPE = 4, 2, 3, 13, 10, 6
SCALE = 0.3
TOLERANCE = {"bfloat16": 1e-2, "float32": 2e-6, "float64": 1e-13}
LENGTHS = np.asarray([13, 7, 2, 1])  # the last row's first query stands before the cache


def operands(dtype):
    rng = np.random.default_rng(5)
    q = rng.standard_normal((BATCH, TOKENS, HEADS, LATENT + ROPE))
    cache = rng.standard_normal((BATCH, ENTRIES, LATENT + ROPE))
    for b, length in enumerate(LENGTHS):
        cache[b, length:] = np.nan
    return jnp.asarray(q, dtype), jnp.asarray(cache, dtype), jnp.asarray(LENGTHS, jnp.int32)


def naive(q, cache):
    q, cache = np.asarray(q, np.float64), np.asarray(cache, np.float64)
    out = np.zeros((BATCH, TOKENS, HEADS, LATENT))
    for b, t, h in np.ndindex(BATCH, TOKENS, HEADS):
        position = LENGTHS[b] - TOKENS + t
        if position >= 0:
            seen = cache[b, : position + 1]
            scores = SCALE * seen @ q[b, t, h]
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ seen[:, :LATENT] / weights.sum()
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_naive(dtype):
    with helpers.strict_types():
        q, cache, lengths = operands(dtype)
        out = mla_decode(q, cache, lengths, scale=SCALE, value_dim=LATENT)
        assert out.dtype == dtype
        assert helpers.relative_error(out, naive(q, cache)) <= TOLERANCE[dtype]
        assert not np.any(out[3, 0]) and np.any(out[3, 1])


def test_two_runs_give_the_same_bits():
    args = operands("float32")
    first, second = (mla_decode(*args, scale=SCALE, value_dim=LATENT) for _ in range(2))
    assert helpers.same_bits(first, second)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cache=jnp.zeros((2, 5, 8))), "queries are 9 wide, cache entries 8"),
        (dict(lengths=jnp.zeros(3, int)), "batch is 2 in q_BTHU"),
        (dict(lengths=jnp.zeros(2)), "expected an integer dtype"),
        (dict(value_dim=10), "value_dim is 10, expected 1 to 9"),
        (dict(implementation="mosaik"), "choose None or one of 'reference'"),
    ],
)
def test_refuses(change, message):
    args = dict(q=jnp.zeros((2, 1, 3, 9)), cache=jnp.zeros((2, 5, 9)), lengths=jnp.ones(2, int))
    args |= dict(value_dim=6, implementation=None) | change
    with pytest.raises(ValueError, match=message):
        mla_decode(
            args["q"],
            args["cache"],
            args["lengths"],
            scale=SCALE,
            value_dim=args["value_dim"],
            implementation=args["implementation"],
        )
