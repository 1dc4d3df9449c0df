"""The optimizer: Optax transforms, schedules, and the chain they form."""
