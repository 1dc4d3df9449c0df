"""Compiler options go to programs for GPUs, those for overlap to programs for several."""

import types

import numpy as np

from longcat_jax.config import MeshConfig
from longcat_jax.parallel.compiler import DETERMINISTIC, KERNELS, OVERLAP, compiler_options
from longcat_jax.sharding import make_mesh


def test_gpus_only():
    assert compiler_options(make_mesh(MeshConfig(expert=2)), deterministic=True) == {}
    gpu = types.SimpleNamespace(platform="gpu")
    several = types.SimpleNamespace(size=2, devices=np.array([[gpu, gpu]]))
    single = types.SimpleNamespace(size=1, devices=np.array([[gpu]]))
    assert compiler_options(several, deterministic=False) == KERNELS | OVERLAP
    assert compiler_options(single, deterministic=False) == KERNELS
    assert compiler_options(single, deterministic=True) == KERNELS | DETERMINISTIC
