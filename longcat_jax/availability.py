"""availability.jsonl: when a run started, saved and stopped, and what restarts cost it.

One JSON object a line, written by process 0: `event` is `start` (`step` it goes on from,
`lost_steps` and `lost_seconds` of training done before that must be done again, `processes`),
`save` (`step`, `stall_seconds` for which training stood) or `stop` (`step`, `reason`); `time` is
seconds since 1970. A killed process 0 leaves no `stop`; another process' error may leave none, or
one of a broken connection.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longcat_jax.metrics import METRICS_FILE, read_lines

FILE = "availability.jsonl"


class AvailabilityLog:
    """Appends to the file of a workdir, where `writes`; each line is on its way to disk at once."""

    def __init__(self, workdir: Path, *, writes: bool) -> None:
        self._workdir, self._writes = workdir, writes

    def start(self, step: int, *, processes: int) -> None:
        """Call before the metrics of later steps are dropped: they tell what is lost."""
        if not self._writes:
            return
        lost = [line for line in _steps(self._workdir) if line["step"] > step]
        self._append(
            {
                "event": "start",
                "step": step,
                "processes": processes,
                "lost_steps": len(lost),
                "lost_seconds": sum(line["step_seconds"] for line in lost),
            }
        )

    def save(self, step: int, *, stall_seconds: float) -> None:
        """A checkpoint was begun."""
        self._append({"event": "save", "step": step, "stall_seconds": stall_seconds})

    def stop(self, step: int, *, reason: str) -> None:
        """Training ends here."""
        self._append({"event": "stop", "step": step, "reason": reason})

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._writes:
            with (self._workdir / FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), **line}) + "\n")


def _steps(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / METRICS_FILE
    lines = read_lines(path) if path.exists() else ()
    return [line for line in lines if "step_seconds" in line]


def summary(workdir: Path) -> str | None:
    """One line for people; None for a run without such a log.

    Raises:
      ValueError: a line that cannot be read.
    """
    path = workdir / FILE
    if not path.exists():
        return None
    try:
        return _summary(list(read_lines(path)), _steps(workdir))
    except KeyError as error:
        raise ValueError(f"{path}: a line lacks {error}") from error


def _summary(lines: list[dict[str, Any]], steps: list[dict[str, Any]]) -> str | None:
    starts = [line for line in lines if line["event"] == "start"]
    if not starts:
        return None
    stalls = [line["stall_seconds"] for line in lines if line["event"] == "save"]
    lost, again = (sum(line[key] for line in starts) for key in ("lost_steps", "lost_seconds"))
    parts = [
        f"{len(starts) - 1} restarts",
        f"{lost} steps done again ({again:.0f} s)",
        f"{len(stalls)} saves with {sum(stalls):.1f} s of stall",
    ]
    wall = lines[-1]["time"] - lines[0]["time"]
    if wall > 0:
        # A run that goes on, or was killed, has later steps: their time is not in `wall`.
        last = lines[-1]["step"]
        kept = sum(line["step_seconds"] for line in steps if line["step"] <= last)
        parts.insert(0, f"{min(kept / wall, 1):.1%} of {wall:.0f} s in steps that count")
    return ", ".join(parts)
