"""What the Triton kernels share: their launch as part of a jitted program.

Needs the extra `[triton]`, whose packages are imported here and in <op>/triton.py only, when an
implementation of theirs is chosen.
"""

import os
from types import ModuleType
from typing import Any

import jax

from pallas_kernels import _common


def _jax_triton() -> ModuleType:
    """The module jax_triton, whose import would empty TRITON_CACHE_DIR for the whole process."""
    before = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    os.environ.pop("TRITON_CACHE_DIR", None)
    if before is not None:
        os.environ["TRITON_CACHE_DIR"] = before
    return jax_triton


def launch(
    kernel: Any,
    operands: tuple[jax.Array, ...],
    *,
    out: jax.ShapeDtypeStruct,
    programs: int,
    warps: int,
    stages: int = 1,
    **constants: int,
) -> jax.Array:
    """Runs `programs` instances of a Triton kernel over (*operands, out, **constants).

    Args:
      kernel: a `triton.jit` function; its parameters are one pointer per operand, one for the
        result, then the constants.
      operands: arrays, which the kernel only reads.
      out: shape and dtype of the result; what the kernel does not write is undefined.
      programs: size of the grid.
      warps: of a program.
      stages: loads in flight of a loop with products, including the one in use.
      **constants: what the kernel is compiled for.
    """
    major, minor = _common.compute_capability()
    result = _jax_triton().triton_call(
        *operands,
        kernel=kernel,
        out_shape=out,
        grid=(programs,),
        num_warps=warps,
        num_stages=stages,
        compute_capability=10 * major + minor,
        **constants,
    )
    return _common.vary(result, _common.varying_axes(*operands))
