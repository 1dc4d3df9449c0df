"""Compiler options go to programs for GPUs, those for overlap to programs for several."""

import types

import numpy as np

from longcat_jax.config import MeshConfig
from longcat_jax.parallel.compiler import DETERMINISTIC, LOOP, OVERLAP, compiler_options
from longcat_jax.sharding import make_mesh


def test_gpus_only():
    here = make_mesh(MeshConfig(expert=2))
    assert compiler_options(here, deterministic=True, loop=True) == {}
    gpu = types.SimpleNamespace(platform="gpu")
    several = types.SimpleNamespace(size=2, devices=np.array([[gpu, gpu]]))
    single = types.SimpleNamespace(size=1, devices=np.array([[gpu]]))
    assert compiler_options(several, deterministic=False, loop=True) == LOOP | OVERLAP
    assert compiler_options(single, deterministic=False, loop=False) == {}
    assert compiler_options(single, deterministic=True, loop=True) == LOOP | DETERMINISTIC
