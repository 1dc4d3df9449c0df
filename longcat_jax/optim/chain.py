"""The whole optimizer as one Optax chain.

clip -> Adam -> decoupled weight decay -> role and width factors -> -learning rate -> PID bias. The
last replaces the router bias' update, which has no gradient. Frozen parameters (`optim.freeze`)
have no gradient either; Adam and weight decay pass them by, and the PID keeps off a frozen bias.
"""

from typing import Any

import jax
import optax

from longcat_jax.config import Config
from longcat_jax.optim import schedules
from longcat_jax.optim.frozen import freeze, frozen_mask, router_bias_frozen
from longcat_jax.optim.pid_bias import pid_bias
from longcat_jax.optim.width_scaling import decay_mask, rate_multipliers, scale_by_width


def make_optimizer(config: Config, boxed: Any) -> optax.GradientTransformationExtraArgs:
    """AdamW chain of `config`; its `update` takes `load_LE` (optim/pid_bias.py).

    Args:
      config: the job.
      boxed: (possibly abstract) tree of boxes from `longcat.init`: roles and widths.
    """
    o = config.optim
    rate = schedules.learning_rate(o, config.train.steps)
    adam = optax.scale_by_adam(b1=o.beta1, b2=o.beta2, eps=o.eps)
    decayed, links = decay_mask(boxed), []
    if o.freeze:
        frozen = frozen_mask(boxed, o.freeze)
        adam = freeze(adam, frozen)
        decayed = jax.tree.map(lambda d, f: d and not f, decayed, frozen)
    if not (o.freeze and router_bias_frozen(frozen)):
        links = [pid_bias(config.model, o.pid, schedules.pid_gain(o, config.train.steps))]
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        adam,
        optax.add_decayed_weights(o.weight_decay, mask=decayed),
        scale_by_width(rate_multipliers(boxed, config)),
        optax.scale_by_learning_rate(rate),
        *links,
    )
