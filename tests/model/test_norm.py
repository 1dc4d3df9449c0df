"""The residual stream's sums and norm on several devices and on Hopper."""

import functools
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from longcat_jax.config import MeshConfig
from longcat_jax.model.norm import add_residual, norm_residual
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


def test_sums_are_the_same_on_several_devices():
    def run(x, out):
        total, vjp = jax.vjp(add_residual, x, out)
        return total, *vjp(total)

    keys = jax.random.split(jax.random.key(1))
    x, out = (jax.random.normal(key, (8, 4, 6)) for key in keys)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, context=2, expert=2))):
        found = jax.jit(run)(x, out)
    assert all((one == x + out).all() for one in found)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="compiles for H100 without one: needs pip install 'longcat_jax[aot]'",
)
def test_the_stream_is_not_copied_to_be_added_to():
    run = [sys.executable, "-m", "tests.model.residual_copies"]
    result = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    copies = json.loads(result.stdout.splitlines()[-1])
    assert copies["rows"] == 0
    assert copies["plain"] > 0, "XLA no longer copies it: add_residual has no purpose left"
