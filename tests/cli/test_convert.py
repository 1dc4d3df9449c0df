"""`longcat convert` as users type it."""

import json
from pathlib import Path

import pytest

from longcat_jax.cli.main import main
from tests.hf.variants import GOLDEN, copy_golden, read_tensors, same_bits

TINY = GOLDEN / "tiny"


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", "from_hf", f"--hf_dir={TINY}", f"--output={ours}"]) == 0
    assert f"{ours}: 188 tensors; 0.8 MB in" in capsys.readouterr().out
    options = ["--layout=release", "--shard_size=200KB"]
    assert main(["convert", "to_hf", f"--checkpoint={ours}", f"--output={back}", *options]) == 0
    assert capsys.readouterr().err == ""
    same_bits(read_tensors(TINY), read_tensors(back))
    assert len(list(back.glob("*.safetensors"))) == 5


def test_slice_and_dtype(tmp_path: Path) -> None:
    options = ["--slice=layers=0:2,experts=0:4", "--dtype=float16", "--threads=1"]
    output = f"--output={tmp_path / 'out'}"
    assert main(["convert", "from_hf", f"--hf_dir={TINY}", output, *options]) == 0
    model = json.loads((tmp_path / "out" / "config.json").read_text())["model"]
    assert (model["num_layers"], model["n_routed_experts"], model["dtype"]) == (2, 4, "float16")


def test_check_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "from_hf", f"--hf_dir={TINY}", "--check"]) == 0
    assert "188 of 188 tensors" in capsys.readouterr().out
    main(["convert", "from_hf", f"--hf_dir={TINY}", f"--output={tmp_path / 'ours'}"])
    capsys.readouterr()
    assert main(["convert", "to_hf", f"--checkpoint={tmp_path / 'ours'}", "--check"]) == 0
    assert "188 tensors" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_shares_of_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", "from_hf", f"--hf_dir={TINY}", f"--output={tmp_path / 'out'}"]
    assert main([*command, "--process=1/2"]) == 0
    assert "this process' share is done" in capsys.readouterr().out
    assert main([*command, "--process=0/2"]) == 0
    assert "188 tensors" in capsys.readouterr().out and (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["convert"], 2, "the following arguments are required"),
        (["convert", "from_hf", "--hf_dri=x"], 2, "did you mean '--hf_dir'?"),
        (["convert", "from_pt", "--hf_dir=x"], 2, "from_pt"),
        (["convert", "from_hf", "--hf_dir=x"], 1, "--output is missing"),
        (["convert", "from_hf", "--hf_dir=nowhere", "--output=o"], 1, "nowhere: no such directory"),
        (["convert", "from_hf", "--hf_dir=x", "--check", "--dtype=float16"], 1, "--dtype: --check"),
        (["convert", "from_hf", "--hf_dir=x", "--output=o", "--process=2/2"], 1, "write I/N"),
        (["convert", "from_hf", "--hf_dir=x", "--output=o", "--threads=0"], 1, "must be >= 1"),
        (["convert", "from_hf", "--hf_dir=x", "--output=o", "--slice=all"], 1, "write layers=0:2"),
        (["convert", "to_hf", "--checkpoint=x", "--output=o", "--shard_size=5X"], 2, "such as 5GB"),
        (["convert", "to_hf", "--checkpoint=x", "--output=o", "--layout=hf"], 2, "'hf'"),
        (["convert", "to_hf", "--checkpoint=nowhere", "--output=o"], 1, "no checkpoints here"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_warnings_go_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_golden("tiny", tmp_path / "hf")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    assert main(["convert", "from_hf", f"--hf_dir={folder}", f"--output={tmp_path / 'o'}"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: ") and "1 of" in error and "not finite" in error


def test_evaluate_needs_data_for_a_converted_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["convert", "from_hf", f"--hf_dir={TINY}", f"--output={tmp_path / 'ours'}"])
    capsys.readouterr()
    assert main(["evaluate", f"--checkpoint={tmp_path / 'ours'}"]) == 1
    assert "a converted checkpoint has no data; name --data" in capsys.readouterr().err
    assert main(["evaluate", f"--checkpoint={tmp_path / 'ours'}", f"--data={tmp_path}"]) == 1
    assert "tokenizer.json: not there" in capsys.readouterr().err
