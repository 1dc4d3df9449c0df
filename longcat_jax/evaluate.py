"""Validation: loss and bits per byte of a model, beside what it must beat.

L layers, E router outputs, K selections, W vocabulary.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longcat_jax import baselines, data
from longcat_jax.checkpoint import METRIC
from longcat_jax.config import Config
from longcat_jax.train_step import EvaluationSums, evaluation_step


def token_sizes(config: Config, directory: Path) -> np.ndarray:
    """Bytes of text behind every id of the model's vocabulary, int32 [W]; 0 for ids unused."""
    sizes = data.token_bytes(directory)
    return np.pad(sizes, (0, config.model.vocab_size - len(sizes))).astype(np.int32)


def compile_evaluation(config: Config, mesh: Mesh | None = None) -> Callable[..., EvaluationSums]:
    """The jitted sums of one batch: f(params, batch, token_bytes_W), whole on every device."""
    return jax.jit(
        lambda params, batch, sizes: evaluation_step(params, batch, sizes, config=config),
        out_shardings=mesh and NamedSharding(mesh, PartitionSpec()),
    )


def evaluate(
    params: Any,
    sums_of_batch: Callable[..., EvaluationSums],
    batches: Iterable[Mapping[str, jax.Array]],
    *,
    token_bytes_W: np.ndarray,
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Loss and bits per byte, expert loads [L, E] and histogram of real experts [K + 1].

    Loads and histogram are shares. Sums over batches are taken in float64 on the host.
    """
    total = None
    for batch in batches:
        found = jax.device_get(sums_of_batch(params, batch, token_bytes_W))
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
        total = found if total is None else jax.tree.map(np.add, total, found)
    load_LE = total.load_LE / total.load_LE.sum(-1, keepdims=True)
    histogram = total.real_histogram / total.real_histogram.sum()
    results = {
        METRIC: float(total.nats / total.targets),
        "eval/bits_per_byte": float(total.nats / math.log(2) / max(total.text_bytes, 1)),
        "eval/experts_per_token": float((histogram * np.arange(len(histogram))).sum()),
    }
    return results, load_LE, histogram


def measure_baselines(config: Config, directory: Path, steps: int) -> baselines.Baselines:
    """n-gram models fitted on the batches of training's first `steps` steps, and `xz -9`."""
    stream = data.open_train(config, directory)
    try:
        return baselines.measure(
            itertools.islice(stream, steps),
            data.open_validation(config, directory),
            vocab_size=config.model.vocab_size,
            token_bytes=token_sizes(config, directory),
            text=data.validation_text(config, directory),
        )
    finally:
        stream.close()
