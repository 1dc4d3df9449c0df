"""The loop as its users meet it: resume, kills, signals, bad losses, damaged and full disks."""

import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from longcat_jax import data
from longcat_jax.checkpoint import CheckpointError, Checkpoints, load
from longcat_jax.config import Config, ConfigError, MeshConfig, from_mapping, to_mapping
from longcat_jax.metrics import read_metrics
from longcat_jax.train import TrainingStopped, train
from longcat_jax.workdir import locked
from tests.helpers import SIZES

TIMES = ("tokens_per_second", "step_seconds", "input_wait", "tflops")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared data set of made-up sentences."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [f"word{i}" for i in range(50)]
    rng = random.Random(0)
    lines = (json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(200))
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepared = folder / "prepared"
    data.prepare([str(folder / "text.jsonl")], prepared, vocab_size=300, validation=0.1)
    return prepared


@pytest.fixture(autouse=True)
def quick_compilation() -> Iterator[None]:
    """These tests don't time anything; results stay deterministic."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def job(corpus: Path, **train_settings: int | float) -> Config:
    settings = dict(global_batch=4, sequence_length=16, log_every=5, eval_every=10, eval_batches=2)
    settings |= dict(steps=20, checkpoint_every=10, keep_last=5) | train_settings
    return from_mapping(
        dict(
            model={**SIZES, "vocab_size": 300, "dtype": "float32"},
            train=settings,
            optim=dict(learning_rate=3e-3, balance=dict(groups=4)),
            data=dict(sources=dict(text=str(corpus))),
        )
    )


def assert_same_run(first: Path, second: Path, step: int) -> None:
    """Losses, parameters, optimizer state and data position agree bit for bit."""

    def lines(workdir: Path) -> list[dict]:
        return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(workdir)]

    assert lines(first) == lines(second)
    for item in ("params", "optimizer", "data"):
        a, b = (raw(workdir, step, item) for workdir in (first, second))
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def raw(workdir: Path, step: int, item: str) -> object:
    """An item of a checkpoint as stored."""
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(step) / item
    if item == "data":
        return json.loads((folder / "metadata").read_text())
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(folder)


def command(workdir: Path, config: Config, tmp_path: Path) -> list[str]:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(to_mapping(config)))
    return [
        sys.executable,
        "-m",
        "longcat_jax",
        "train",
        f"--config={path}",
        f"--workdir={workdir}",
    ]


def environment() -> dict[str, str]:
    return os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONUNBUFFERED": "1"}


def start(workdir: Path, config: Config, tmp_path: Path, **options: object) -> subprocess.Popen:
    """A training process of its own that has done its first steps."""
    process = subprocess.Popen(
        command(workdir, config, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        **options,
    )
    for line in process.stdout:
        if line.startswith("step ") and "/" in line:
            return process
    raise AssertionError(f"ended early with {process.wait()}")


def test_killed_three_times_equals_uninterrupted(corpus: Path, tmp_path: Path) -> None:
    config = job(corpus, steps=120, eval_every=40, checkpoint_every=10, log_every=1)
    train(config, tmp_path / "whole")
    rng, kills = random.Random(), 0
    for _ in range(3):
        process = start(tmp_path / "killed", config, tmp_path)
        time.sleep(rng.uniform(0.05, 0.6))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert kills > 0, "every process ended before it was killed: the test tests nothing"
    train(config, tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 120)


def test_the_same_command_twice_is_bit_equal_and_a_third_does_nothing(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = job(corpus)
    for name in ("a", "b"):
        train(config, tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b", 20)
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    train(config, tmp_path / "a")
    assert "already trained" in capsys.readouterr().out
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before


def test_log_has_what_it_promises(corpus: Path, tmp_path: Path) -> None:
    train(job(corpus), tmp_path)
    lines = read_metrics(tmp_path)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert [line["step"] for line in evaluations] == [10, 20]
    wanted = "loss_total mtp_loss balance_loss z_loss grad_norm learning_rate pid_mu bits_per_byte"
    wanted += " experts_per_token experts_per_token_std max_load max_load_mean"
    for name in (*wanted.split(), *TIMES):
        assert all(isinstance(line[name], float) for line in steps), name
    assert all(0 <= line["input_wait"] < 1 for line in steps)
    assert len(evaluations[0]["router/cosine"]) == SIZES["num_layers"]
    loads = [json.loads(x) for x in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    assert np.allclose(np.sum(loads[-1]["load"], axis=-1), 1)
    assert len(loads[-1]["real_experts_histogram"]) == SIZES["moe_topk"] + 1
    assert any((tmp_path / "tensorboard").iterdir())


def test_keeps_the_last_and_the_best(corpus: Path, tmp_path: Path) -> None:
    config = job(corpus, steps=40, keep_last=1, keep_best=1, eval_every=10, checkpoint_every=10)
    train(config, tmp_path)
    evaluated = {x["step"]: x["eval/loss"] for x in read_metrics(tmp_path) if "eval/loss" in x}
    best = min(evaluated, key=evaluated.get)
    assert Checkpoints(tmp_path).steps() == sorted({best, 40})


def test_sigterm_saves_and_exits_cleanly(corpus: Path, tmp_path: Path) -> None:
    config = job(corpus, steps=100_000, eval_every=100_000, checkpoint_every=100_000, log_every=1)
    process = start(tmp_path / "run", config, tmp_path)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    (step,) = Checkpoints(tmp_path / "run").steps()
    assert f"step {step}: saved" in output
    assert read_metrics(tmp_path / "run")[-1]["step"] == step
    load(tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    corpus: Path, tmp_path: Path
) -> None:
    good = job(corpus, steps=30, checkpoint_every=10)
    train(good, tmp_path / "good")
    exploding = dataclasses.replace(
        good, optim=dataclasses.replace(good.optim, learning_rate=1e30, warmup_steps=0)
    )
    with pytest.raises(TrainingStopped, match="not finite; no checkpoint yet"):
        train(exploding, tmp_path / "bad")
    assert Checkpoints(tmp_path / "bad").steps() == []


def test_a_loss_spike_stops_with_the_checkpoint_named(corpus: Path, tmp_path: Path) -> None:
    config = job(corpus, steps=200, checkpoint_every=50, eval_every=200, max_loss_rise=0.01)
    with pytest.raises(TrainingStopped, match="max_loss_rise=0.01.*checkpoint of step .* intact"):
        train(config, tmp_path)
    load(tmp_path)


def test_a_workdir_of_another_config_is_refused_and_left_alone(
    corpus: Path, tmp_path: Path
) -> None:
    train(job(corpus), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = dataclasses.replace(job(corpus), seed=7)
    with pytest.raises(ConfigError, match=r"another config \(seed: 0 -> 7\)"):
        train(other, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_keys_that_change_nothing_learnt_may_change(corpus: Path, tmp_path: Path) -> None:
    train(job(corpus), tmp_path)
    train(job(corpus, log_every=1), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["log_every"] == 1


def test_a_workdir_in_use_is_refused(corpus: Path, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match="another process is training"):
        train(job(corpus), tmp_path)


def test_a_truncated_checkpoint_is_named_and_the_earlier_one_loads(
    corpus: Path, tmp_path: Path
) -> None:
    train(job(corpus), tmp_path)
    for path in (tmp_path / "checkpoints" / "20" / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"20: cannot be read \(.*\); remove it .* step 10"):
        train(job(corpus), tmp_path)
    load(tmp_path / "checkpoints" / "10")


def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoints.save

    def save_on_a_disk_that_fills_up(self: Checkpoints, step: int, **items: object) -> None:
        # A file size limit makes the system refuse writes as a full disk does.
        if step == 20:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        save(self, step, **items)
        self.wait()

    monkeypatch.setattr(Checkpoints, "save", save_on_a_disk_that_fills_up)
    try:
        with pytest.raises(CheckpointError, match=r"could not be written .*; intact: 10$"):
            train(job(corpus, steps=30), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert Checkpoints(tmp_path).steps() == [10]
    load(tmp_path)


def test_fine_tuning_starts_from_a_checkpoint_and_refuses_another_shape(
    corpus: Path, tmp_path: Path
) -> None:
    train(job(corpus), tmp_path / "base")
    tuned = dataclasses.replace(job(corpus, steps=2), init_from=str(tmp_path / "base"))
    tuned = dataclasses.replace(tuned, optim=dataclasses.replace(tuned.optim, learning_rate=1e-9))
    train(tuned, tmp_path / "tuned")
    before, after = load(tmp_path / "base").params, load(tmp_path / "tuned").params
    np.testing.assert_allclose(before["lm_head"], after["lm_head"], atol=1e-7)
    wider = dataclasses.replace(tuned, model=dataclasses.replace(tuned.model, hidden_size=32))
    with pytest.raises(ConfigError, match=r"another model \(model.hidden_size: 24 -> 32\)"):
        train(wider, tmp_path / "wider")


def test_trains_on_a_mesh_and_resumes_on_another(corpus: Path, tmp_path: Path) -> None:
    config = job(corpus)
    train(dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2)), tmp_path / "mesh")
    train(config, tmp_path / "one")
    meshed, single = (
        [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]
        for name in ("mesh", "one")
    )
    np.testing.assert_allclose(meshed, single, rtol=2e-4)
    train(dataclasses.replace(config, mesh=MeshConfig(fsdp=4)), tmp_path / "mesh")


def test_profile_is_written(corpus: Path, tmp_path: Path) -> None:
    train(job(corpus, steps=4), tmp_path, profile=(1, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
