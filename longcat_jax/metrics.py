"""What a run writes down: metrics.jsonl, expert_load.jsonl, TensorBoard events, the console line.

metrics.jsonl holds one JSON object a line: one per training step, and one per evaluation whose keys
start with `eval/` and `router/`. expert_load.jsonl holds one per evaluation. A number that is not
finite is written as null, since JSON has no other word for it.

After a kill a file may end in half a line, and may hold steps later than the checkpoint that
training goes on from: `MetricsWriter.truncate_after` removes both.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"
EXPERT_LOAD_FILE = "expert_load.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsWriter:
    """Appends a run's metrics to its workdir, where `writes`; one process of a job does.

    It calls `truncate_after(step it starts from)` before its first line. Lines reach the
    disk at `flush` and `close`, or when a buffer is full.
    """

    def __init__(self, workdir: str | Path, *, writes: bool = True) -> None:
        self._workdir, self._writes = Path(workdir), writes
        if writes:
            self._workdir.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, IO[str]] = {}
        self._events: SummaryWriter | None = None
        self._purge_step: int | None = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and its numbers to TensorBoard.

        Args:
          step: optimizer step, from 1.
          values: name -> number, or list of numbers (one per layer); arrays are converted.
        """
        if not self._writes:
            return
        line = {"step": step, **plain(dict(values))}
        self._append(METRICS_FILE, line)
        events = self._open_events()
        for name, value in line.items():
            items = value if isinstance(value, list) else [value]
            for index, item in enumerate(items):
                if isinstance(item, int | float) and name != "step":
                    tag = f"{name}/layer_{index}" if isinstance(value, list) else name
                    events.add_scalar(tag, item, step)

    def write_expert_load(self, step: int, *, load_LE: Any, real_experts_histogram: Any) -> None:
        """Append one line to expert_load.jsonl.

        Args:
          step: optimizer step, from 1.
          load_LE: [layers, router outputs] share of the layer's selections.
          real_experts_histogram: [K+1] share of tokens that selected 0..K real experts.
        """
        if not self._writes:
            return
        values = {"load": load_LE, "real_experts_histogram": real_experts_histogram}
        self._append(EXPERT_LOAD_FILE, {"step": step, **plain(values)})

    def truncate_after(self, step: int) -> None:
        """Drop lines of later steps, and half a last line, from both files.

        Each file is replaced as a whole: a kill in between leaves the old one.

        Raises:
          ValueError: a line other than the last cannot be read.
        """
        if not self._writes:
            return
        self.close()
        self._purge_step = step + 1
        for name in (METRICS_FILE, EXPERT_LOAD_FILE):
            path = self._workdir / name
            if not path.exists():
                continue
            partial = path.with_suffix(".partial")
            with partial.open("w", encoding="utf-8") as file:
                for line in read_lines(path):
                    if line["step"] <= step:
                        file.write(_dump(line))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)

    def flush(self) -> None:
        """Hand all lines to the operating system: a kill of this process cannot lose them then."""
        for file in self._files.values():
            file.flush()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flush and close; a later write opens the files again."""
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._events is not None:
            self._events.close()
            self._events = None

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if name not in self._files:
            self._files[name] = (self._workdir / name).open("a", encoding="utf-8")
        self._files[name].write(_dump(line))

    def _open_events(self) -> SummaryWriter:
        if self._events is None:
            folder = str(self._workdir / TENSORBOARD_FOLDER)
            # purge_step makes TensorBoard forget what an earlier process wrote from there on.
            self._events = SummaryWriter(folder, purge_step=self._purge_step)
        return self._events


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays as lists, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl, in order; half a last line is left out.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is empty or corrupt.
    """
    return _read_all(workdir, METRICS_FILE)


def read_expert_load(workdir: str | Path) -> list[dict[str, Any]]:
    """All lines of expert_load.jsonl; errors as in `read_metrics`."""
    return _read_all(workdir, EXPERT_LOAD_FILE)


def console_line(values: Mapping[str, Any], *, total_steps: int, eta_seconds: float) -> str:
    """What the loop prints: `step 120/700 | loss 4.31 | bpb 2.35 | ... | ETA 1:52`.

    Args:
      values: a line of metrics.jsonl with its `step`; what it lacks, or holds as None, is left out.
      total_steps: train.steps.
      eta_seconds: time left, seconds.
    """
    parts = [f"step {values['step']}/{total_steps}"]
    parts += _fields(
        values,
        {
            "loss": "loss {:.3f}",
            "bits_per_byte": "bpb {:.3f}",
            "tokens_per_second": "{} tok/s",
            "tflops": "{:.3g} TFLOP/s",
            "mfu": "MFU {:.1%}",
            "experts_per_token": "experts {:.2f}",
            "max_load": "max load {:.2f}",
            "grad_norm": "|g| {:.3g}",
            "input_wait": "wait {:.1%}",
        },
    )
    if left_out := values.get("selections_left_out"):
        parts.append(f"{quantity(left_out)} selections left out")
    return " | ".join([*parts, f"ETA {duration(eta_seconds)}"])


def evaluation_line(values: Mapping[str, Any], *, total_steps: int) -> str:
    """What the loop prints after an evaluation; arguments as in `console_line`."""
    fields = {
        "eval/loss": "loss {:.3f}",
        "eval/bits_per_byte": "bpb {:.3f}",
        "eval/experts_per_token": "experts {:.2f}",
    }
    return " | ".join([f"eval {values['step']}/{total_steps}", *_fields(values, fields)])


def duration(seconds: float) -> str:
    """Seconds as `1:52` or `3:04:05`."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def quantity(value: float) -> str:
    """A count in few characters: `5.83k`, `1.2M`."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def _fields(values: Mapping[str, Any], formats: Mapping[str, str]) -> list[str]:
    shown = {name: values[name] for name in formats if values.get(name) is not None}
    if "tokens_per_second" in shown:
        shown["tokens_per_second"] = quantity(shown["tokens_per_second"])
    return [formats[name].format(value) for name, value in shown.items()]


def _dump(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _read_all(workdir: str | Path, name: str) -> list[dict[str, Any]]:
    path = Path(workdir) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; is {workdir} the workdir of a training run?")
    lines = list(read_lines(path))
    if not lines:
        raise ValueError(f"{path}: holds no metrics yet")
    return lines


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of a file, one a line; half a last line is left out.

    Raises:
      ValueError: a line other than the last cannot be read.
    """
    torn: int | None = None
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if torn is not None:
                raise ValueError(f"{path}:{torn}: not a JSON object with a step")
            line = _parse_line(text)
            if line is None:
                torn = number
            else:
                yield line


def _parse_line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(line, dict) and isinstance(line.get("step"), int) and text.endswith(b"\n")
    return line if whole else None
