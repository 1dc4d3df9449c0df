"""How a run starts: its precision, its parameters, and what a checkpoint it starts from brings."""

import dataclasses
from pathlib import Path

import jax

from longcat_jax import workdir
from longcat_jax.checkpoint import (
    FOLDER,
    TOKENIZER,
    finished_steps,
    load,
    locate,
    saved_model_config,
)
from longcat_jax.config import SHAPE_FIELDS, Config, ConfigError, differences, to_mapping
from longcat_jax.sharding import Mesh
from longcat_jax.train_step import TrainState, init_state, state_from_params


def new_state(config: Config, mesh: Mesh) -> TrainState:
    """Random parameters, or those of `init_from`; fresh optimizer, step 0."""
    if not config.init_from:
        return init_state(config, mesh)
    return state_from_params(config, mesh, load(config.init_from, mesh=mesh).params)


def resolved(config: Config, directory: Path) -> Config:
    """The job with `init_from` naming the one checkpoint that it means.

    A run that has saved needs that checkpoint no more; it may have moved on or gone.

    Raises:
      ConfigError: a checkpoint of a model of other shapes.
    """
    if not config.init_from:
        return config
    start = workdir.started_from(directory, config.init_from)
    if start is None:
        _check_shapes(config)
        base, step = locate(config.init_from)
        start = base / FOLDER / str(step)
    return dataclasses.replace(config, init_from=str(start))


def _check_shapes(config: Config) -> None:
    model = to_mapping(saved_model_config(config.init_from))
    shapes = tuple(f"model.{name}: " for name in SHAPE_FIELDS)
    lines = differences(model, to_mapping(config.model), "model")
    changed = [line for line in lines if line.startswith(shapes)]
    if changed:
        raise ConfigError(f"init_from={config.init_from!r}: another model ({'; '.join(changed)})")


def reading(config: Config, directory: Path) -> Config:
    """The job as the data see it: one that starts from a checkpoint has its tokenizer."""
    if not config.init_from or config.data.tokenizer:
        return config
    folder = directory if finished_steps(directory) else locate(config.init_from)[0]
    if not (folder / TOKENIZER).is_file():
        return config
    settings = dataclasses.replace(config.data, tokenizer=str(folder / TOKENIZER))
    return dataclasses.replace(config, data=settings)


def check_dtype(config: Config) -> None:
    """Refuses what would train in another precision than it says, or lose small gradients."""
    dtype = config.model.dtype
    if dtype == "float16":
        raise ConfigError(
            "model.dtype='float16': must be bfloat16, float32 or float64 for training; gradients "
            "of a large batch vanish in float16"
        )
    if dtype == "float64" and not jax.config.jax_enable_x64:
        raise ConfigError("model.dtype='float64': needs JAX_ENABLE_X64=1 in the environment")
