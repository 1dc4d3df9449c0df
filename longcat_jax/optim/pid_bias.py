"""PID control of the router bias: real experts per token are steered to K_e (section 2.1.1).

L layers, E = N + Z router outputs, N real experts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from longcat_jax.config import ModelConfig, PidConfig
from longcat_jax.parameters import master_dtype

BIAS_PATH = ("layers", "mlp", "router", "e_score_correction_bias")


class PidState(NamedTuple):
    """Controller memory; every field replicated."""

    count: jax.Array
    """Optimizer steps so far."""
    load_LE: jax.Array
    """Selections since the last bias update."""
    error_LN: jax.Array
    """Error at the last bias update."""
    previous_LN: jax.Array
    """Error at the one before."""


def budget_error(load_LE: jax.Array, config: ModelConfig) -> jax.Array:
    """(K_e / K) / N - T_i / (K T_all) of every real expert [L, N]: its missing share of selections.

    Every token makes K selections, so K T_all is the sum of a layer's loads.
    """
    num_real = config.n_routed_experts
    share = load_LE[:, :num_real] / jnp.maximum(load_LE.sum(-1, keepdims=True), 1)
    return config.moe_topk_real / config.moe_topk / num_real - share


def _replace_bias(tree: Any, value: jax.Array, path: tuple[str, ...] = BIAS_PATH) -> Any:
    if not path:
        return value
    return {**tree, path[0]: _replace_bias(tree[path[0]], value, path[1:])}


def pid_bias(
    model: ModelConfig, pid: PidConfig, gain: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Replaces the router bias' update; must be the chain's last transform.

    In velocity form, with e_n the error over the steps since the last bias update:

      b <- b + kp (e_n - e_{n-1}) + mu e_n + kd (e_n - 2 e_{n-1} + e_{n-2})   for i < N

    so that (0, mu, 0) is the paper's b_i += mu (K_e/K/N - T_i/(K T_all)). Identity experts' biases
    keep the value they have. `update` takes `load_LE`, the selections of every expert over the
    whole global batch of this optimizer step, as an extra argument: counted once, whatever
    accumulation and rematerialisation do.

    Args:
      model: sizes, K and K_e.
      pid: kp, kd and the number of optimizer steps between bias updates.
      gain: mu by optimizer step.
    """

    def init(params: optax.Params) -> PidState:
        del params  # not even looked at: optax.tree.map_params passes placeholders
        dtype = master_dtype(model)
        load_LE = jnp.zeros((model.num_layers, model.num_router_outputs), dtype)
        error_LN = jnp.zeros((model.num_layers, model.n_routed_experts), dtype)
        return PidState(jnp.zeros((), jnp.int32), load_LE, error_LN, error_LN)

    def update(
        updates: optax.Updates,
        state: PidState,
        params: optax.Params | None = None,
        *,
        load_LE: jax.Array,
        **extra: Any,
    ) -> tuple[optax.Updates, PidState]:
        del params, extra
        load = state.load_LE + load_LE.astype(state.load_LE.dtype)
        now = (state.count + 1) % pid.every == 0
        error, last, before = budget_error(load, model), state.error_LN, state.previous_LN
        # The first update has no past: differences are taken as zero.
        last = jnp.where(state.count < pid.every, error, last)
        before = jnp.where(state.count < 2 * pid.every, last, before)
        delta = pid.kp * (error - last) + gain(state.count) * error
        delta += pid.kd * (error - 2 * last + before)
        identity = load.shape[-1] - model.n_routed_experts
        delta_LE = jnp.pad(jnp.where(now, delta, 0), ((0, 0), (0, identity)))
        state = PidState(
            count=state.count + 1,
            load_LE=jnp.where(now, 0, load),
            error_LN=jnp.where(now, error, state.error_LN),
            previous_LN=jnp.where(now, last, state.previous_LN),
        )
        return _replace_bias(updates, delta_LE), state

    return optax.GradientTransformationExtraArgs(init, update)
