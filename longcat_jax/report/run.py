"""What a workdir says of its run: configuration, metrics, expert load, baselines.

Letters: L layers, E router outputs (real experts, then identity experts).
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from longcat_jax import availability, metrics
from longcat_jax import config as config_lib
from longcat_jax.baselines import BASELINES_FILE

BASELINES = ("unigram", "bigram", "xz")
"""Keys of that file with bits per byte; `longcat evaluate` notes how it found them in others."""


@dataclasses.dataclass(frozen=True)
class ExpertLoad:
    """The last evaluation's line of expert_load.jsonl."""

    step: int
    load_LE: np.ndarray
    """Share of the layer's selections."""
    histogram: np.ndarray
    """[K+1] share of tokens that selected 0..K real experts."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's files, checked."""

    name: str
    config: config_lib.Config
    rows: list[dict[str, Any]]
    """metrics.jsonl."""
    load: ExpertLoad | None
    baselines: dict[str, float]
    """Bits per byte of models that the run should be compared with, by name."""
    availability: str | None
    """Starts, saves and what restarts cost, as a line."""

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a key; a list per layer becomes a row of a matrix, null NaN.

        Raises:
          ValueError: something that isn't a number.
        """
        rows = [row for row in self.rows if key in row]
        values = _numbers([row[key] for row in rows], f"{metrics.METRICS_FILE}: {key!r}")
        return np.array([row["step"] for row in rows], dtype=float), values


def read_run(workdir: Path) -> Run:
    """Everything a report shows.

    Raises:
      OSError: metrics.jsonl or config.json is missing.
      ValueError: a file is empty, corrupt, or doesn't fit the configuration.
    """
    rows = metrics.read_metrics(workdir)
    config = config_lib.from_mapping(config_lib.read_json(workdir / "config.json"))
    load = None
    if (workdir / metrics.EXPERT_LOAD_FILE).exists():
        load = _expert_load(metrics.read_expert_load(workdir)[-1], config.model)
    baselines = {}
    if (workdir / BASELINES_FILE).exists():
        baselines = _baselines(workdir / BASELINES_FILE)
    name, available = workdir.resolve().name, availability.summary(workdir)
    return Run(name, config, rows, load, baselines, available)


def finite(values: np.ndarray) -> np.ndarray:
    """The numbers that are neither NaN nor infinite."""
    return values[np.isfinite(values)]


def _baselines(path: Path) -> dict[str, float]:
    mapping = config_lib.read_json(path)
    mapping = {name: mapping[name] for name in BASELINES if name in mapping}
    values = _numbers(list(mapping.values()), str(path))
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"{path}: must hold one number for each name")
    return dict(zip(mapping, values.tolist(), strict=True))


def _expert_load(line: dict[str, Any], model: config_lib.ModelConfig) -> ExpertLoad:
    shapes = {
        "load": (model.num_layers, model.num_router_outputs),
        "real_experts_histogram": (model.moe_topk + 1,),
    }
    found = {}
    for name, shape in shapes.items():
        where = f"{metrics.EXPERT_LOAD_FILE}: {name!r}"
        found[name] = _numbers(line.get(name), where)
        if found[name].shape != shape:
            raise ValueError(f"{where} has shape {found[name].shape}; config.json makes it {shape}")
    return ExpertLoad(line["step"], found["load"], found["real_experts_histogram"])


def _numbers(values: Any, where: str) -> np.ndarray:
    try:
        return np.array(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} holds something that isn't a number") from error
