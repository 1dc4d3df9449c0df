"""experiments/compare_runs.py: which steps a window holds, and what it refuses."""

import json
import sys

import numpy as np
import pytest

from experiments import compare_runs


def write_run(path, losses, start=1):
    path.mkdir()
    lines = [json.dumps({"step": start + i, "loss": loss}) for i, loss in enumerate(losses)]
    lines.append(json.dumps({"step": len(losses), "eval/loss": 7.0}))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_means_are_of_whole_windows(tmp_path):
    run = write_run(tmp_path / "a", [1.0, 3.0, 5.0, 9.0, 100.0])
    np.testing.assert_array_equal(compare_runs.window_means(run, 2), [2.0, 7.0])


@pytest.mark.parametrize(
    "losses, start, message",
    [([1.0], 1, "1 steps, not one window of 2"), ([1.0, 2.0], 2, "step 1")],
)
def test_refuses(tmp_path, losses, start, message):
    run = write_run(tmp_path / "a", losses, start)
    with pytest.raises(ValueError, match=message):
        compare_runs.window_means(run, 2)


def test_prints_distances_to_the_first_run_and_draws(tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / name, [1.0, x, 2.0]) for name, x in (("a", 3.0), ("b", 3.5))]
    output = tmp_path / "losses.png"
    monkeypatch.setattr(
        sys, "argv", ["compare_runs", *map(str, runs), "--window=2", f"--output={output}"]
    )
    compare_runs.main()
    assert capsys.readouterr().out.splitlines()[1] == "2\t2.0000\t+0.2500"
    assert output.read_bytes().startswith(b"\x89PNG")


def test_a_missing_run_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare_runs", str(tmp_path / "none"), "--output=x.png"])
    with pytest.raises(SystemExit, match="none"):
        compare_runs.main()


def test_runs_of_one_name_and_empty_windows_are_refused(tmp_path, monkeypatch, capsys):
    for arguments, message in (
        (["a/run", "b/run"], "must differ: ['run', 'run']"),
        (["a", "--window=0"], "must be at least 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare_runs", *arguments, "--output=x.png"])
        with pytest.raises(SystemExit):
            compare_runs.main()
        assert message in capsys.readouterr().err
