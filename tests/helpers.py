"""A tiny model and batches for the tests of the model, the optimizer and the train step.

All sizes differ pairwise and none is 1, so that a swapped dim cannot pass; those that a mesh of
2 x 2 x 2 cuts divide by 4, and batch and experts by 8.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from longcat_jax.config import Config, from_mapping
from longcat_jax.losses import Batch
from longcat_jax.model import longcat
from longcat_jax.parallel import multihost
from longcat_jax.parameters import Box, is_box
from longcat_jax.sharding import batch_sharding, make_mesh
from longcat_jax.train import train
from longcat_jax.train_step import (
    TrainState,
    abstract_state,
    compile_train_step,
    state_from_params,
)

BATCH, TOKENS = 16, 12

SIZES = dict(
    vocab_size=44,
    hidden_size=24,
    num_layers=2,
    num_attention_heads=3,
    q_lora_rank=28,
    kv_lora_rank=20,
    qk_nope_head_dim=5,
    qk_rope_head_dim=6,
    v_head_dim=7,
    ffn_hidden_size=18,
    expert_ffn_hidden_size=10,
    n_routed_experts=8,
    zero_expert_num=9,
    moe_topk=4,
    moe_topk_real=2.5,
    routed_scaling_factor=1.7,
    initializer_range=0.3,
    rope_theta=10000.0,
)

# A job that freezes these trains one matrix and the router biases: it compiles in a third of the
# time.
MOST_PARAMETERS = ("embed_tokens", "layers/*norm*", "layers/self*", "layers/mlps*")
MOST_PARAMETERS += ("layers/mlp/experts/*", "layers/mlp/router/classifier")


def tiny_config(**sections: dict[str, Any]) -> Config:
    """The tiny job in float64; `model=dict(dtype="float32")` and the like replace single fields."""
    base: dict[str, dict[str, Any]] = {
        "model": {**SIZES, "dtype": "float64"},
        "train": {
            "steps": 50,
            "global_batch": BATCH,
            "sequence_length": TOKENS,
            "vocab_chunk": 15,
        },
        # z_weight is large enough for a wrong z-loss to show.
        "optim": {
            "learning_rate": 3e-3,
            "z_weight": 1e-2,
            "mtp_weight": 0.4,
            "balance": {"alpha": 0.2, "groups": 4},
        },
    }
    for name, fields in sections.items():
        base[name] = {**base.get(name, {}), **fields} if isinstance(fields, dict) else fields
    return from_mapping(base)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """float64, and quick compilation (these tests don't time anything); not to be nested."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def random_params(config: Config, seed: int = 0) -> Any:
    """Random parameters as numpy: matrices as initialised, norms off 1 and router biases off 0."""
    rng, model = np.random.default_rng(seed), config.model
    dtype = np.float64 if model.dtype == "float64" else np.float32

    def one(box: Box) -> np.ndarray:
        center, width = {"norm": (1, 0.1), "bias": (0, 0.05)}.get(
            box.role, (0, model.initializer_range)
        )
        return (center + width * rng.normal(size=box.value.shape)).astype(dtype)

    boxed = jax.eval_shape(lambda key: longcat.init(model, key, config.proxy), jax.random.key(0))
    return jax.tree.map(one, boxed, is_leaf=is_box)


def random_batch(config: Config, seed: int = 0, *, rows: int = 0) -> Batch:
    """Packed rows: several segments each, of uneven lengths; padding at the end of most."""
    rng = np.random.default_rng(seed)
    rows, width = rows or config.train.global_batch, config.train.sequence_length + 1
    segment_ids = np.zeros((rows, width), np.int32)
    positions = np.zeros((rows, width), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(2, width), size=2, replace=False))
        end = width if row % 3 == 0 else rng.integers(cuts[-1], width)
        for index, (start, stop) in enumerate(zip((0, *cuts), (*cuts, end), strict=True)):
            segment_ids[row, start:stop] = index + 1
            positions[row, start:stop] = np.arange(stop - start)
    tokens = rng.integers(0, config.model.vocab_size, (rows, width)).astype(np.int32)
    tokens[segment_ids == 0] = 0
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}


def token_bytes(config: Config) -> np.ndarray:
    """Bytes of text of every token, some of them 0."""
    return np.arange(config.model.vocab_size, dtype=np.int32) % 5


@dataclasses.dataclass(frozen=True)
class Trained:
    """A few steps of the tiny job, alternately on random batches 0 and 1."""

    losses: list[dict[str, float]]
    """Metrics of every step."""
    states: list[TrainState]
    """State after every step."""
    kept: bool
    """Whether every leaf of the last state had the shardings and dtypes of `abstract_state`."""
    lowered: str
    """Text of the program before XLA's passes."""
    compiled: str
    """Text of the program after them."""
    run: Callable[[Batch], tuple[TrainState, dict[str, float]]]
    """One step from the start on any batch."""


@functools.cache
def trained(
    *,
    steps: int = 5,
    accumulate: int = 1,
    remat: str = "none",
    unroll: int = 1,
    mesh: tuple[tuple[str, int], ...] = (),
    parallel: tuple[tuple[str, Any], ...] = (),
    model: tuple[tuple[str, Any], ...] = (),
) -> Trained:
    """Trains the tiny job from `random_params`; once a session. Call it inside of `exact`."""
    train = {"accumulate": accumulate, "remat": remat, "unroll": unroll}
    sections = {"mesh": dict(mesh), "parallel": dict(parallel), "model": dict(model)}
    config = tiny_config(train=train, **sections)
    devices = make_mesh(config.mesh)
    weights = token_bytes(config)

    def start() -> TrainState:
        return state_from_params(config, devices, random_params(config))

    def advance(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, float]]:
        placed = jax.device_put(batch, batch_sharding(devices))
        state, metrics = compiled(state, placed, weights)
        return state, {name: float(value) for name, value in metrics.items()}

    batches = [random_batch(config, seed) for seed in (0, 1)]
    with jax.set_mesh(devices):
        placed = jax.device_put(batches[0], batch_sharding(devices))
        lowered = compile_train_step(config, devices).lower(start(), placed, weights)
        compiled = lowered.compile()
        state, losses, states = start(), [], []
        for index in range(steps):
            state, metrics = advance(state, batches[index % 2])
            losses.append(metrics)
            states.append(jax.device_get(state))
    kept = jax.tree.map(
        lambda x, wanted: (
            x.dtype == wanted.dtype and x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
        ),
        state,
        abstract_state(config, devices),
    )
    texts = lowered.as_text(), compiled.as_text()
    return Trained(
        losses, states, jax.tree.all(kept), *texts, lambda batch: advance(start(), batch)
    )


def relative_error(actual: Any, expected: Any) -> float:
    """Worst max|d| / max|g| over the leaves of two trees of one structure."""

    def one(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))

    errors = jax.tree.map(one, actual, expected)
    assert jax.tree.leaves(errors), "nothing to compare"
    return max(jax.tree.leaves(errors))


def with_leaf(tree: Any, path: str, change: Callable[[Any], Any]) -> Any:
    """A copy of a tree of dicts in which the leaf at `a/b/c` is changed."""
    first, _, rest = path.partition("/")
    new = with_leaf(tree[first], rest, change) if rest else change(tree[first])
    return {**tree, first: new}


def train_here(
    config: Config, workdir: Path, monkeypatch: pytest.MonkeyPatch, *, stop: int
) -> None:
    """Trains in this process up to step `stop`."""
    wishes = contextlib.nullcontext(lambda step: step == stop)
    monkeypatch.setattr(multihost, "stop_wishes", lambda: wishes)
    assert not train(config, workdir)
