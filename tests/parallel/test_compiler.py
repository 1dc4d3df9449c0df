"""Compiler options go to programs for several GPUs, and to no others."""

import types

import numpy as np

from longcat_jax.config import MeshConfig
from longcat_jax.parallel.compiler import OVERLAP, compiler_options
from longcat_jax.sharding import make_mesh


def test_several_gpus_only():
    assert compiler_options(make_mesh(MeshConfig(expert=2))) == {}
    gpu = types.SimpleNamespace(platform="gpu")
    several = types.SimpleNamespace(size=2, devices=np.array([[gpu, gpu]]))
    single = types.SimpleNamespace(size=1, devices=np.array([[gpu]]))
    assert compiler_options(several) == OVERLAP and compiler_options(single) == {}
