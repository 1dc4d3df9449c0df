"""Which activations the backward pass keeps and which it makes again (`train.remat`).

`none` keeps all that the backward pass reads; `full` keeps a block's input; `selective` keeps the
results of matrix products and attention that were marked with `keep`, so that what is made again is
elementwise, a norm or a gather, and K and V of every head, one product from the latent.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"


def keep(x: jax.Array) -> jax.Array:
    """x, marked as worth its memory."""
    return checkpoint_name(x, KEPT)


def rematerialised(function: Callable, policy: str) -> Callable:
    """`function` under a policy of config.REMAT_POLICIES."""
    if policy == "none":
        return function
    policies = {
        "selective": jax.checkpoint_policies.save_only_these_names(KEPT),
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    return jax.checkpoint(function, policy=policies[policy], prevent_cse=False)
