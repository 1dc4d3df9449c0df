"""The model: pure functions with thin Flax modules that declare their parameters."""
