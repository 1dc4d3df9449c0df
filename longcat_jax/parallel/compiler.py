"""Options with which XLA compiles programs for GPUs."""

from jax.sharding import Mesh

LOOP = {
    # XLA would fuse a kernel with the write of its result into a layer stack, and run it once more
    # for its other readers. Without a loop there is no such write, and kernels and products read a
    # layer's weights where they lie in their stack.
    "xla_gpu_enable_dynamic_slice_fusion": False,
}
DETERMINISTIC = {
    # No algorithm is chosen by its time in this process. Triton's products need that.
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
}
OVERLAP = {
    # Both for token chunks (parallel/expert.py): by default XLA joins the chunks' products into
    # one, which then waits for all of the tokens, and keeps one collective in flight at a time.
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
}
DECODING = {
    # The kernels of a step become a graph of what needs what: a block's experts run beside its
    # second attention and its FFNs (section 2.1.2). By default one waits for the other.
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}
"""Of generate.run; other platforms than GPUs pass over them."""


def compiler_options(mesh: Mesh, *, deterministic: bool, loop: bool) -> dict[str, int]:
    """What `jax.jit(compiler_options=...)` takes for programs on this mesh.

    Args:
      mesh: of the devices that the program is for.
      deterministic: whether every process shall get the same program.
      loop: whether they loop over layers.
    """
    if mesh.devices.flat[0].platform != "gpu":
        return {}
    wanted = (LOOP, loop), (DETERMINISTIC, deterministic), (OVERLAP, mesh.size > 1)
    return {name: value for options, on in wanted if on for name, value in options.items()}
