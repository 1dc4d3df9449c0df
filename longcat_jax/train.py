"""The training loop: data in, steps, log, evaluations, checkpoints; resumes what the workdir holds.

Order inside a step: next batch, jitted step, then, where due, log (the only place that waits for
the device), evaluation, checkpoint. Per-step metrics stay on the device until the next log. A
checkpoint is written only after the log has seen that every loss before it is finite.

A job of many processes runs this same loop in each; process 0 alone writes files other than
checkpoints (parallel/multihost.py).
"""

import contextlib
import dataclasses
import functools
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from longcat_jax import data, start, workdir
from longcat_jax.availability import AvailabilityLog
from longcat_jax.checkpoint import Checkpoints
from longcat_jax.config import Config, ConfigError, to_mapping
from longcat_jax.evaluate import METRIC, compile_evaluation, evaluate, token_sizes
from longcat_jax.metrics import (
    METRICS_FILE,
    MetricsWriter,
    console_line,
    evaluation_line,
    read_metrics,
)
from longcat_jax.model import count
from longcat_jax.optim.frozen import frozen_mask
from longcat_jax.parallel import multihost
from longcat_jax.plan import hardware
from longcat_jax.sharding import Mesh, batch_sharding, make_mesh
from longcat_jax.train_step import (
    TrainState,
    abstract_boxes,
    abstract_state,
    compile_train_step,
    resumed_state,
    router_watch,
)

LOSS_WINDOW = 100


class TrainingStopped(ValueError):
    """Training that must not go on (a loss that is not finite or rose too far)."""


@dataclasses.dataclass
class _Progress:
    """Times of the log interval that is open."""

    started: float
    steps: int = 0
    waited: float = 0.0
    """Seconds the host waited for input."""


class Trainer:
    """One process' run of a job; `train` is the way in."""

    def __init__(self, config: Config, directory: Path, mesh: Mesh) -> None:
        self.config, self.directory, self.mesh = config, directory, mesh
        self.reading = start.reading(config, directory)
        rows = batch_sharding(mesh), config.train.global_batch
        self.part = dict(
            zip(("process_index", "process_count"), multihost.part_of_rows(*rows), strict=True)
        )
        self.iterator = multihost.first_before_others(self._open_data)
        self.token_bytes = token_sizes(config, directory / workdir.DATA)
        self.watched = self._on_mesh(next(self._validation()))
        self.checkpoints = Checkpoints(directory, config.train)
        self.writer = MetricsWriter(directory, writes=multihost.is_first())
        self.availability = AvailabilityLog(directory, writes=multihost.is_first())
        self.state, self.step = self._start()
        self.recent = deque(_losses_so_far(directory, self.step), maxlen=LOSS_WINDOW)
        self.pending: list[tuple[int, Mapping[str, jax.Array]]] = []
        self.flops_per_token = count.training_flops_per_token(
            config.model, config.train.sequence_length
        )

    def _open_data(self) -> Iterator[Mapping[str, np.ndarray]]:
        iterator = data.open_train(self.reading, self.directory / workdir.DATA, **self.part)
        if multihost.is_first():
            workdir.keep_tokenizer(self.directory)
        return iterator

    def _start(self) -> tuple[TrainState, int]:
        """The state of the last checkpoint, or a new one; metrics and data are set to its step."""
        step = multihost.of_first(max(self.checkpoints.steps(), default=0))
        state = self._restored(step) if step else start.new_state(self.config, self.mesh)
        multihost.first_alone(lambda: self._forget_after(step))
        return state, step

    def _forget_after(self, step: int) -> None:
        self.availability.start(step, processes=jax.process_count())
        self.writer.truncate_after(step)

    def _restored(self, step: int) -> TrainState:
        wanted = abstract_state(self.config, self.mesh)
        found = self.checkpoints.restore(
            step,
            params=wanted.params,
            optimizer={"step": wanted.step, "state": wanted.opt_state},
            data=None,
        )
        try:
            self.iterator.set_state(found["data"])
        except (KeyError, TypeError) as error:
            raise self.checkpoints.read_error(step, ValueError(f"data: {error!r}")) from error
        optimizer = found["optimizer"]
        print(f"resuming from step {step}", flush=True)
        return resumed_state(
            self.config,
            self.mesh,
            step=optimizer["step"],
            params=found["params"],
            opt_state=optimizer["state"],
        )

    def _compile(self) -> Callable:
        """The step, compiled before the clock of the first interval runs."""
        started, train = time.perf_counter(), self.config.train
        shape = (train.global_batch, train.sequence_length + 1)
        row = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(self.mesh))
        batch = dict.fromkeys(("tokens", "segment_ids", "positions"), row)
        step = compile_train_step(self.config, self.mesh)
        compiled = step.lower(self.state, batch, self.token_bytes).compile()
        multihost.wait_for_all()
        print(f"step compiled in {time.perf_counter() - started:.1f} s", flush=True)
        return compiled

    @functools.cached_property
    def _evaluation(self) -> tuple[Callable, Callable]:
        """The sums of a validation batch and the router's watch, compiled at their first use."""
        params, batch = self.state.working(), self.watched
        watch = jax.jit(
            lambda params, batch: router_watch(params, batch, config=self.config),
            out_shardings=NamedSharding(self.mesh, PartitionSpec()),
        )
        sums = compile_evaluation(self.config, self.mesh)
        compiled = (
            sums.lower(params, batch, self.token_bytes).compile(),
            watch.lower(params, batch).compile(),
        )
        multihost.wait_for_all()
        return compiled

    def loop(self, *, stop_asked: Callable[[int], bool], profile: tuple[int, int] | None) -> None:
        """Runs to train.steps, or to the first step of which `stop_asked` says so."""
        settings, run_step = self.config.train, self._compile()
        progress = _Progress(time.perf_counter())
        with contextlib.ExitStack() as tracing:
            while self.step < settings.steps:
                if profile and self.step == profile[0] and multihost.is_first():
                    tracing.enter_context(_trace(self.directory / "profile"))
                self._one_step(run_step, progress)
                if profile and self.step == profile[1]:
                    jax.block_until_ready(self.state)
                    tracing.close()
                last = self.step == settings.steps or stop_asked(self.step)
                if last or self.step % settings.log_every == 0 or self._pauses():
                    self._log(progress)
                    progress = _Progress(time.perf_counter())
                if self._pauses() or last:
                    self._pause(last=last)
                    progress = _Progress(time.perf_counter())
                if last:
                    break

    def _one_step(self, run_step: Callable, progress: _Progress) -> None:
        before = time.perf_counter()
        batch = next(self.iterator)
        progress.waited += time.perf_counter() - before
        self.state, metrics = run_step(self.state, self._on_mesh(batch), self.token_bytes)
        self.step += 1
        progress.steps += 1
        self.pending.append((self.step, metrics))

    def _pauses(self) -> bool:
        settings = self.config.train
        return self.step % settings.eval_every == 0 or self.step % settings.checkpoint_every == 0

    def _pause(self, *, last: bool) -> None:
        """Evaluation and checkpoint, where due after this step."""
        settings, results = self.config.train, None
        if self.step % settings.eval_every == 0 or self.step == settings.steps:
            results = self._evaluate()
        if self.step % settings.checkpoint_every == 0 or last:
            self._save(results)

    def _on_mesh(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        rows = self.config.train.global_batch
        return multihost.to_global(batch, batch_sharding(self.mesh), rows=rows)

    def _log(self, progress: _Progress) -> None:
        """Writes the pending steps' metrics, prints the last one's, and stops on a bad loss."""
        fetched = jax.device_get(self.pending)
        seconds = time.perf_counter() - progress.started
        tokens = self.config.train.global_batch * self.config.train.sequence_length
        rate = tokens * progress.steps / seconds
        shared = {
            "tokens_per_second": rate,
            "step_seconds": seconds / progress.steps,
            "input_wait": progress.waited / seconds,
            "tflops": rate * self.flops_per_token / 1e12,
        }
        peak = _peak_flops(self.mesh)
        if peak:
            shared["mfu"] = rate * self.flops_per_token / peak
        for step, metrics in fetched:
            line = {name: float(value) for name, value in metrics.items()} | shared
            self.writer.write(step, line)
        self.writer.flush()
        self.pending.clear()
        left = (self.config.train.steps - self.step) * shared["step_seconds"]
        line = {"step": self.step, **line}
        total = self.config.train.steps
        print(console_line(line, total_steps=total, eta_seconds=left), flush=True)
        for step, metrics in fetched:
            self._check(step, float(metrics["loss"]), float(metrics["grad_norm"]))

    def _check(self, step: int, loss: float, grad_norm: float) -> None:
        """Raises TrainingStopped on a loss or gradient that is not finite, or a loss spike."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._stopped(f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite")
        if len(self.recent) == LOSS_WINDOW:
            usual, rise = statistics.median(self.recent), self.config.train.max_loss_rise
            if loss > usual + rise:
                raise self._stopped(
                    f"step {step}: loss {loss:.3f} is more than train.max_loss_rise={rise} above "
                    f"the last {LOSS_WINDOW} steps' median {usual:.3f}"
                )
        self.recent.append(loss)

    def _stopped(self, reason: str) -> TrainingStopped:
        saved = self.checkpoints.steps()
        kept = f"the checkpoint of step {saved[-1]} is intact" if saved else "no checkpoint yet"
        return TrainingStopped(f"{reason}; {kept}")

    def _evaluate(self) -> dict[str, float]:
        sums_of_batch, watch = self._evaluation
        params = self.state.working()
        results, load, histogram = evaluate(
            params,
            sums_of_batch,
            map(self._on_mesh, self._validation()),
            token_bytes_W=self.token_bytes,
        )
        watched = jax.device_get(watch(params, self.watched))
        self.writer.write(self.step, {**results, **watched})
        self.writer.write_expert_load(self.step, load_LE=load, real_experts_histogram=histogram)
        self.writer.flush()
        line = {"step": self.step, **results}
        print(evaluation_line(line, total_steps=self.config.train.steps), flush=True)
        return results

    def _validation(self) -> Iterator[Mapping[str, np.ndarray]]:
        folder = self.directory / workdir.DATA
        return iter(data.open_validation(self.reading, folder, **self.part))

    def _save(self, results: Mapping[str, float] | None) -> None:
        before = time.perf_counter()
        self.checkpoints.save(
            self.step,
            params=self.state.params,
            optimizer={"step": self.state.step, "state": self.state.opt_state},
            data=self.iterator.get_state(),
            config=to_mapping(self.config),
            metrics={METRIC: results[METRIC]} if results else None,
        )
        self.availability.save(self.step, stall_seconds=time.perf_counter() - before)

    def close(self) -> None:
        """Waits for the last checkpoint and ends threads."""
        self.iterator.close()
        self.writer.close()
        self.checkpoints.close()


def _losses_so_far(directory: Path, step: int) -> list[float]:
    """Losses before a resumed step, so that a spike is judged as if uninterrupted."""
    if step == 0 or not (directory / METRICS_FILE).exists():
        return []
    return [line["loss"] for line in read_metrics(directory) if line.get("loss") is not None]


def _peak_flops(mesh: Mesh) -> float:
    """bf16 FLOP/s of the whole mesh, 0 where the device is not known: no MFU is shown then."""
    machine = hardware.of_device(mesh.devices.flat[0].device_kind)
    return machine.flops * mesh.size if machine else 0.0


@contextlib.contextmanager
def _trace(directory: Path) -> Iterator[None]:
    with jax.profiler.trace(str(directory)):
        yield
    print(f"profile written to {directory}", flush=True)


def describe(config: Config, mesh: Mesh) -> str:
    """The job in two lines."""
    model, train = config.model, config.train
    total = count.total_parameters(model) + count.mtp_parameters(model)
    active = count.active_parameters(model, model.moe_topk_real)
    sizes = " ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    device = mesh.devices.flat[0].device_kind
    return (
        f"{total / 1e6:.2f} M parameters with the MTP head, {active / 1e6:.2f} M active per token; "
        f"{model.n_routed_experts} real + {model.zero_expert_num} identity experts\n"
        f"{train.steps} steps of {train.global_batch} x {train.sequence_length} tokens on "
        f"{mesh.size} x {device} {sizes}".rstrip()
    )


def train(config: Config, directory: Path, *, profile: tuple[int, int] | None = None) -> bool:
    """Trains `config` in `directory` to its last step, going on from what is there.

    Each process of a job calls it, with the same arguments and a directory that all of them see.

    Args:
      config: the job.
      directory: the workdir; made if missing.
      profile: (start, stop) steps between which a trace is written to `directory`/profile.

    Returns:
      Whether the last step is done: a signal may have come first.

    Raises:
      ConfigError: the workdir holds another job, the mesh doesn't fit the devices, or processes
        of a job were given different configs.
      DataError: data that cannot be read.
      CheckpointError: a checkpoint that cannot be read or written.
      TrainingStopped: a loss that is not finite, or a spike.
    """
    start.check_dtype(config)
    config = start.resolved(config, directory)
    frozen_mask(abstract_boxes(config), config.optim.freeze)  # refuses before anything is written
    mesh = make_mesh(config.mesh)
    multihost.check_mesh(mesh)
    multihost.check_same(json.dumps(to_mapping(config)), "the config")
    lock = workdir.locked(directory) if multihost.is_first() else contextlib.nullcontext()
    with lock, jax.set_mesh(mesh), multihost.stop_wishes() as stop_asked:
        multihost.first_alone(lambda: workdir.claim(directory, config))
        print(describe(config, mesh), flush=True)
        trainer = Trainer(config, directory, mesh)
        try:
            if profile and not trainer.step <= profile[0] < config.train.steps:
                raise ConfigError(
                    f"--profile={profile[0]}:{profile[1]}: START must be in the steps to come, "
                    f"{trainer.step} to {config.train.steps - 1}"
                )
            if trainer.step < config.train.steps:
                trainer.loop(stop_asked=stop_asked, profile=profile)
            else:
                print(f"{directory}: already trained to step {trainer.step}", flush=True)
        except BaseException as error:
            with contextlib.suppress(OSError, ValueError):  # the first error is the one to tell
                reason = str(error) or type(error).__name__
                trainer.availability.stop(trainer.step, reason=reason)
                trainer.close()
            raise
        trainer.close()
        finished = trainer.step >= config.train.steps
        trainer.availability.stop(trainer.step, reason="finished" if finished else "signal")
    print(f"step {trainer.step}: saved in {trainer.checkpoints.directory}", flush=True)
    return finished
