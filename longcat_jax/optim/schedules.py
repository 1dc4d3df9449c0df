"""Learning-rate schedules: warm-up, then constant and linear decay (WSD), or cosine."""

import optax

from longcat_jax.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Rate at each optimizer step 0..steps-1.

    wsd: linear warm-up over `warmup_steps`, constant, linear to `final_scale` over the last
    `decay_steps`, or over all that the warm-up leaves where that is less. cosine: warm-up, then
    half a cosine. `final_scale` itself is reached where step `steps` would be.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_scale
    warmup = optax.linear_schedule(peak / max(config.warmup_steps, 1), peak, config.warmup_steps)
    rest = steps - config.warmup_steps
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, max(rest, 1), alpha=config.final_scale)
        return optax.join_schedules([warmup, main], [config.warmup_steps])
    # A run cut short (train.steps=200 of a longer job) must still warm up.
    decay_steps = min(config.decay_steps, max(rest, 0))
    decay = optax.linear_schedule(peak, end, max(decay_steps, 1))
    if not decay_steps:
        decay = optax.constant_schedule(peak)
    parts = [warmup, optax.constant_schedule(peak), decay]
    return optax.join_schedules(parts, [config.warmup_steps, steps - decay_steps])


def pid_gain(config: OptimConfig, steps: int) -> optax.Schedule:
    """mu of the router bias' controller: linear from `pid.mu` to `pid.mu_final` over training."""
    return optax.linear_schedule(config.pid.mu, config.pid.mu_final, steps)
