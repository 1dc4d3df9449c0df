"""Compiles a train step at the released model's widths for eight H100, on a machine without a GPU.

    python -m tests.parallel.deviceless [--config-key=value ...]   prints the overlap, then JSON

Needs the extra [aot]. No kernel is autotuned and nothing runs.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plugin asks for a driver otherwise

from typing import Any

import jax
from jax.experimental import topologies

from longcat_jax.cli.config_file import load_config
from longcat_jax.parallel import hlo
from longcat_jax.plan.job import Job
from longcat_jax.plan.memory import abstract_arguments, memory
from longcat_jax.plan.traffic import flows
from longcat_jax.sharding import make_mesh
from longcat_jax.train_step import compile_train_step
from pallas_kernels import _common

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
# The released model with an eighth of its real experts (its router is as wide), two blocks and a
# small vocabulary.
SMALLER = (
    "model.num_layers=2",
    "model.n_routed_experts=64",
    "model.zero_expert_num=704",
    "model.vocab_size=16384",
    "model.num_nextn_predict_layers=0",
    "optim.balance.groups=8",
    "train.global_batch=8",
    "mesh.expert=8",
    "parallel.expert_backend=all_to_all",
    "parallel.dropless=False",
    "parallel.capacity_factor=1.0",
    "parallel.token_chunks=2",
)
# Products by cuBLAS, as a GPU's autotuning mostly decides; Triton's would be compiled one by one.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def target() -> str:
    """Text of the target's description."""
    info = "\n".join(f"  {key}: {value}" for key, value in DEVICE.items())
    info = info.replace(": {", " {")
    return (
        f"gpu_device_info {{\n{info}\n}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 patch: 0 }\n"
        f"device_description_str: {DEVICE['name']}\n"
    )


def main(overrides: list[str]) -> None:
    """Compiles, and prints what was found and what was planned."""
    topology = topologies.get_topology_desc(
        "h100", "cuda", topology="1x1x8", target_config=target()
    )
    # Kernels are chosen by the machine that traces the program, which has no GPU.
    _common.compute_capability = lambda: _common.HOPPER
    config = load_config("configs/flash_560b.py", [*SMALLER, *overrides])
    mesh = make_mesh(config.mesh, list(topology.devices))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        arguments = abstract_arguments(config, mesh)
        lowered = compile_train_step(config, mesh).lower(*arguments)
    compiled = lowered.compile(compiler_options=OPTIONS)
    text = compiled.as_text()
    found = hlo.collectives(hlo.parse(text), mesh.shape)
    exchanges = [one for one in found if one.kind == "all-to-all"]
    print(hlo.overlap_table(exchanges))
    job, stats = Job(config), compiled.memory_analysis()
    planned: dict[str, int] = {}
    for flow in flows(job):
        key = f"{flow.kind} {' '.join(flow.axes)}"
        planned[key] = planned.get(key, 0) + flow.times * flow.payload
    result = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "planned_arguments": memory(job).arguments,
        "planned_temporaries": memory(job).temporaries,
        "traffic": {
            f"{kind} {' '.join(axes or ('?',))}": payload
            for (kind, axes), (_, payload) in hlo.totals(found).items()
        },
        "planned_traffic": planned,
        "exchanges": [
            {
                "times": one.times,
                "payload": one.payload,
                "received": one.received,
                "products": one.products,
                "asynchronous": one.asynchronous,
            }
            for one in exchanges
        ],
        "kernels": text.count('custom_call_target="mosaic_gpu'),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
