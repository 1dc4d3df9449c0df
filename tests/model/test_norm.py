"""The residual stream's norm on several devices and on Hopper."""

import functools

import jax
import jax.numpy as jnp
import pytest

from longcat_jax.config import MeshConfig
from longcat_jax.model.norm import norm_residual
from longcat_jax.sharding import make_mesh
from pallas_kernels import HOPPER, made_for


def gradients(x_BTD, weight_D):
    """Of a sum that both results are in."""

    def total(x_BTD, weight_D):
        passed_BTD, normed_BTD = norm_residual(x_BTD, weight_D, 1e-5)
        return (passed_BTD * normed_BTD).astype(jnp.float32).sum()

    return jax.grad(total, (0, 1))(x_BTD, weight_D)


@pytest.mark.parametrize("devices", [1, 8])
def test_its_gradient_is_a_kernel_and_the_weight_s_is_summed_over_devices(devices):
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, expert=2) if devices > 1 else MeshConfig())
    x, weight = jnp.ones((8, 4, 256), jnp.bfloat16), jnp.ones(256, jnp.bfloat16)
    with jax.set_mesh(mesh), made_for(HOPPER):
        text = str(jax.jit(gradients).trace(x, weight).jaxpr)
    assert "rms_norm_gradient" in text
    assert ("psum" in text) == (devices > 1)


def test_it_is_the_same_on_several_devices():
    keys = jax.random.split(jax.random.key(0))
    x, weight = jax.random.normal(keys[0], (8, 4, 6)), 1 + jax.random.normal(keys[1], (6,))
    wanted = gradients(x, weight)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, context=2, expert=2))):
        got = jax.jit(gradients)(x, weight)
    close = functools.partial(jnp.allclose, rtol=1e-5, atol=1e-5)
    assert all(jax.tree.map(close, got, wanted))
