"""Which activations the backward pass keeps and which it makes again (`train.remat`).

`none` keeps all that the backward pass reads but weights gathered over fsdp; `full` keeps a block's
input; `selective` keeps what is marked with `keep`, mostly results of matrix products, and those of
attention, so that what is made again is elementwise or a gather, and K and V of every head, one
product from the latent; `ample` keeps K and V, too, and what the experts' second product reads.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from longcat_jax.sharding import DENSE, axis_size
from pallas_kernels import RESULT

KEPT = "kept"
AMPLE = "kept if there is room"


def keep(x: jax.Array) -> jax.Array:
    """x, marked as worth its memory."""
    return checkpoint_name(x, KEPT)


def keep_if_ample(x: jax.Array) -> jax.Array:
    """x, marked as worth its memory where there is plenty: large, and made again in little time."""
    return checkpoint_name(x, AMPLE)


def _all_but_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """Weights that were gathered over fsdp are not kept: they would stand whole for every layer."""
    return not (primitive.name == "all_gather" and "fsdp" in params["axis_name"])


def rematerialised(function: Callable, policy: str, *, in_loop: bool) -> Callable:
    """`function` of a layer's input and its weights under a policy of config.REMAT_POLICIES.

    Outside of a loop XLA would see that the backward pass makes the same again, and keep
    everything, were it not kept from it. The input is enough for that, but for weights that are cut
    and gathered in either pass. Others stay what they are to XLA, a part of their stack that
    products read where it lies (parallel/compiler.py).
    """
    if policy == "none" and axis_size("fsdp") == 1:
        return function
    policies = {
        "none": _all_but_weights,
        "ample": jax.checkpoint_policies.save_only_these_names(KEPT, AMPLE, RESULT),
        "selective": jax.checkpoint_policies.save_only_these_names(KEPT, RESULT),
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    gathered = any(axis_size(axis) > 1 for axis in DENSE)
    # A tuple keeps residuals apart, too, even one of False.
    apart = False if in_loop else (True, gathered)
    return jax.checkpoint(function, policy=policies[policy], prevent_cse=apart)
