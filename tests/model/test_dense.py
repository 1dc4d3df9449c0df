"""Which products go to the kernel for few rows, and that all are x w."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longcat_jax.model.dense import dense, products
from longcat_jax.sharding import make_mesh
from pallas_kernels import HOPPER, made_for
from tests.helpers import tiny_config

D, N = 128, 64


def launches(batch, tokens, mesh=None):
    """skinny_gemm's in a program for Hopper."""
    x = jax.ShapeDtypeStruct((batch, tokens, D), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((D, N), jnp.bfloat16)
    with made_for(HOPPER):
        traced = jax.jit(lambda x, w: products(x, w, w)).trace(x, w)
    return str(traced.jaxpr).count("name=skinny_gemm")


@pytest.mark.parametrize("batch, tokens", [(1, 1), (64, 1), (16, 4)])
def test_few_tokens_share_a_launch(batch, tokens):
    assert launches(batch, tokens) == 1
    with jax.set_mesh(make_mesh(tiny_config().mesh)):  # of one device
        assert launches(batch, tokens) == 1


@pytest.mark.parametrize("batch, tokens", [(65, 1), (16, 5)])
def test_more_tokens_are_a_plain_product(batch, tokens):
    assert launches(batch, tokens) == 0


def test_on_several_devices_all_are_plain_products():
    with jax.set_mesh(make_mesh(tiny_config(mesh={"data": 2}).mesh)):
        assert launches(2, 1) == 0


@pytest.mark.parametrize("tokens", [0, 3, 80])
def test_gives_x_w(tokens):
    rng = np.random.default_rng(0)
    x, w, other = (
        jnp.asarray(rng.standard_normal(s), jnp.float32)
        for s in ((2, tokens, D), (D, N), (D, 2 * N))
    )
    with jax.default_matmul_precision("highest"):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        for got, matrix in zip(products(x, w, other), (w, other), strict=True):
            close(got, np.asarray(x) @ np.asarray(matrix))
        narrow = dense(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), out_dtype=jnp.float32)
    assert narrow.dtype == jnp.float32 and narrow.shape == (2, tokens, N)
