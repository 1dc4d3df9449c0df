"""The train step compiled for H100 on a machine without a GPU: what the formulas of this folder are
held against, and where bytes and time go before a machine is there.

Needs the extra [aot]. Nothing runs and nothing is autotuned; so the program is, down to its machine
code, the one that a GPU gets of a deterministic job.
"""

import os
from typing import Any

import jax
from jax.experimental import topologies

from longcat_jax.config import Config
from longcat_jax.plan.memory import abstract_arguments
from longcat_jax.sharding import make_mesh
from longcat_jax.train_step import compile_train_step
from pallas_kernels import HOPPER, made_for

# An H100 SXM as XLA's GpuTargetConfigProto wants it told: NVIDIA's data sheet and the limits of
# compute capability 9.0 in the CUDA programming guide.
DEVICE: dict[str, Any] = {
    "name": '"NVIDIA H100 80GB HBM3"',
    "cuda_compute_capability": "{ major: 9 feature_extension: ACCELERATED_FEATURES }",
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "memory_bandwidth": 3352 * 10**9,
    "device_memory_size": 84942979072,
    "l2_cache_size": 50 * 2**20,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "shared_memory_per_core": 228 * 1024,
    "shared_memory_per_block": 48 * 1024,
    "shared_memory_per_block_optin": 227 * 1024,
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "driver_version": '"12.8.0"',
    "runtime_version": '"12.8.0"',
    "compile_time_toolkit_version": '"12.8.0"',
    "dnn_version": '"9.10.0"',
}


def _target() -> str:
    info = "\n".join(f"  {key}: {value}" for key, value in DEVICE.items())
    info = info.replace(": {", " {")
    return (
        f"gpu_device_info {{\n{info}\n}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 patch: 0 }\n"
        f"device_description_str: {DEVICE['name']}\n"
    )


def h100s(count: int) -> list[jax.Device]:
    """`count` H100 of one host, to compile for.

    To be called before anything asks JAX for a device: it settles for the CPU as the host.

    Raises:
      RuntimeError: the extra is not installed.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plugin asks for a driver otherwise
    topology = topologies.get_topology_desc(
        "h100", "cuda", topology=f"1x1x{count}", target_config=_target()
    )
    return list(topology.devices)


def compiled_step(config: Config) -> jax.stages.Compiled:
    """The step of `config` for as many of `h100s` as its mesh has devices."""
    mesh = make_mesh(config.mesh, h100s(config.mesh.num_devices))
    with made_for(HOPPER), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = compile_train_step(config, mesh).lower(*abstract_arguments(config, mesh))
    return lowered.compile()
