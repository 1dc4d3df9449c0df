"""Training speed of a configuration on this machine: tokens per second, MFU, where the time goes.

    python -m experiments.bench.train_step --config=configs/mini_2b.py [--steps=20] [--kernels=25]
        [--no-peer] [--config.train.global_batch=8 ...]

Rows are one segment of random tokens each, fixed draws, a new batch every step; FLOPs are those of
the model at K_e real experts per token (SPEC), whatever the router does; it is printed what it did.
Where transformers is installed and one device is asked for, its step on the same batches from the
same weights stands beside ours (transformers_peer.py says what is counted), and both losses before
the first update.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # JAX's own limit is 0.75

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import decode, step_profile, timing, transformers_peer
from longcat_jax.cli.config_file import load_config
from longcat_jax.config import Config
from longcat_jax.model import count
from longcat_jax.sharding import batch_sharding, make_mesh
from longcat_jax.train_step import compile_train_step, init_state

PROFILED = 3


def random_batches(config: Config, number: int) -> list[dict[str, np.ndarray]]:
    """Whole rows of random tokens."""
    rng = np.random.default_rng(config.seed)
    shape = config.train.global_batch, config.train.sequence_length + 1
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return [
        {
            "tokens": rng.integers(0, config.model.vocab_size, shape, dtype=np.int32),
            "segment_ids": np.ones(shape, np.int32),
            "positions": positions,
        }
        for _ in range(number)
    ]


class Run:
    """A compiled train step with its state, and batches on the devices."""

    def __init__(self, config: Config) -> None:
        self.mesh = mesh = make_mesh(config.mesh)
        jax.set_mesh(mesh)
        batches = random_batches(config, 4)
        self.batches = [jax.device_put(batch, batch_sharding(mesh)) for batch in batches]
        token_bytes = jnp.full(config.model.vocab_size, 4, jnp.int32)
        self.state = init_state(config, mesh)
        start = time.perf_counter()
        step = compile_train_step(config, mesh)
        self.lowered = step.lower(self.state, self.batches[0], token_bytes)
        self.compiled = self.lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.token_bytes = token_bytes
        self.done = 0

    def step(self) -> dict[str, jax.Array]:
        """Runs one step without waiting for it -> metrics."""
        batch = self.batches[self.done % len(self.batches)]
        self.state, metrics = self.compiled(self.state, batch, self.token_bytes)
        self.done += 1
        return metrics

    def seconds_per_step(self, steps: int) -> float:
        """Median over fifths of the run, so that one hiccup doesn't count."""
        jax.block_until_ready(self.step())
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(max(1, steps // 5)):
                metrics = self.step()
            jax.block_until_ready(metrics)
            times.append((time.perf_counter() - start) / max(1, steps // 5))
        return statistics.median(times)


def _profile(run: Run) -> list[step_profile.Kernel]:
    """Kernels of PROFILED steps."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                metrics = run.step()
            jax.block_until_ready(metrics)
        return step_profile.kernels(Path(folder), run.compiled.as_text())


def print_breakdown(run: Run, kernels: int) -> None:
    """Profiles PROFILED steps and prints a table by part of the model."""
    # A graph's kernels don't say which operation they are: they are told apart in a program that
    # launches one by one, and the gaps between them are those of the real one.
    found = _profile(run)
    idle = step_profile.idle(found) / PROFILED
    total, beside = (time / PROFILED / 1e6 for time in step_profile.communication(found))
    if total:
        print(f"communication {total:.1f} ms a step, {beside:.1f} of them beside other kernels")
    run.compiled = run.lowered.compile(compiler_options={"xla_gpu_enable_command_buffer": ""})
    jax.block_until_ready(run.step())
    found = _profile(run)
    parts = {**step_profile.breakdown(found), "idle": (idle * PROFILED, 0)}
    whole = sum(time for time, _ in parts.values())
    rows = {
        part: [f"{time / PROFILED / 1e6:.2f}", f"{time / whole:.1%}", f"{launches // PROFILED}"]
        for part, (time, launches) in parts.items()
    }
    timing.table("part of a step", ["ms", "share", "launches"], rows)
    for description, spent, launches in step_profile.longest(found, kernels):
        print(f"{spent / PROFILED / 1e6:8.3f} ms {launches // PROFILED:5d} x  {description}")


def measure_peer(config: Config) -> transformers_peer.Training:
    """transformers' figures; see transformers_peer.py for where this may run.

    Raises:
      LeftOut: a mesh of several devices, or no peer.
    """
    if config.mesh.num_devices > 1:
        raise transformers_peer.LeftOut("it is measured on one device")
    theirs = transformers_peer.load(decode.random_model(config.model, config.seed, config.proxy))
    return transformers_peer.train(theirs, [batch["tokens"] for batch in random_batches(config, 4)])


def report(config: Config, steps: int, kernels: int, peer: bool) -> None:
    """Measures and prints."""
    theirs = transformers_peer.apart(measure_peer, config) if peer else None
    run = Run(config)
    first_loss = float(run.step()["loss"])
    seconds = run.seconds_per_step(steps)
    metrics: Any = jax.device_get(run.step())
    tokens = config.train.global_batch * config.train.sequence_length
    flops = count.training_flops_per_token(config.model, config.train.sequence_length)
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    share = flops * tokens / seconds / timing.machine().flops / jax.device_count()
    print(
        f"{jax.device_count()} x {device.device_kind}, {config.train.global_batch} x "
        f"{config.train.sequence_length} tokens, remat {config.train.remat}: {1e3 * seconds:.1f} "
        f"ms, {tokens / seconds:,.0f} tokens/s, {share:.1%} MFU; peak memory {memory / 1e9:.1f} "
        f"GB; compiled in {run.compile_seconds:.0f} s; loss {float(metrics['loss']):.3f}, "
        f"{float(metrics['experts_per_token']):.2f} real experts per token",
        flush=True,
    )
    if theirs:
        print(
            f"{theirs.description}, {theirs.how}: {1e3 * theirs.seconds:.1f} ms, "
            f"{tokens / theirs.seconds:,.0f} tokens/s; ours is {theirs.seconds / seconds:.2f} "
            f"times as fast; loss before the first update {theirs.loss:.4f}, ours "
            f"{first_loss:.4f}",
            flush=True,
        )
    if kernels:
        print_breakdown(run, kernels)


def main() -> None:
    """Parses the command line and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kernels", type=int, default=25, help="kernels listed; 0: no profile")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    args, rest = parser.parse_known_args()
    if strange := [text for text in rest if not text.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    overrides = [text.removeprefix("--config.") for text in rest]
    report(load_config(args.config, overrides), args.steps, args.kernels, args.peer)


if __name__ == "__main__":
    main()
