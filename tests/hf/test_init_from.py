"""Fine-tuning: training starts from converted weights."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longcat_jax as lc
from longcat_jax.checkpoint import Checkpoints
from longcat_jax.cli import main as cli_main
from longcat_jax.cli.config_file import load_config
from longcat_jax.config import (
    Config,
    ConfigError,
    MeshConfig,
    OptimConfig,
    TrainConfig,
    to_mapping,
)
from longcat_jax.hf.from_hf import from_hf
from longcat_jax.losses import Batch
from longcat_jax.model.longcat import Model
from longcat_jax.parameters import by_path
from longcat_jax.sharding import batch_sharding, make_mesh
from longcat_jax.train import train
from longcat_jax.train_step import (
    TrainState,
    abstract_state,
    compile_train_step,
    state_from_params,
)
from tests.helpers import tiny_config
from tests.hf.variants import GOLDEN

JOB = """
def get_config():
    return {
        "model": {"nonsense": 1},
        "train": {"steps": 2, "global_batch": 4, "sequence_length": 8},
        "optim": {"learning_rate": 1e-3, "balance": {"groups": 5}},
    }
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    from_hf(GOLDEN / "tiny", folder)
    return folder


@pytest.fixture(scope="module")
def converted_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted_bf16") / "tiny"
    from_hf(GOLDEN / "tiny", folder, dtype="bfloat16")
    return folder


def job(model: Model, **optim: object) -> Config:
    rows = TrainConfig(steps=50, global_batch=4, sequence_length=16, vocab_chunk=50)
    return Config(model.config, rows, OptimConfig(learning_rate=3e-3, **optim))


def batch_of(config: Config) -> Batch:
    """Random ids: the vocabulary of 136 is below byte level."""
    rng = np.random.default_rng(0)
    shape = (config.train.global_batch, config.train.sequence_length + 1)
    return {
        "tokens": rng.integers(0, config.model.vocab_size, shape).astype(np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
    }


def run(config: Config, params: object, steps: int) -> tuple[TrainState, list[float]]:
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state = state_from_params(config, mesh, params)
        step = compile_train_step(config, mesh)
        batch = jax.device_put(batch_of(config), batch_sharding(mesh))
        losses = []
        for _ in range(steps):
            state, metrics = step(state, batch, np.ones(config.model.vocab_size, np.int32))
            losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


@pytest.mark.slow
def test_the_first_loss_is_the_forward_pass_and_50_steps_lower_it(converted: Path) -> None:
    model = lc.load(converted)
    frozen = ("*/experts/*", "layers/mlp/router/*", "embed_tokens")
    config = job(model, freeze=frozen)
    tokens = batch_of(config)["tokens"]
    logits = lc.forward(model, tokens[:, :-1]).logits
    nats = -np.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    before = jax.device_get(model.params)
    state, losses = run(config, model.params, steps=50)
    assert abs(losses[0] - nats.mean()) < 1e-5
    assert losses[-1] < losses[0] - 1
    assert int(state.step) == 50
    for path, old in by_path(before).items():
        same = bool((by_path(state.params)[path] == old).all())
        assert same == ("experts" in path or "router" in path or path == "embed_tokens"), path


def test_an_optimizer_with_frozen_parameters_is_saved_and_read_back(
    converted: Path, tmp_path: Path
) -> None:
    """Frozen parameters have no moments; the state's structure says so on both ways."""
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    model = lc.load(converted, mesh=mesh)
    config = job(model, freeze=("*/experts/*", "layers/mlp/router/*"))
    wanted, state = abstract_state(config, mesh), state_from_params(config, mesh, model.params)
    assert len(jax.tree.leaves(state.opt_state)) == 1 + 2 * (len(by_path(state.params)) - 4) + 1
    optimizer = {"step": state.step, "state": state.opt_state}
    checkpoints = Checkpoints(tmp_path, config.train)
    checkpoints.save(0, params=state.params, optimizer=optimizer, data={}, config={}, metrics=None)
    checkpoints.wait()
    found = checkpoints.restore(0, optimizer={"step": wanted.step, "state": wanted.opt_state})
    checkpoints.close()
    assert jax.tree.structure(found["optimizer"]) == jax.tree.structure(optimizer)
    jax.tree.map(np.testing.assert_array_equal, found["optimizer"], optimizer)


def test_16_bit_weights_are_trained_in_float32_and_the_router_bias_is_kept(
    converted_bf16: Path,
) -> None:
    model = lc.load(converted_bf16)
    config = job(model)
    assert config.model.dtype == "bfloat16" and model.params["norm"].dtype == jnp.bfloat16
    mesh = make_mesh(config.mesh)
    state = state_from_params(config, mesh, model.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    bias = state.params["layers"]["mlp"]["router"]["e_score_correction_bias"]
    stored = model.params["layers"]["mlp"]["router"]["e_score_correction_bias"]
    assert np.abs(stored).max() > 0
    np.testing.assert_array_equal(bias, stored)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_the_command_line_takes_the_model_from_the_checkpoint(
    converted: Path, tmp_path: Path
) -> None:
    (tmp_path / "job.py").write_text(JOB)
    model = lc.load(converted).config
    config = load_config(tmp_path / "job.py", [f"init_from={converted}", "optim.eps=1e-9"])
    assert config.model == model and config.optim.eps == 1e-9
    changed = load_config(
        tmp_path / "job.py", [f"init_from={converted}", "model.routed_scaling_factor=2.0"]
    )
    assert changed.model == dataclasses.replace(model, routed_scaling_factor=2.0)
    with pytest.raises(ConfigError, match="nonsense"):
        load_config(tmp_path / "job.py")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=64", "another model (model.hidden_size: 48 -> 64)"),
        ("model.num_nextn_predict_layers=0", "model.num_nextn_predict_layers: 1 -> 0"),
        ("model.hiden_size=64", "model.hiden_size: unknown name; did you mean 'hidden_size'?"),
        ("optim.freeze=['layers/mlp/expert/*']", "matches no parameter; did you mean"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    override: str,
    message: str,
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "job.py").write_text(JOB)
    arguments = [f"--config={tmp_path / 'job.py'}", f"--workdir={tmp_path / 'run'}"]
    arguments += [f"--config.init_from={converted}", f"--config.{override}"]
    assert cli_main.main(["train", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [3, [1]])
def test_init_from_that_is_no_path_is_refused(value: object, tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(to_mapping(tiny_config()) | {"init_from": value}))
    with pytest.raises(ConfigError, match=re.escape(f"init_from={value}: must be of type str")):
        load_config(path)


def test_init_from_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    with pytest.raises(ValueError, match="no checkpoints here"):
        load_config(tmp_path / "job.py", [f"init_from={tmp_path}"])


def test_a_library_call_with_another_model_is_refused(converted: Path, tmp_path: Path) -> None:
    config = job(lc.load(converted))
    other = dataclasses.replace(config.model, n_routed_experts=5)
    config = dataclasses.replace(config, model=other, init_from=str(converted))
    with pytest.raises(ConfigError, match=r"model.n_routed_experts: 10 -> 5"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
