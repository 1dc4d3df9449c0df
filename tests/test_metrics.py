"""Metrics files: valid JSON always, exact truncation, kills at any byte, the console line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from longcat_jax import metrics
from longcat_jax.metrics import MetricsWriter, read_expert_load, read_metrics


def write_steps(workdir: Path, steps: range) -> None:
    with MetricsWriter(workdir) as writer:
        for step in steps:
            writer.write(step, {"loss": 1.0 / step})


def test_lines_come_back_exactly(tmp_path: Path) -> None:
    loss = np.float32(4.1)
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        writer.write(1, {"loss": loss, "max_load": 1, "router/cosine": np.array([0.25, 0.5])})
        writer.write_expert_load(
            1, load_LE=np.ones((2, 3)) / 3, real_experts_histogram=np.array([0.0, 1.0])
        )
    (line,) = read_metrics(tmp_path / "new" / "run")
    assert line == {"step": 1, "loss": float(loss), "max_load": 1, "router/cosine": [0.25, 0.5]}
    (load,) = read_expert_load(tmp_path / "new" / "run")
    assert load["load"] == [[1 / 3] * 3] * 2 and load["real_experts_histogram"] == [0.0, 1.0]


def test_not_finite_is_null(tmp_path: Path) -> None:
    values = {"a": float("nan"), "b": np.float32("inf"), "c": np.array([1.0, np.nan]), "d": None}
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, values)
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    line = json.loads(text, parse_constant=refuse)
    assert line == {"step": 1, "a": None, "b": None, "c": [1.0, None], "d": None}


def test_flush_survives_a_kill(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 2.0})
    writer.flush()
    # Nothing is closed: what another process reads now is what a kill would leave.
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    writer.close()
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_truncate_after_any_torn_byte(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(b"".join(lines[:3]))
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        complete = 4 if end == len(whole) else 3
        assert len(read_metrics(tmp_path)) == complete
        with MetricsWriter(tmp_path) as writer:
            writer.truncate_after(99)
        assert path.read_bytes() == b"".join(lines[:complete])


def test_resumed_file_equals_uninterrupted(tmp_path: Path) -> None:
    write_steps(tmp_path / "whole", range(1, 8))
    write_steps(tmp_path / "killed", range(1, 7))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    with MetricsWriter(tmp_path / "killed") as writer:
        writer.truncate_after(4)
        for step in range(5, 8):
            writer.write(step, {"loss": 1.0 / step})
    whole, killed = (tmp_path / run / "metrics.jsonl" for run in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_truncate_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(tmp_path, range(1, 4))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        MetricsWriter(tmp_path).truncate_after(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_truncate_covers_expert_load(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (3, 6):
            writer.write_expert_load(step, load_LE=[[1.0]], real_experts_histogram=[1.0])
        writer.truncate_after(5)
    assert [line["step"] for line in read_expert_load(tmp_path)] == [3]


def test_truncate_of_a_new_workdir_does_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b'{"step": 1}\nnot json\n{"step": 2}\n',
        b'{"step": 1}\n[2]\n{"step": 3}\n',
        b'{"step": 1}\n{"loss": 2}\n{"step": 3}\n',
        b'{"step": 1}\n\xff\x00\n{"step": 3}\n',
    ],
)
def test_corrupt_line_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object"):
        MetricsWriter(tmp_path).truncate_after(9)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the workdir of a training run"):
        read_metrics(tmp_path)
    for content in (b"", b'{"step": 1'):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match="holds no metrics yet"):
            read_metrics(tmp_path)


def events(workdir: Path) -> list[event_pb2.Event]:
    """TensorBoard's records: length, its checksum, data, its checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            body = data[12 : 12 + length]
            assert masked_crc32c(body) == int.from_bytes(data[12 + length : 16 + length], "little")
            found.append(event_pb2.Event.FromString(body))
            data = data[16 + length :]
    return found


def test_tensorboard_gets_scalars_and_the_purge(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(41)
        writer.write(42, {"loss": 0.5, "bad": float("nan"), "router/cosine": [0.25, 0.75]})
    records = events(tmp_path)
    scalars = {v.tag: (e.step, v.simple_value) for e in records for v in e.summary.value}
    assert scalars == {
        "loss": (42, 0.5),
        "router/cosine/layer_0": (42, 0.25),
        "router/cosine/layer_1": (42, 0.75),
    }
    starts = [e.step for e in records if e.session_log.status == event_pb2.SessionLog.START]
    assert starts == [42]


def test_console_line() -> None:
    values = {
        "step": 120,
        "loss": 4.3101,
        "bits_per_byte": 2.3466,
        "tokens_per_second": 5832.0,
        "tflops": 0.0512,
        "experts_per_token": 2.98,
        "max_load": 1.4,
        "grad_norm": 0.9,
        "input_wait": 0.003,
        "selections_left_out": 0.0,
    }
    line = metrics.console_line(values, total_steps=700, eta_seconds=112)
    assert line == (
        "step 120/700 | loss 4.310 | bpb 2.347 | 5.83k tok/s | 0.0512 TFLOP/s | experts 2.98 | "
        "max load 1.40 | |g| 0.9 | wait 0.3% | ETA 1:52"
    )
    known = metrics.console_line({**values, "mfu": 0.267}, total_steps=700, eta_seconds=1)
    assert "TFLOP/s | MFU 26.7% | experts" in known
    dropped = {"step": 3, "max_load": 9, "selections_left_out": 2345.0}
    line = metrics.console_line(dropped, total_steps=7, eta_seconds=0)
    assert line == "step 3/7 | max load 9.00 | 2.35k selections left out | ETA 0:00"
    empty = metrics.console_line({"step": 3, "loss": None}, total_steps=7, eta_seconds=11045.4)
    assert empty == "step 3/7 | ETA 3:04:05"


def test_evaluation_line() -> None:
    values = {"step": 140, "eval/loss": 3.5, "eval/bits_per_byte": 2.5, "eval/experts_per_token": 3}
    line = metrics.evaluation_line(values, total_steps=700)
    assert line == "eval 140/700 | loss 3.500 | bpb 2.500 | experts 3.00"


@pytest.mark.parametrize(
    ("value", "text"), [(7.0, "7"), (999.0, "999"), (1234567.0, "1.23M"), (2.5e9, "2.5G")]
)
def test_quantity(value: float, text: str) -> None:
    assert metrics.quantity(value) == text
