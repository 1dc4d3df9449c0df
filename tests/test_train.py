"""The loop as its users meet it: resume, kills, signals, bad losses, damaged and full disks."""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from longcat_jax import data
from longcat_jax.checkpoint import CheckpointError, Checkpoints, load
from longcat_jax.config import (
    Config,
    ConfigError,
    MeshConfig,
    ParallelConfig,
    from_mapping,
    to_mapping,
)
from longcat_jax.metrics import read_metrics
from longcat_jax.train import TrainingStopped, train
from longcat_jax.workdir import claim, locked, read_config
from tests.helpers import MOST_PARAMETERS, SIZES, train_here

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


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[dict[str, str]]:
    """These tests don't time anything; the environment for processes of their own is returned."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    jax.config.update("jax_disable_most_optimizations", False)


def job(corpus: Path, **train_settings: int | float) -> Config:
    settings = dict(global_batch=4, sequence_length=16, log_every=1, eval_every=20, eval_batches=2)
    settings |= dict(steps=60, checkpoint_every=10, keep_last=9) | train_settings
    return from_mapping(
        dict(
            model={**SIZES, "vocab_size": 300, "dtype": "float32"},
            train=settings,
            optim=dict(learning_rate=3e-3, balance=dict(groups=4)),
            data=dict(sources=dict(text=str(corpus))),
        )
    )


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of an uninterrupted run of `job(corpus)`; tests copy what they change."""
    workdir = tmp_path_factory.mktemp("trained")
    train(job(corpus), workdir)
    return workdir


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained`."""
    return Path(shutil.copytree(trained, tmp_path / "copied"))


def back_to(workdir: Path, step: int) -> None:
    """Makes a workdir what it was when it had just saved this step."""
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)


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


def start(
    workdir: Path, config: Config, settings: dict[str, str], *, until: int = 1
) -> subprocess.Popen:
    """A training process of its own that has logged step `until` or a later one."""
    path = workdir.with_suffix(".json")
    path.write_text(json.dumps(to_mapping(config)))
    process = subprocess.Popen(
        [sys.executable, "-m", "longcat_jax", "train", f"--config={path}", f"--workdir={workdir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | settings | {"PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        logged = re.match(r"step (\d+)/", line)
        if logged and int(logged[1]) >= until:
            return process
    raise AssertionError(f"ended early with {process.wait()}")


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_uninterrupted(
    times: int, corpus: Path, trained: Path, tmp_path: Path, quick_compilation: dict[str, str]
) -> None:
    moments = sorted(random.SystemRandom().sample(range(2, 56), times))
    print("killed at steps", moments)
    for moment in moments:
        process = start(tmp_path / "killed", job(corpus), quick_compilation, until=moment)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    train(job(corpus), tmp_path / "killed")
    assert_same_run(trained, tmp_path / "killed", 60)


def test_a_bfloat16_run_resumes_to_the_same_bits(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks' weights in bfloat16 are not saved, but made from those that are."""
    config = job(corpus, checkpoint_every=2)
    model = dataclasses.replace(config.model, dtype="bfloat16")
    config = dataclasses.replace(config, model=model)
    # Before its first evaluation, whose program need not be compiled for this.
    train_here(config, tmp_path / "whole", monkeypatch, stop=3)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    back_to(tmp_path / "resumed", 2)
    train_here(config, tmp_path / "resumed", monkeypatch, stop=3)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", 3)


@pytest.mark.slow
def test_the_same_command_twice_is_bit_equal_with_a_profile_too(
    corpus: Path, trained: Path, tmp_path: Path
) -> None:
    train(job(corpus), tmp_path / "again", profile=(1, 3))
    assert_same_run(trained, tmp_path / "again", 60)
    assert list((tmp_path / "again" / "profile").rglob("*.xplane.pb"))


def test_a_finished_run_is_left_alone_but_may_be_kept_differently(
    corpus: Path, copied: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (copied / "metrics.jsonl").read_bytes()
    train(job(corpus, log_every=7), copied)
    assert "already trained" in capsys.readouterr().out
    assert (copied / "metrics.jsonl").read_bytes() == before
    assert json.loads((copied / "config.json").read_text())["train"]["log_every"] == 7


def test_log_has_what_it_promises(trained: Path) -> None:
    lines = read_metrics(trained)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert [line["step"] for line in evaluations] == [20, 40, 60]
    wanted = "loss_total mtp_loss balance_loss z_loss grad_norm learning_rate pid_mu bits_per_byte"
    wanted += " experts_per_token experts_per_token_std max_load max_load_mean selections_left_out"
    for name in (*wanted.split(), *TIMES):
        assert all(isinstance(line[name], float) for line in steps), name
    assert all(0 <= line["input_wait"] < 1 for line in steps)
    assert len(evaluations[0]["router/cosine"]) == SIZES["num_layers"]
    loads = [json.loads(x) for x in (trained / "expert_load.jsonl").read_text().splitlines()]
    assert np.allclose(np.sum(loads[-1]["load"], axis=-1), 1)
    assert len(loads[-1]["real_experts_histogram"]) == SIZES["moe_topk"] + 1
    assert any((trained / "tensorboard").iterdir())


# Of the quick tests, tests/optim steers a synthetic router.
@pytest.mark.slow
def test_without_the_controller_budget_and_balance_are_missed(
    corpus: Path, trained: Path, tmp_path: Path
) -> None:
    config = job(corpus, eval_every=1000, checkpoint_every=1000)
    pid = dataclasses.replace(config.optim.pid, mu=0.0, mu_final=0.0)
    train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, pid=pid)), tmp_path)

    def last(workdir: Path, name: str) -> float:
        lines = [line[name] for line in read_metrics(workdir) if name in line]
        return float(np.mean(lines[-20:]))

    target = SIZES["moe_topk_real"]
    steered, left_alone = (abs(last(w, "experts_per_token") - target) for w in (trained, tmp_path))
    assert steered < 0.5 * left_alone
    assert last(trained, "max_load_mean") < 0.8 * last(tmp_path, "max_load_mean")


def test_keeps_the_last_and_the_best(corpus: Path, copied: Path) -> None:
    back_to(copied, 50)
    train(job(corpus, keep_last=1, keep_best=1), copied)
    evaluated = {x["step"]: x["eval/loss"] for x in read_metrics(copied) if "eval/loss" in x}
    best = min(evaluated, key=evaluated.get)
    assert Checkpoints(copied).steps() == sorted({best, 60})


def test_sigterm_saves_and_exits_cleanly(
    corpus: Path, tmp_path: Path, quick_compilation: dict[str, str]
) -> None:
    config = job(corpus, steps=100_000, eval_every=100_000, checkpoint_every=100_000)
    model = dataclasses.replace(config.model, num_nextn_predict_layers=0)
    optim = dataclasses.replace(config.optim, freeze=MOST_PARAMETERS)
    config = dataclasses.replace(config, model=model, optim=optim)
    process = start(tmp_path / "run", config, quick_compilation)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    (step,) = Checkpoints(tmp_path / "run").steps()
    assert f"step {step}: saved" in output
    assert read_metrics(tmp_path / "run")[-1]["step"] == step
    load(tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_and_nothing_of_it_is_saved(
    corpus: Path, tmp_path: Path
) -> None:
    config, rate = job(corpus), dict(learning_rate=1e30, warmup_steps=0)
    optim = dataclasses.replace(config.optim, freeze=MOST_PARAMETERS, **rate)
    with pytest.raises(TrainingStopped, match="not finite; no checkpoint yet"):
        train(dataclasses.replace(config, optim=optim), tmp_path)
    assert Checkpoints(tmp_path).steps() == []


@pytest.mark.slow
def test_a_loss_spike_stops_with_the_checkpoint_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longcat_jax.train.LOSS_WINDOW", 15)
    with pytest.raises(
        TrainingStopped, match="max_loss_rise=1e-06.*checkpoint of step .0 is intac"
    ):
        train(job(corpus, max_loss_rise=1e-6), tmp_path)
    load(tmp_path)


def test_a_workdir_of_another_config_is_refused_and_left_alone(corpus: Path, copied: Path) -> None:
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    other = dataclasses.replace(job(corpus), seed=7)
    with pytest.raises(ConfigError, match=r"another config \(seed: 0 -> 7\)"):
        train(other, copied)
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


def test_a_workdir_in_use_is_refused(corpus: Path, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match="another process is training"):
        train(job(corpus), tmp_path)


def test_a_truncated_checkpoint_is_named_and_the_earlier_one_loads(
    corpus: Path, copied: Path
) -> None:
    for path in (copied / "checkpoints" / "60" / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"60: cannot be read \(.*\); remove it .* step 50"):
        train(job(corpus), copied)
    load(copied / "checkpoints" / "50")


# Orbax abandons coroutines of a failed save; closing them finds their loop gone. Those that a later
# test closes are named in .pytest.ini.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(
    corpus: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoints.save

    def save_on_a_disk_that_fills_up(self: Checkpoints, step: int, **items: object) -> None:
        # A file size limit makes the system refuse writes as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        save(self, step, **items)
        self.wait()

    back_to(copied, 50)
    monkeypatch.setattr(Checkpoints, "save", save_on_a_disk_that_fills_up)
    try:
        with pytest.raises(CheckpointError, match=r"could not be written .*; intact: 10, .*, 50$"):
            train(job(corpus), copied)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert Checkpoints(copied).steps()[-1] == 50
    load(copied)


def test_fine_tuning_starts_from_a_checkpoint_and_refuses_another_shape(
    corpus: Path, trained: Path, tmp_path: Path
) -> None:
    tuned = dataclasses.replace(job(corpus), init_from=str(trained))
    train(tuned, tmp_path / "tuned")
    assert read_config(tmp_path / "tuned").init_from == str(trained / "checkpoints" / "60")
    first, before, last = (
        read_metrics(tmp_path / "tuned")[0]["loss"],
        read_metrics(trained)[0]["loss"],
        min(line["loss"] for line in read_metrics(trained) if "loss" in line),
    )
    assert abs(first - last) < 0.2 * (before - last)
    wider = dataclasses.replace(tuned, model=dataclasses.replace(tuned.model, hidden_size=32))
    with pytest.raises(ConfigError, match=r"another model \(model.hidden_size: 24 -> 32\)"):
        train(wider, tmp_path / "wider")


# Of the quick tests, test_multihost.py resumes on another mesh.
@pytest.mark.slow
def test_resumes_on_a_mesh_of_four_devices(corpus: Path, trained: Path, copied: Path) -> None:
    back_to(copied, 50)
    train(dataclasses.replace(job(corpus), mesh=MeshConfig(data=2, fsdp=2)), copied)
    losses, alone = (
        [line["loss"] for line in read_metrics(workdir) if "loss" in line]
        for workdir in (copied, trained)
    )
    np.testing.assert_allclose(losses, alone, rtol=1e-3)


def test_how_a_step_is_computed_may_change_and_other_ways_to_experts_are_told(
    corpus: Path, copied: Path, capsys: pytest.CaptureFixture
) -> None:
    other = job(corpus, accumulate=2, remat="full", unroll=2)
    claim(copied, other)
    assert capsys.readouterr().out == ""
    gathered = dataclasses.replace(other, mesh=MeshConfig(expert=2))
    claim(copied, gathered)
    line = "experts: allgather, dropless from here on; dense, dropless so far\n"
    assert capsys.readouterr().out == line
    parallel = ParallelConfig(expert_backend="all_to_all", dropless=False, token_chunks=2)
    limited = dataclasses.replace(gathered, parallel=parallel)
    claim(copied, limited)
    line = "experts: all_to_all, room for 1.5x from here on; allgather, dropless so far\n"
    assert capsys.readouterr().out == line
    assert read_config(copied) == limited


def test_a_tuned_run_goes_on_when_its_base_has_gone(
    corpus: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = dataclasses.replace(job(corpus), init_from=str(tmp_path / "gone"))
    stored = to_mapping(config) | {"init_from": str(tmp_path / "gone" / "checkpoints" / "60")}
    (copied / "config.json").write_text(json.dumps(stored))
    train(config, copied)
    assert "already trained" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no checkpoints here"):
        train(config, tmp_path / "another")


def test_a_job_that_never_saved_gives_way_to_its_correction(corpus: Path, tmp_path: Path) -> None:
    wrong = dataclasses.replace(
        job(corpus), data=dataclasses.replace(job(corpus).data, sources={"text": "nowhere"})
    )
    with pytest.raises(data.DataError, match="nowhere"):
        train(wrong, tmp_path)
    claim(tmp_path, job(corpus))
    assert read_config(tmp_path) == job(corpus)


def test_data_without_validation_are_refused_before_the_first_step(
    corpus: Path, tmp_path: Path
) -> None:
    text = corpus.parent / "text.jsonl"
    tokenizer = str(corpus / "tokenizer.json")
    data.prepare([str(text)], tmp_path / "all", tokenizer_path=tokenizer, validation=0)
    with pytest.raises(data.DataError, match="no validation documents"):
        train(job(tmp_path / "all"), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_other_data_under_the_same_name_are_noticed_on_resume(
    corpus: Path, copied: Path, tmp_path: Path
) -> None:
    prepared = tmp_path / "prepared"
    shutil.copytree(corpus, prepared)
    shutil.copytree(copied, tmp_path / "run")
    config = job(prepared)
    checkpoint = tmp_path / "run" / "checkpoints" / "60" / "data" / "metadata"
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_mapping(config)))
    train(config, tmp_path / "run")
    changed = checkpoint.read_text().replace('"content": {"text": "', '"content": {"text": "0')
    checkpoint.write_text(changed)
    with pytest.raises(data.DataError, match="data.sources.text: holds other data"):
        train(config, tmp_path / "run")
    for damaged in ('{"step": 3}', "[1]"):
        checkpoint.write_text(damaged)
        with pytest.raises(CheckpointError, match="60: cannot be read"):
            train(config, tmp_path / "run")


def test_a_profile_outside_of_the_steps_to_come_is_refused(corpus: Path, copied: Path) -> None:
    with pytest.raises(ConfigError, match="--profile=3:9: START must be in the steps to come"):
        train(job(corpus), copied, profile=(3, 9))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_dtype_that_would_not_be_what_it_says_is_refused(
    dtype: str, corpus: Path, tmp_path: Path
) -> None:
    config = job(corpus)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    with pytest.raises(ConfigError, match=f"model.dtype='{dtype}'"):
        train(config, tmp_path)
    assert not any(tmp_path.iterdir())
