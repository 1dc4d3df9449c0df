"""Teaches Pallas' GPU interpreter what it lacks: wgmma with its first operand in registers, and
stores to an accumulator.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.state import types as state_types

_interpret_from_references = jaxpr_interpret.JaxprInterpreter._interpret_wgmma_ref_p


def _store(accumulator: Any, value: Any) -> None:
    # The interpreter has no rule for the store's own primitive. A product whose second operand is
    # the accumulator itself stands for it: no kernel can ask for one.
    primitives.wgmma_ref_p.bind(
        accumulator,
        value,
        accumulator,
        acc_transforms_tree=None,
        a_transforms_tree=None,
        b_transforms_tree=None,
    )


@gpu_callbacks.fail_on_exception
def _update(
    *,
    token: Any,
    value: Any,
    thread: Any,
    mesh_location: Any,
    source_info: Any,
    accumulator: Any,
    operand: Any,
    transforms: Any,
) -> Any:
    """accumulator += value @ operand, or accumulator = value without an operand."""
    memory = gpu_callbacks._get_shared_memory()
    info = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)

    def access(reference: Any, path: Any) -> tuple[Any, Any]:
        key = gpu_callbacks.HostAllocationKey.from_array(reference)
        path = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(path))
        return key, memory.access(key, path)

    def read(key: Any, window: Any) -> np.ndarray:
        return memory.get_buffer_content(key, window, thread, logging_info=info)[0]

    target = access(accumulator, ())
    result = np.asarray(value)
    if operand is not None:
        total = read(*target)
        result = total + np.matmul(result, read(*access(operand, transforms)), dtype=total.dtype)
    memory.store_buffer_content(*target, result, thread, logging_info=info)
    return token


def _interpret(self: Any, equation: Any, token: Any, get_values: Any) -> tuple[Any, list[Any]]:
    a_aval = equation.invars[1].aval
    if isinstance(a_aval, state_types.AbstractRef):
        return _interpret_from_references(self, equation, token, get_values)
    accumulator, value, operand, *leaves = get_values()
    accumulator, _ = jaxpr_interpret.resolve_ref(equation.invars[0].aval, accumulator, ())
    transforms: Any = ()
    if equation.invars[2] is equation.invars[0]:
        operand = None
    else:
        tree = equation.params["b_transforms_tree"] or jax.tree.structure([])
        transforms = jax.tree.unflatten(tree, leaves)
        operand, transforms = jaxpr_interpret.resolve_ref(
            equation.invars[2].aval, operand, transforms
        )
    update = functools.partial(_update, source_info=equation.source_info)
    token = callback.io_callback(
        update,
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        value=value,
        thread=self.thread,
        mesh_location=self.mesh_location,
        accumulator=accumulator,
        operand=operand,
        transforms=transforms,
    )
    return token, []


def install() -> None:
    """Extends the interpreter of this process."""
    primitives.wgmma_accumulator_store = _store
    jaxpr_interpret.JaxprInterpreter._interpret_wgmma_ref_p = _interpret
