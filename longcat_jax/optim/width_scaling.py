"""Learning rates by parameter role and width (section 3.1.1; the table is in parameters.py)."""

from typing import Any, NamedTuple

import jax
import optax

from longcat_jax.config import Config
from longcat_jax.parameters import Box, is_box, width_ratio

Roles = Any
"""A parameter tree with a role name at every leaf."""


def roles(boxed: Any) -> Roles:
    """Role of every parameter of a (possibly abstract) tree of boxes."""
    return jax.tree.map(lambda box: box.role, boxed, is_leaf=is_box)


def decay_mask(boxed: Any) -> Any:
    """True for the parameters that weight decay pulls: all but norms and biases."""
    return jax.tree.map(lambda role: role not in ("norm", "bias"), roles(boxed))


def rate_multipliers(boxed: Any, config: Config) -> Any:
    """Factor on the learning rate of every parameter: 1/s, the router's with its own factor."""

    def one(box: Box) -> float:
        own = config.optim.router_scale if box.role == "router" else 1.0
        return own / width_ratio(box, config.model, config.proxy)

    return jax.tree.map(one, boxed, is_leaf=is_box)


class ScaleByWidthState(NamedTuple):
    """Stateless."""


def scale_by_width(multipliers: Any) -> optax.GradientTransformation:
    """Multiplies each update by its parameter's factor: u_i <- m_i u_i.

    Stands behind Adam and weight decay, so that both follow the scaled rate.

    Args:
      multipliers: tree like the parameters, of floats.
    """

    def init(params: optax.Params) -> ScaleByWidthState:
        del params
        return ScaleByWidthState()

    def update(
        updates: optax.Updates, state: ScaleByWidthState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByWidthState]:
        del params
        return jax.tree.map(lambda u, m: u * m, updates, multipliers), state

    return optax.GradientTransformation(init, update)
