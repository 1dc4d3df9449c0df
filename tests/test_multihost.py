"""Jobs of two processes: same numbers as one process, and every way in which such a job can end.

A job is real: two processes of `longcat train`, joined at a port of this machine, on fake devices.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from longcat_jax import availability, data
from longcat_jax.availability import AvailabilityLog
from longcat_jax.checkpoint import Checkpoints
from longcat_jax.cli import placement
from longcat_jax.config import Config, ConfigError, from_mapping, to_mapping
from longcat_jax.metrics import MetricsWriter, read_metrics
from longcat_jax.parallel import last_words, multihost
from longcat_jax.train import train
from tests.helpers import MOST_PARAMETERS, SIZES, exact, train_here

TIMES = ("tokens_per_second", "step_seconds", "input_wait", "tflops")
ROOT = Path(__file__).parents[1]
STOPPED_EARLY = 75


def job(corpus: Path, *, freeze: tuple[str, ...] = (), **sections: dict[str, int]) -> Config:
    """A job in float64 that saves after every second step."""
    train_settings = dict(global_batch=8, sequence_length=12, log_every=1, eval_batches=2)
    train_settings |= dict(steps=1000, eval_every=1000, checkpoint_every=2, keep_last=99)
    return from_mapping(
        dict(
            model={**SIZES, "vocab_size": 300, "dtype": "float64", **sections.get("model", {})},
            train=train_settings | sections.get("train", {}),
            optim=dict(learning_rate=3e-3, balance=dict(groups=4), freeze=freeze),
            data=dict(sources=dict(text=str(corpus))),
            mesh=sections["mesh"],
        )
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared data set of made-up sentences."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    texts = (" ".join(f"word{i}" for i in rng.integers(0, 50, 60)) for _ in range(100))
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    data.prepare([str(folder / "text.jsonl")], folder / "out", vocab_size=300, validation=0.1)
    return folder / "out"


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with exact():
        yield


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Job:
    """The processes of a job; leaving the context kills what is left of it."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        *,
        before: tuple[str, ...] = (),
        options: Sequence[tuple[str, ...]] = ((), ()),
    ) -> None:
        processes = len(options)
        self.workdir = workdir
        workdir.mkdir(parents=True, exist_ok=True)
        path, port = workdir.with_suffix(".json"), free_port()
        path.write_text(json.dumps(to_mapping(config)))
        devices = np.prod(list(to_mapping(config)["mesh"].values())) // processes
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_ENABLE_X64": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # jax has set it in this process
        command = [*before, sys.executable, "-m", "longcat_jax", "train"]
        command += [f"--config={path}", f"--workdir={workdir}"]
        command += [f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
        self.outputs = [workdir.with_suffix(f".{i}.out").open("w+") for i in range(processes)]
        self.errors = [workdir.with_suffix(f".{i}.err").open("w+") for i in range(processes)]
        self.processes = [
            subprocess.Popen(
                [*command, f"--process_id={i}", *options[i]],
                stdout=self.outputs[i],
                stderr=self.errors[i],
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
            for i in range(processes)
        ]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for file in (*self.outputs, *self.errors):
            file.close()

    def text(self, index: int, *, errors: bool = False) -> str:
        """What a process has written so far, without gloo's chatter."""
        file = (self.errors if errors else self.outputs)[index]
        lines = Path(file.name).read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("[Gloo]"))

    def until(self, happened: Callable[[], bool], *, seconds: float = 240) -> None:
        """Waits for something that this job does."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, self.everything()
            assert any(process.poll() is None for process in self.processes), self.everything()
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        """Waits until a step that is `step` or later has been logged."""

        def logged() -> bool:
            steps = re.findall(r"^step (\d+)/", self.text(0), re.MULTILINE)
            return bool(steps) and int(steps[-1]) >= step

        self.until(logged)

    def statuses(self, *, seconds: float = 240) -> list[int]:
        """Exit statuses of all, when all have ended."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running:\n{self.everything()}") from None
        return [process.returncode for process in self.processes]

    def everything(self) -> str:
        """All output, for a failing test."""
        parts = [
            f"-- {i}\n{self.text(i)}\n{self.text(i, errors=True)}"
            for i in range(len(self.processes))
        ]
        return "\n".join(parts)


def copy_until(workdir: Path, step: int, target: Path) -> None:
    """A copy of a workdir as it was when it had just saved this step."""
    shutil.copytree(workdir, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def raw(workdir: Path, step: int, item: str) -> dict:
    """An item of a checkpoint as stored."""
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(step) / item
    if item == "data":
        return json.loads((folder / "metadata").read_text())
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # whatever devices it was saved from
    with ocp.StandardCheckpointer() as reader:
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            reader.metadata(folder).item_metadata.tree,
        )
        return reader.restore(folder, wanted)


def lines(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(workdir)]


def assert_same_run(first: Path, second: Path, step: int, *, error: float = 0.0) -> None:
    """Metrics up to `step`, and its checkpoint: parameters, optimizer, data position.

    `error`: of numbers, as max|d| / max|g| of an array; 0: the same bits.
    """
    one, two = ([x for x in lines(w) if x["step"] <= step] for w in (first, second))
    assert [x.keys() for x in one] == [x.keys() for x in two]
    assert [x["step"] for x in one if "loss" in x] == list(range(1, step + 1))
    pairs = [(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in a]
    for item in ("params", "optimizer"):
        trees = [raw(workdir, step, item) for workdir in (first, second)]
        assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
        pairs += zip(*map(jax.tree.leaves, trees), strict=True)
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
        assert worst <= error, f"{worst} between {a} and {b}"
    assert raw(first, step, "data") == raw(second, step, "data")


def test_two_processes_go_on_from_one_and_stop_together(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = dict(mesh=dict(data=2, fsdp=2), model=dict(num_nextn_predict_layers=0))
    config = job(corpus, freeze=MOST_PARAMETERS, **sections)
    train_here(config, tmp_path / "alone", monkeypatch, stop=4)
    copy_until(tmp_path / "alone", 2, tmp_path / "both")
    with Job(config, tmp_path / "both") as run:
        run.until_step(4)
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.statuses() == [STOPPED_EARLY] * 2, run.everything()
        last = Checkpoints(tmp_path / "both").steps()[-1]
        assert run.text(0).endswith(f"step {last}: saved in {tmp_path}/both/checkpoints\n")
        assert run.text(1) == run.text(0, errors=True) == run.text(1, errors=True) == ""
    assert [line["step"] for line in lines(tmp_path / "both")] == list(range(1, last + 1))
    assert_same_run(tmp_path / "both", tmp_path / "alone", 4, error=1e-10)
    stated = availability.summary(tmp_path / "both")
    assert re.search(r"1 restarts, 2 steps done again .*, \d+ saves with", stated), stated


def test_last_words_make_one_line_of_an_abort_and_pass_the_rest() -> None:
    abort = b"F1123 06:21:10 186 client.h:86] " + last_words.ABORTS + b". This most likely\n"
    page = [b"x\n", abort, b"UNAVAILABLE: stopped sending heartbeats):\n", b"3\n", b"@ 0x7f\n"]
    first, second = last_words.passed(page)
    assert first == b"x\n"
    assert (
        second.startswith(b"stopped: process 3 of this job is gone;") and second.count(b"\n") == 1
    )
    again = b"ABORTED: 12 unexpectedly tried to connect with a different incarnation.\n"
    (line,) = last_words.passed([abort + again])
    assert line.startswith(b"stopped: process 12 of this job is gone;")
    (line,) = last_words.passed([abort, b"Failed to send RPC to coordination service\n"])
    assert line.startswith(b"stopped: process 0 of this job, or the way to it, is gone;")
    (line,) = last_words.passed([abort, b"RPC: /xla.coordination/RegisterTask\n"])
    assert b"did not come together" in line


def place(*flags: str | int | None, **environ: str) -> placement.Placement | None:
    names = dict(zip(placement.FLAGS, flags or (None,) * 3, strict=True))
    return placement.find(argparse.Namespace(**names), environ)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu-[003-004,7],login", "gpu-003"),
        ("a[1,3]-ib,b2", "a1-ib"),
    ],
)
def test_slurm_s_variables_place_a_process(nodes: str, host: str) -> None:
    found = place(
        SLURM_JOB_ID="1234567",
        SLURM_STEP_NODELIST=nodes,
        SLURM_STEP_NUM_TASKS="4",
        SLURM_PROCID="3",
    )
    assert found == placement.Placement(f"{host}:19567", 4, 3)
    # A batch script itself has no step: what runs in it without srun is a process alone.
    assert place(SLURM_JOB_ID="1", SLURM_PROCID="0", SLURM_NTASKS="4") is None


def test_options_place_a_process_and_are_checked() -> None:
    assert place("a:1", 3, 2, SLURM_JOB_ID="1") == placement.Placement("a:1", 3, 2)
    assert place("::1:65535", 1, 0) == placement.Placement("::1:65535", 1, 0)
    for flags, message in (
        (("a:1", None, 0), "--num_processes: missing"),
        (("a", 2, 0), "--coordinator=a: must be HOST:PORT"),
        (("a:0", 2, 0), "--coordinator=a:0: must be .* PORT from 1 to 65535"),
        (("a:65536", 0, 0), "--coordinator=a:65536: must be .* PORT from 1 to 65535"),
        (("a:1", 0, 0), "--num_processes=0: must be at least 1"),
        (("a:1", 2, 2), "--process_id=2: must be from 0 to"),
    ):
        with pytest.raises(ValueError, match=message):
            place(*flags)


@dataclasses.dataclass
class FakeSharding:
    """Rows (start, stop) on each device of a process."""

    rows: list[tuple[int | None, int | None]]

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        del shape
        return {i: (slice(*rows),) for i, rows in enumerate(self.rows)}


def test_a_process_reads_the_rows_of_its_devices() -> None:
    assert multihost.part_of_rows(FakeSharding([(12, 15), (15, 18)]), 24) == (2, 4)
    assert multihost.part_of_rows(FakeSharding([(0, 12), (0, 12), (12, 24)]), 24) == (0, 1)
    assert multihost.part_of_rows(FakeSharding([(None, None)] * 2), 24) == (0, 1)
    for scattered in ([(0, 3), (12, 15)], [(3, 6), (6, 9)]):
        with pytest.raises(ConfigError, match="must be neighbours"):
            multihost.part_of_rows(FakeSharding(scattered), 24)


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen at {port}"):
            multihost._check_port(port)


def test_availability_counts_what_restarts_cost(tmp_path: Path) -> None:
    assert availability.summary(tmp_path) is None
    AvailabilityLog(tmp_path / "nowhere", writes=False).start(0, processes=2)
    log = AvailabilityLog(tmp_path, writes=True)
    log.start(0, processes=2)
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.write(step, {"loss": 1.0, "step_seconds": 2.0})
    log.save(5, stall_seconds=0.25)
    log.start(5, processes=1)
    log.stop(7, reason="finished")
    events = [json.loads(x) for x in (tmp_path / availability.FILE).read_text().splitlines()]
    assert [x["event"] for x in events] == ["start", "save", "start", "stop"]
    assert (events[2]["lost_steps"], events[2]["lost_seconds"]) == (2, 4.0)
    text = availability.summary(tmp_path)
    assert text.endswith("1 restarts, 2 steps done again (4 s), 1 saves with 0.2 s of stall")


def test_availability_of_a_run_that_goes_on_is_up_to_its_last_event(tmp_path: Path) -> None:
    start = dict(time=100.0, event="start", step=0, lost_steps=0, lost_seconds=0.0)
    save = dict(time=120.0, event="save", step=3, stall_seconds=0.5)
    (tmp_path / availability.FILE).write_text(f"{json.dumps(start)}\n{json.dumps(save)}\n")
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 7):
            writer.write(step, {"loss": 1.0, "step_seconds": 5.0})
    assert availability.summary(tmp_path).startswith("75.0% of 20 s in steps that count, ")


JOBS = ROOT / "docs" / "jobs"
SUPERVISED = ("sh", str(JOBS / "supervise.sh"))


def supervised(*command: str) -> subprocess.Popen:
    """`command` under its supervisor, in a process group of its own."""
    return subprocess.Popen(
        [*SUPERVISED, *command], stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_a_supervisor_between_two_starts_ends_at_sigterm(tmp_path: Path) -> None:
    count = tmp_path / "starts"
    with supervised("sh", "-c", f"echo >> {count}; exit 3") as process:
        assert "status 3, starting again" in process.stderr.readline()
        time.sleep(0.3)
        signalled = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)  # returns when the pause's own process has ended too
        assert process.returncode == 3
        assert time.monotonic() - signalled < 4
    assert count.read_text() == "\n"


def test_a_supervisor_passes_sigterm_on_and_ends_with_its_command() -> None:
    with supervised(
        "sh", "-c", "trap 'sleep 0.2; exit 75' TERM; echo up >&2; while :; do sleep 0.1; done"
    ) as process:
        assert process.stderr.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75


@pytest.mark.parametrize(
    ("status", "seconds", "restarts", "requeued"),
    [
        (0, 100, 0, False),
        (1, 50, 0, False),
        (1, 60, 0, True),
        (1, 60, 100, False),
        (2, 60, 0, False),
        (75, 1, 0, True),
    ],
)
def test_slurm_s_job_goes_back_into_the_queue(
    tmp_path: Path, status: int, seconds: int, restarts: int, *, requeued: bool
) -> None:
    """With an `srun` that ends after `seconds` of bash's clock, and an `scontrol` that speaks."""
    functions = f"srun() {{ SECONDS={seconds}; return {status}; }}; scontrol() {{ echo $*; }}"
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(
        ["bash", "-c", f"{functions}; source {JOBS / 'slurm.sh'}"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "requeue 7\n" if requeued else "")


# The whole model, trained by two processes of four devices each.
SPREAD = dict(data=2, expert=4)
LAST = 10


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    with Job(spread_job(corpus), workdir) as run:
        assert run.statuses() == [0, 0], run.everything()
    return workdir


def spread_job(corpus: Path) -> Config:
    return job(corpus, mesh=SPREAD, train=dict(steps=LAST, eval_every=5))


@pytest.mark.slow
def test_two_processes_equal_one(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    train(spread_job(corpus), tmp_path / "alone")
    assert_same_run(uninterrupted, tmp_path / "alone", LAST, error=1e-10)
    # Adam's first moments are sums of gradients: the first checkpoint's compare those.
    assert_same_run(uninterrupted, tmp_path / "alone", 2, error=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_the_job_and_supervisors_restart_it(
    corpus: Path, uninterrupted: Path, tmp_path: Path, victim: int
) -> None:
    workdir = tmp_path / "killed"
    with Job(spread_job(corpus), workdir, before=SUPERVISED) as run:
        run.until_step(5)
        kill_child(run.processes[victim])
        killed = time.monotonic()
        gone = f"stopped: process {victim} of this job"
        run.until(lambda: gone in run.text(1 - victim, errors=True))
        assert time.monotonic() - killed < 60
        assert run.statuses() == [0, 0], run.everything()
        for index in (0, 1):
            said = run.text(index, errors=True).splitlines()
            assert any(line.startswith("supervise: status") for line in said)
            others = [line for line in said if gone not in line and "supervise:" not in line]
            assert set(others) <= {"", "Killed", "Aborted"}, run.everything()
    assert_same_run(workdir, uninterrupted, LAST)
    assert "1 restarts" in availability.summary(workdir)


def kill_child(supervisor: subprocess.Popen) -> None:
    """kill -9 of what a supervisor has started."""
    path = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children")
    (child,) = path.read_text().split()
    os.kill(int(child), signal.SIGKILL)


@pytest.mark.slow
def test_sigterm_to_one_stops_both_and_one_alone_goes_on(
    corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    workdir, config = tmp_path / "stopped", spread_job(corpus)
    with Job(config, workdir) as run:
        run.until_step(2)
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.statuses() == [STOPPED_EARLY] * 2, run.everything()
    last = Checkpoints(workdir).steps()[-1]
    assert 2 < last < LAST
    assert [line["step"] for line in lines(workdir) if "loss" in line] == list(range(1, last + 1))
    train(config, workdir)
    # One process adds gradients of eight devices in another order than two processes.
    assert_same_run(workdir, uninterrupted, LAST, error=1e-10)


@pytest.mark.slow
def test_a_save_that_a_kill_interrupts_is_no_checkpoint(
    corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    workdir, config = tmp_path / "torn", spread_job(corpus)
    folder = workdir / "checkpoints"

    def saving_step_4() -> bool:
        return any(path.name.startswith("4.") for path in folder.glob("*"))

    with Job(config, workdir) as run:
        run.until(saving_step_4)
        for process in run.processes:
            process.kill()
        assert run.statuses() == [-signal.SIGKILL] * 2
    assert saving_step_4() and Checkpoints(workdir).steps() == [2]
    with Job(config, workdir) as run:
        assert run.statuses() == [0, 0], run.everything()
        assert "resuming from step 2" in run.text(0)
    assert not saving_step_4()
    assert_same_run(workdir, uninterrupted, LAST)


@pytest.mark.slow
def test_restart_on_another_mesh_and_other_processes(
    corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    copy_until(uninterrupted, 6, tmp_path / "moved")
    other = job(corpus, mesh=dict(fsdp=2, expert=2), train=dict(steps=LAST, eval_every=5))
    with Job(other, tmp_path / "moved") as run:
        assert run.statuses() == [0, 0], run.everything()
    assert_same_run(tmp_path / "moved", uninterrupted, LAST, error=1e-9)


@pytest.mark.slow
def test_an_error_is_told_once_and_ends_all(corpus: Path, tmp_path: Path) -> None:
    with Job(job(tmp_path / "nowhere", mesh=SPREAD), tmp_path / "all") as run:
        assert run.statuses(seconds=60) == [1, 1], run.everything()
        told = run.text(0, errors=True)
        assert told.startswith("longcat train: ") and "nowhere" in told and told.count("\n") == 1
        assert run.text(1, errors=True) == ""
    other = [(), ("--config.seed=4",)]
    with Job(spread_job(corpus), tmp_path / "one", options=other) as run:
        assert run.statuses(seconds=60) == [1, 1], run.everything()
        reason = (
            "process 1: the config differs from process 0's; give all processes the same command"
        )
        assert run.text(0, errors=True) == f"stopped: process 1 failed ({reason})\n"
        assert run.text(1, errors=True) == f"longcat train: {reason}\n"
    assert not (tmp_path / "one" / "config.json").exists()
