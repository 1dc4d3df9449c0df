"""Moves tensors piece by piece, several at a time, and says how far it is.

Memory is bounded by workers x piece (store.PIECE), whatever the model's size.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import numpy as np
from tqdm import tqdm

from longcat_jax.hf.layout import Tensor
from longcat_jax.hf.staging import Staging
from longcat_jax.hf.store import piece_rows


@dataclasses.dataclass(frozen=True)
class Task:
    """A tensor to move."""

    tensor: Tensor
    dtype: np.dtype
    """At the destination."""
    whole: bool = False
    """Not to be cut into pieces."""

    @property
    def nbytes(self) -> int:
        """Bytes at the destination."""
        return int(np.prod(self.tensor.shape, dtype=np.int64)) * self.dtype.itemsize

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Row ranges to move at once."""
        rows = self.tensor.shape[0]
        step = rows if self.whole else piece_rows(rows, max(self.nbytes // rows, 1))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)


Read = Callable[[Tensor, int, int], np.ndarray]
Write = Callable[[Tensor, int, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Workers:
    """How the work is divided."""

    threads: int = 4
    index: int = 0
    """This process, of `count` that convert together."""
    count: int = 1


def not_finite(values: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    bits = values.reshape(-1).view(f"u{values.dtype.itemsize}")
    exponent = bits.dtype.type(np.array(np.inf, values.dtype).view(bits.dtype))
    masked = bits & exponent
    if masked.size == 0 or masked.max() != exponent:
        return 0
    return int((masked == exponent).sum())


def _move(task: Task, read: Read, write: Write, *, moved: Callable[[int], None]) -> str:
    bad = 0
    for start, stop in task.pieces():
        rows = read(task.tensor, start, stop).astype(task.dtype, copy=False)
        bad += not_finite(rows)
        write(task.tensor, start, rows)
        moved(rows.nbytes)
    total = int(np.prod(task.tensor.shape, dtype=np.int64))
    return f"{task.tensor.name}: {bad} of {total} values are not finite" if bad else ""


def transfer(
    tasks: Sequence[Task], read: Read, write: Write, *, staging: Staging, workers: Workers
) -> int:
    """Moves what is not yet moved of this process' share; returns the bytes that it moved.

    Raises:
      HFError, OSError: the first error of any thread; the others stop after their piece.
    """
    share = tasks[workers.index :: workers.count]
    with staging.journal() as record:
        done = staging.finished()
        left = [task for task in share if task.tensor.name not in done]
        pending, lock, failed = iter(left), threading.Lock(), threading.Event()
        total, todo = sum(task.nbytes for task in share), sum(task.nbytes for task in left)
        bar = tqdm(
            total=total, initial=total - todo, unit="B", unit_scale=True, disable=None, leave=False
        )

        def moved(count: int) -> None:
            with lock:
                bar.update(count)

        def work() -> None:
            try:
                while not failed.is_set():
                    with lock:
                        task = next(pending, None)
                    if task is None:
                        return
                    record(task.tensor.name, _move(task, read, write, moved=moved))
            except BaseException:
                failed.set()
                raise

        with bar, ThreadPoolExecutor(workers.threads) as pool:
            futures = [pool.submit(work) for _ in range(workers.threads)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:  # an interrupt: threads stop after their tensor
                failed.set()
                raise
        for future in futures:
            future.result()
    return todo
