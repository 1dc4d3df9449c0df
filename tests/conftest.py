"""Session set-up: 8 fake CPU devices and strict broadcasting, before any JAX backend starts."""

import os
from collections.abc import Iterator

import jax
import pytest

NUM_CPU_DEVICES = 8


def pytest_configure(config: pytest.Config) -> None:
    """Choose the platform: the GPU with `-m gpu`, fake CPU devices otherwise."""
    os.environ["MPLBACKEND"] = "Agg"
    # Compiled programs must come from the code under test, never from an earlier run.
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if config.getoption("-m") != "gpu":
        # Programs that tests start inherit the platform, but not the number of devices.
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", NUM_CPU_DEVICES)


@pytest.fixture(autouse=True)
def _restore_jax_config() -> Iterator[None]:
    """A test that turns on float64 doesn't turn it on for the next."""
    names = ("jax_enable_x64", "jax_numpy_rank_promotion", "jax_default_matmul_precision")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
