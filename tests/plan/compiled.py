"""The tiny job's step, compiled once for the tests of what is planned of it."""

import functools
from typing import Any

import jax

from longcat_jax.config import Config
from longcat_jax.plan.memory import abstract_arguments
from longcat_jax.sharding import make_mesh
from longcat_jax.train_step import compile_train_step
from tests.helpers import exact, tiny_config

# The program that tests/test_sharding.py trains, too.
GATHERED = (("fsdp", 2), ("context", 2), ("expert", 2)), (("token_chunks", 2),)
EXCHANGED = (("data", 2), ("fsdp", 2), ("expert", 2)), (("expert_backend", "all_to_all"),)


@functools.cache
def compiled(
    mesh: tuple[tuple[str, int], ...], parallel: tuple[tuple[str, Any], ...], remat: str = "none"
) -> tuple[Config, jax.stages.Compiled]:
    """On eight devices, in float64."""
    with exact():
        sections = {"mesh": dict(mesh), "parallel": dict(parallel)}
        config = tiny_config(**sections, train={"accumulate": 1, "remat": remat})
        devices = make_mesh(config.mesh)
        with jax.set_mesh(devices):
            arguments = abstract_arguments(config, devices)
            return config, compile_train_step(config, devices).lower(*arguments).compile()
