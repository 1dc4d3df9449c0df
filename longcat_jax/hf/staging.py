"""A conversion's work in progress: `OUTPUT.partial`, which becomes `OUTPUT` by one rename.

  plan.json   which conversion this is: another one is refused, not mixed in
  journal-I   a line per finished tensor, by process I; a killed run goes on after it
  result/     what will be renamed

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

PLAN, LOCK, RESULT, JOURNAL = "plan.json", "lock", "result", "journal-"


class Staging:
    """The folder beside the output."""

    def __init__(self, output: Path, plan: Mapping[str, Any], *, process: int = 0) -> None:
        """`plan` is compared with what an earlier, interrupted run left.

        Raises:
          HFError: the output exists.
        """
        self.output, self.plan = output.absolute(), dict(plan)
        self.folder = self.output.with_name(self.output.name + ".partial")
        self.result = self.folder / RESULT
        self._journal = self.folder / f"{JOURNAL}{process}"
        self._mutex = threading.Lock()
        taken = self.output.exists() and not (
            self.output.is_dir() and not any(self.output.iterdir())
        )
        if taken:
            raise HFError(f"{output}: exists already; name another --output, or remove it")

    def prepare(self, make: Callable[[Path], None], *, nbytes: int) -> None:
        """Calls `make(result)` unless an earlier run, or another process, has.

        Args:
          make: creates files of final size; may be called again after a kill.
          nbytes: how much the conversion will write.

        Raises:
          HFError: the folder holds another conversion, or the disk is too small.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            path = self.folder / PLAN
            if path.is_file():
                if json.loads(path.read_text(encoding="utf-8")) != self.plan:
                    raise HFError(
                        f"{self.folder}: holds another conversion, not finished; remove it, or "
                        "name another --output"
                    )
                return
            known = {LOCK, RESULT, PLAN + ".new"}
            if any(entry.name not in known for entry in self.folder.iterdir()):
                raise HFError(f"{self.folder}: in the way, and not a conversion; remove it")
            free = shutil.disk_usage(self.folder).free
            if nbytes > free:
                shutil.rmtree(self.folder)
                raise HFError(
                    f"{self.output}: needs {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                )
            shutil.rmtree(self.result, ignore_errors=True)
            self.result.mkdir()
            make(self.result)
            new = self.folder / (PLAN + ".new")
            new.write_text(json.dumps(self.plan), encoding="utf-8")
            new.replace(path)

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
                if not self.finished().keys() >= set(names):
                    return False
                self.result.rename(self.output)
        except FileNotFoundError:
            return self.output.is_dir()  # another process was quicker
        shutil.rmtree(self.folder, ignore_errors=True)
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
