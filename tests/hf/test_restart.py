"""Killed, shared and disturbed conversions end in the same bits."""

import dataclasses
import json
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import longcat_jax.hf
from longcat_jax.hf import layout, store
from longcat_jax.hf.config import to_raw
from longcat_jax.hf.from_hf import from_hf
from longcat_jax.hf.safetensors import HFError
from longcat_jax.hf.to_hf import Target, to_hf
from longcat_jax.hf.transfer import Workers
from tests.helpers import tiny_config
from tests.hf import variants
from tests.hf.variants import GOLDEN


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough tensors to be killed between: 2 layers of 96 experts."""
    base = tiny_config().model
    config = dataclasses.replace(base, hidden_size=240, n_routed_experts=96, dtype="float32")
    rng = np.random.default_rng(0)
    tensors = {
        tensor.name: rng.standard_normal(tensor.shape, np.float32)
        for tensor in layout.tensors(config)
    }
    folder = tmp_path_factory.mktemp("source") / "hf"
    return variants.write(folder, to_raw(config, dtype="float32"), tensors, shards=3)


@pytest.fixture(scope="module")
def ours(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted conversion."""
    folder = tmp_path_factory.mktemp("ours") / "out"
    from_hf(source, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but Orbax' record of the time."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "_CHECKPOINT_METADATA"
    }


def killed(command: list[str], output: Path) -> int:
    """Runs `longcat convert` and kills it -9 after some tensors; how many were finished."""
    program = [sys.executable, "-m", "longcat_jax", "convert", *command, f"--output={output}"]
    process = subprocess.Popen(program, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    journal = output.with_name(output.name + ".partial") / "journal-0"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= 20:
            break
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended by itself: the test tests nothing"
    assert not output.exists()
    with journal.open("ab") as file:
        file.write(b'["model.layers.0.mlp.exp')  # a line that was being written
    return journal.read_bytes().count(b"\n")


def test_kill_9_and_rerun_of_the_import(source: Path, ours: Path, tmp_path: Path) -> None:
    finished = killed(["from_hf", f"--hf_dir={source}", "--threads=1"], tmp_path / "out")
    result = from_hf(source, tmp_path / "out")
    total = sum(len(data) for name, data in contents(ours).items() if "/params/" in name)
    assert result.finished and finished >= 20
    assert 0 < result.moved_bytes < total, "what was finished was moved again"
    assert contents(tmp_path / "out") == contents(ours)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_kill_9_and_rerun_of_the_export(ours: Path, tmp_path: Path) -> None:
    options = ["--layout=transformers", "--shard_size=5MB", "--threads=1"]
    killed(["to_hf", f"--checkpoint={ours}", *options], tmp_path / "out")
    target = Target("transformers", shard_bytes=5_000_000)
    result = to_hf(ours, tmp_path / "out", target=target)
    to_hf(ours, tmp_path / "whole", target=target)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    moved = sum(v.nbytes for v in variants.read_tensors(tmp_path / "out").values())
    assert 0 < result.moved_bytes < moved


def test_an_error_in_the_middle_leaves_nothing_under_the_name_and_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls, lock = store.write, [], threading.Lock()

    def write(array: object, tensor: layout.Tensor, start: int, rows: np.ndarray) -> None:
        with lock:
            calls.append(tensor.name)
            if len(calls) > 100:
                raise OSError(28, "No space left on device", "params")
        real(array, tensor, start, rows)

    with monkeypatch.context() as patch:
        patch.setattr("longcat_jax.hf.store.write", write)
        with pytest.raises(OSError, match="No space left"):
            from_hf(GOLDEN / "tiny", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert len(calls) < 110, "the other threads went on"
    from_hf(GOLDEN / "tiny", tmp_path / "out")
    from_hf(GOLDEN / "tiny", tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "call", ["store.write_step", "staging.Staging._forget", "staging.shutil.rmtree"]
)
def test_a_kill_before_or_after_the_transfer_blocks_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the result is being made; right after its rename; while the folder is removed."""
    output, early = tmp_path / "out", call == "store.write_step"
    real = operator.attrgetter(call)(longcat_jax.hf)

    def interrupted(*args: object, **kwargs: object) -> None:
        if early or output.exists():
            raise KeyboardInterrupt
        real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"longcat_jax.hf.{call}", interrupted)
        from_hf(GOLDEN / "tiny", output)
    assert output.exists() != early and (tmp_path / "out.partial").is_dir()
    if not early:
        output.rename(tmp_path / "first")
    from_hf(GOLDEN / "tiny", output)
    assert not (tmp_path / "out.partial").exists()
    from_hf(GOLDEN / "tiny", tmp_path / "whole")
    assert contents(output) == contents(tmp_path / "whole")


def test_another_conversion_is_not_mixed_in(source: Path, tmp_path: Path) -> None:
    killed(["from_hf", f"--hf_dir={source}", "--threads=1"], tmp_path / "out")
    with pytest.raises(HFError, match="holds another conversion, not finished"):
        from_hf(source, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(HFError, match="holds another conversion"):
        from_hf(GOLDEN / "tiny", tmp_path / "out")


def test_processes_share_the_work_and_the_last_one_finishes(tmp_path: Path) -> None:
    shares = [
        from_hf(GOLDEN / "tiny", tmp_path / "out", workers=Workers(2, index, 3)) for index in (2, 0)
    ]
    assert not any(share.finished for share in shares) and not (tmp_path / "out").exists()
    last = from_hf(GOLDEN / "tiny", tmp_path / "out", workers=Workers(2, 1, 3))
    from_hf(GOLDEN / "tiny", tmp_path / "whole")
    assert last.finished and contents(tmp_path / "out") == contents(tmp_path / "whole")
    total = sum(v.nbytes for v in variants.golden("tiny")[1].values())
    moved = [result.moved_bytes for result in (*shares, last)]
    assert sum(moved) == total and max(moved) < total / 2


def test_processes_may_run_at_the_same_time(tmp_path: Path) -> None:
    results = []

    def convert(index: int) -> None:
        results.append(from_hf(GOLDEN / "tiny", tmp_path / "out", workers=Workers(1, index, 2)))

    threads = [threading.Thread(target=convert, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and any(result.finished for result in results)
    from_hf(GOLDEN / "tiny", tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_processes_of_one_number_are_refused(tmp_path: Path) -> None:
    from_hf(GOLDEN / "tiny", tmp_path / "out", workers=Workers(1, 0, 2))
    journal = tmp_path / "out.partial" / "journal-1"
    import fcntl

    with journal.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(HFError, match="another process is at work"):
            from_hf(GOLDEN / "tiny", tmp_path / "out", workers=Workers(1, 1, 2))


@pytest.mark.parametrize(("piece", "rows", "files"), [(700, 2, 68), (1000, 4, 34), (3100, 16, 9)])
def test_a_large_matrix_is_moved_in_pieces(
    piece: int, rows: int, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same parameters whatever the size of a piece.

    In 1000 bytes go 5 of an expert's 22 rows: then a chunk holds rows of gate and of up.
    """
    from_hf(GOLDEN / "tiny", tmp_path / "whole")
    monkeypatch.setattr("longcat_jax.hf.store.PIECE", piece)
    from_hf(GOLDEN / "tiny", tmp_path / "pieces", workers=Workers(8))
    item = tmp_path / "pieces" / "checkpoints" / "0" / "params"
    chunks = json.loads((item / "lm_head" / ".zarray").read_text())["chunks"]
    assert chunks == [48, rows] and len(list((item / "lm_head").iterdir())) == 1 + files
    for name in ("whole", "pieces"):
        to_hf(tmp_path / name, tmp_path / f"{name}_hf")
    same = [variants.read_tensors(tmp_path / f"{name}_hf") for name in ("whole", "pieces")]
    variants.same_bits(*same)
    variants.same_bits(same[0], variants.golden("tiny")[1])
