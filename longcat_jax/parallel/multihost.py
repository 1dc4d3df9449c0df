"""Several processes of one job: how they join, agree, read their rows, and end together.

Every process runs the same program on its own devices. What one of them must do alone (write files,
say things) process 0 does; without `joined` there is one process, and everything here is trivial.

How a job ends: an error in one process is told by that process alone, and ends the others within
seconds (one of JAX itself in half a minute). A process that vanishes is missed by JAX's
coordination service after HEARTBEAT_SECONDS (at once if it was process 0, which holds that
service); the service then aborts every other process, and last_words.py makes one line of what it
says. SIGTERM at any process is a notice to all: they stop at the same step, with a checkpoint.
"""

import atexit
import contextlib
import functools
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the coordination service's key-value store has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from longcat_jax.config import ConfigError

JOIN_SECONDS = 300
HEARTBEAT_SECONDS = 30
SHUTDOWN_SECONDS = 300
"""Wait of a process that is done for the others."""
FIRST_SPEAKS_SECONDS = 2
"""An error that all processes meet is told by process 0: the others wait this long for it."""
FAILED = "longcat/failed"
DAYS_MS = 1 << 31
_number = itertools.count()


@contextlib.contextmanager
def joined(coordinator: str, count: int, index: int) -> Iterator[None]:
    """This process as number `index` of a job's `count`; only process 0 has a standard output.

    Args:
      coordinator: HOST:PORT at which process 0 listens and all reach it.
      count: processes of the job, at least 2.
      index: from 0.

    Raises:
      ConfigError: no such port, or JAX refused. (Where not all come together in JOIN_SECONDS, the
        coordination service aborts the process, as below.)
    """
    end_stderr = _filter_stderr()
    atexit.register(end_stderr)
    if index == 0:
        _check_port(int(coordinator.rpartition(":")[2]))
    else:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"process {index} of {count} at {coordinator}: {reason}") from error
    leave = functools.partial(_leave, index, end_stderr)
    threading.Thread(target=_end_with_others, args=(index, leave), daemon=True).start()
    try:
        yield
    except BaseException as error:
        _end_others(index, error)
        # JAX would wait here for processes that are ending, and then complain.
        atexit.register(leave)
        raise
    jax.distributed.shutdown()


def _check_port(port: int) -> None:
    """JAX's service crashes without a word on a port that it cannot have."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--coordinator: process 0 cannot listen at {port}: {error}") from error


def _filter_stderr() -> Callable[[], None]:
    """Passes stderr through last_words.py; returns what ends that when all has been passed."""
    own, script = os.dup(sys.stderr.fileno()), Path(__file__).with_name("last_words.py")
    reader = subprocess.Popen(
        [sys.executable, "-S", "-E", str(script)], stdin=subprocess.PIPE, start_new_session=True
    )
    os.dup2(reader.stdin.fileno(), sys.stderr.fileno())
    reader.stdin.close()

    def end() -> None:
        sys.stderr.flush()
        os.dup2(own, sys.stderr.fileno())
        with contextlib.suppress(subprocess.TimeoutExpired):
            reader.wait(FIRST_SPEAKS_SECONDS)

    return end


def _end_with_others(index: int, leave: Callable[[], None]) -> None:
    """Ends this process when another one tells of an error; runs in a thread."""
    try:
        failed = distributed.global_state.client.blocking_key_value_get(FAILED, DAYS_MS)
    except jax.errors.JaxRuntimeError:
        return  # the job is over
    who, _, line = failed.partition(" ")
    if int(who) == index:
        return
    if index == 0:
        print(f"stopped: process {who} failed ({line})", file=sys.stderr, flush=True)
    leave()


def _end_others(index: int, error: BaseException) -> None:
    """Tells the other processes that this one fails, and lets it go without waiting for them."""
    causes = [error]
    while causes[-1].__cause__ or causes[-1].__context__:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    if any(isinstance(cause, jax.errors.JaxRuntimeError) for cause in causes):
        # A broken connection looks like this before the service misses the process behind it.
        time.sleep(HEARTBEAT_SECONDS + FIRST_SPEAKS_SECONDS)
    elif index:
        time.sleep(FIRST_SPEAKS_SECONDS)
    line = " ".join(str(error).split()) or type(error).__name__
    try:
        distributed.global_state.client.key_value_set(FAILED, f"{index} {line}")
    except jax.errors.JaxRuntimeError:
        os._exit(1)  # another one was first and tells


def _leave(index: int, end_stderr: Callable[[], None]) -> None:
    sys.stdout.flush()
    if index == 0:
        time.sleep(FIRST_SPEAKS_SECONDS)  # the others learn of the error from what it holds
    end_stderr()
    os._exit(1)


def is_first() -> bool:
    """Whether this process writes the job's files."""
    return jax.process_index() == 0


def _of_first(text: str) -> str:
    """Process 0's `text`, in every process; the others wait for it, however long it takes."""
    client = distributed.global_state.client
    if client is None:
        return text
    key = f"longcat/said/{next(_number)}"
    if is_first():
        client.key_value_set(key, text)
        return text
    return client.blocking_key_value_get(key, DAYS_MS)


def wait_for_all() -> None:
    """Returns when every process is here. Call it between compilation, which may take one process
    longer than others, and the first run: collectives wait for half a minute only.
    """
    client = distributed.global_state.client
    if client is not None:
        client.wait_at_barrier(f"longcat/wait/{next(_number)}", DAYS_MS)


def of_first(value: int) -> int:
    """Process 0's `value`, in every process."""
    return int(_of_first(str(value)))


def first_alone(work: Callable[[], object]) -> None:
    """Does `work` in process 0; the others go on when it is done."""
    if is_first():
        work()
    _of_first("done")


def first_before_others[T](work: Callable[[], T]) -> T:
    """Does `work` in process 0, then in the others, which find there what the first one made."""
    if is_first():
        result = work()
    _of_first("done")
    return result if is_first() else work()


def check_same(text: str, what: str) -> None:
    """Refuses a process whose `text` is not that of process 0; no other goes on then.

    Raises:
      ConfigError: it isn't.
    """
    if _of_first(text) != text:
        raise ConfigError(
            f"process {jax.process_index()}: {what} differs from process 0's; give all processes "
            "the same command"
        )
    wait_for_all()


def check_mesh(mesh: Mesh) -> None:
    """Refuses a mesh that leaves out a process.

    Raises:
      ConfigError: some process has no device in it.
    """
    used = {device.process_index for device in mesh.devices.flat}
    if len(used) < jax.process_count():
        raise ConfigError(
            f"mesh: {mesh.size} devices are in {len(used)} of {jax.process_count()} processes; "
            f"the axes' product must reach every process ({jax.device_count()} devices are here)"
        )


def part_of_rows(sharding: NamedSharding, rows: int) -> tuple[int, int]:
    """(part, parts): this process' devices hold part number `part` of the `parts` equal, successive
    parts of a global batch of `rows` rows. Processes may share a part.

    Raises:
      ConfigError: they hold rows that are not one such part.
    """
    mine = {
        index[0].indices(rows)[:2]
        for index in sharding.addressable_devices_indices_map((rows,)).values()
    }
    start, stop = min(a for a, _ in mine), max(b for _, b in mine)
    size = stop - start
    if sum(b - a for a, b in mine) < size or start % size or rows % size:
        raise ConfigError(
            f"mesh: process {jax.process_index()} would hold rows {sorted(mine)} of a batch; its "
            "devices must be neighbours along the batch's axes"
        )
    return start // size, rows // size


def to_global(batch: Mapping[str, np.ndarray], sharding: NamedSharding, *, rows: int) -> dict:
    """This process' rows of a batch as arrays on the mesh, `rows` of all processes long."""
    return {
        name: jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:]))
        for name, x in batch.items()
    }


@contextlib.contextmanager
def stop_wishes() -> Iterator[Callable[[int], bool]]:
    """Yields f(step): whether to stop after this step; ask after every step.

    One process: the first SIGTERM or SIGINT is a wish to stop, the second one kills as usual. Many:
    SIGTERM at any of them is a wish for all, answered in all after the same step (JAX's preemption
    service handles it); SIGINT the first time is the same.
    """
    asked = []
    many = jax.process_count() > 1

    def handle(number: int, frame: Any) -> None:
        del frame
        asked.append(number)
        name = signal.Signals(number).name
        print(f"{name}: saving after this step; once more to stop at once", flush=True)
        signal.signal(number, signal.SIG_DFL)
        if many:
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = (signal.SIGINT,) if many else (signal.SIGTERM, signal.SIGINT)
    old = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield multihost_utils.reached_preemption_sync_point if many else lambda step: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
