"""Options with which XLA compiles programs for several GPUs.

Both are needed for token chunks (parallel/expert.py): by default XLA joins the chunks' products
into one, which then waits for all of the tokens, and keeps one collective in flight at a time.
"""

from jax.sharding import Mesh

OVERLAP = {
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
}


def compiler_options(mesh: Mesh) -> dict[str, int]:
    """What `jax.jit(compiler_options=...)` takes for programs on this mesh."""
    several_gpus = mesh.size > 1 and mesh.devices.flat[0].platform == "gpu"
    return dict(OVERLAP) if several_gpus else {}
