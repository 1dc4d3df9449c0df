"""A conversion's work in progress: `OUTPUT.partial`, which becomes `OUTPUT` by one rename.

  plan.json      which conversion this is: another one is refused, not mixed in
  plan.json.new  the same while result/ is being made
  journal-I      a line per finished tensor, by process I; a killed run goes on after it
  result/        what will be renamed

Only a plan proves that a folder of this name is ours; any other is somebody's, and left alone.

Processes of one conversion share the folder: each adds to its own journal, and whichever finds that
the journals together cover the plan does the rename.
"""

import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from longcat_jax.hf.safetensors import HFError

PLAN, NEW, LOCK, RESULT, JOURNAL = "plan.json", "plan.json.new", "lock", "result", "journal-"


def _plan(path: Path) -> dict[str, Any] | None:
    """The plan in a file; None: no such file, or not one of ours."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return plan if isinstance(plan, dict) and "direction" in plan else None


class Staging:
    """The folder beside the output."""

    def __init__(self, output: Path, plan: Mapping[str, Any], *, process: int = 0) -> None:
        """`plan`, with a key `direction`, is compared with what an interrupted run left.

        Raises:
          HFError: the output exists.
        """
        # A link's target is what gets renamed to: the link itself cannot be.
        self.output, self.plan = Path(os.path.realpath(output)), dict(plan)
        self.folder = self.output.with_name(self.output.name + ".partial")
        self.result = self.folder / RESULT
        self._journal = self.folder / f"{JOURNAL}{process}"
        self._mutex = threading.Lock()
        self._require_free()

    def _require_free(self) -> None:
        empty = self.output.is_dir() and not any(self.output.iterdir())
        if self.output.exists() and not empty:
            raise HFError(f"{self.output}: exists already; name another --output, or remove it")

    def prepare(self, make: Callable[[Path], None], *, nbytes: int) -> None:
        """Calls `make(result)` unless an earlier run, or another process, has.

        Args:
          make: creates files of final size; may be called again after a kill.
          nbytes: how much the conversion will write.

        Raises:
          HFError: the folder holds another conversion or is somebody's, or the disk is too small.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._require_free()  # another process may have finished meanwhile
            if self._goes_on():
                return
            free = shutil.disk_usage(self.folder).free
            if nbytes > free:
                shutil.rmtree(self.folder)
                raise HFError(
                    f"{self.output}: needs {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                )
            self._forget()
            shutil.rmtree(self.result, ignore_errors=True)
            new = self.folder / NEW
            new.write_text(json.dumps(self.plan), encoding="utf-8")
            self.result.mkdir()
            make(self.result)
            new.replace(self.folder / PLAN)

    def _goes_on(self) -> bool:
        """Whether the result is there to be filled; if not, all that the folder holds is ours.

        Raises:
          HFError: the folder holds another conversion, or what no plan proves ours.
        """
        entries = {entry.name: entry for entry in self.folder.iterdir()}
        plan = _plan(self.folder / PLAN)
        if plan is not None and RESULT in entries:
            if plan == self.plan:
                return True
            raise HFError(
                f"{self.folder}: holds another conversion, not finished; remove it, or name "
                "another --output"
            )
        # Killed before the plan was in place, or after the result had been renamed.
        proven = plan is not None or _plan(self.folder / NEW) is not None
        for name, entry in entries.items():
            empty = name in (LOCK, NEW) and entry.stat().st_size == 0
            ours = name in (PLAN, NEW, RESULT) or name.startswith(JOURNAL)
            if not (empty or (proven and ours)):
                raise HFError(f"{self.folder}: in the way, and not a conversion; remove it")
        return False

    def _forget(self) -> None:
        """Removes the journals, then the plan that proves them ours."""
        for path in (*self.folder.glob(f"{JOURNAL}*"), self.folder / PLAN):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def journal(self) -> Iterator[Callable[[str, str], None]]:
        """Yields record(name, warning), to be called when a tensor is stored.

        Raises:
          HFError: another process works under the same number.
        """
        with self._journal.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HFError(f"{self.folder}: another process is at work in it") from None
            file.seek(0)
            text = file.read()
            if text and not text.endswith(b"\n"):  # killed while writing a line
                file.truncate(text.rfind(b"\n") + 1)

            def record(name: str, warning: str) -> None:
                line = json.dumps([name, warning]).encode() + b"\n"
                with self._mutex:
                    os.write(file.fileno(), line)

            yield record

    def finished(self) -> dict[str, str]:
        """Tensors that are stored, by any process -> warning or ''."""
        done: dict[str, str] = {}
        for path in sorted(self.folder.glob(f"{JOURNAL}*")):
            lines = path.read_bytes().split(b"\n")[:-1]
            done |= dict(json.loads(line) for line in lines)
        return done

    def finish(self, names: Iterable[str]) -> bool:
        """Renames the result if every tensor of the plan is stored; whether the output is there."""
        try:
            with self._locked():
                if not self.result.exists():
                    return self.output.is_dir()  # another process was quicker
                if not self.finished().keys() >= set(names):
                    return False
                self.result.rename(self.output)
                self._forget()  # a kill from here on leaves nothing in a later run's way
        except FileNotFoundError:
            return self.output.is_dir()  # another was quicker, and has removed the folder
        shutil.rmtree(self.folder, ignore_errors=True)
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
