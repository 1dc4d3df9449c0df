"""Session set-up: 8 fake CPU devices and strict broadcasting, before any JAX backend starts."""

import os
import shutil
import tempfile
from collections.abc import Iterator

import jax
import pytest

NUM_CPU_DEVICES = 8


def pytest_configure(config: pytest.Config) -> None:
    """Choose the platform: the GPU with `-m gpu`, fake CPU devices otherwise."""
    os.environ["MPLBACKEND"] = "Agg"
    _share_compiled_programs(config)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if config.getoption("-m") != "gpu":
        # Programs that tests start inherit the platform, but not the number of devices.
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", NUM_CPU_DEVICES)


def _share_compiled_programs(config: pytest.Config) -> None:
    """Each program is compiled once a session, for all workers and processes that tests start.

    The folder is made by the session and removed with it: no program comes from an earlier run.
    """
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="longcat-test-programs-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True)
def _restore_jax_config() -> Iterator[None]:
    """A test that turns on float64 doesn't turn it on for the next."""
    names = ("jax_enable_x64", "jax_numpy_rank_promotion", "jax_default_matmul_precision")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
