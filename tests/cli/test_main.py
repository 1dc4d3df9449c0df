"""The command line's front: dispatch, suggestions, one-line errors, exit statuses."""

import argparse
import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from longcat_jax.cli import main as cli
from longcat_jax.config import ConfigError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a made-up command in train's place, whose function the test gives."""

    def install(run: Callable[[argparse.Namespace], int | None]) -> None:
        def register(subparsers: argparse._SubParsersAction) -> None:
            parser = subparsers.add_parser("train")
            parser.add_argument("--config", required=True)
            parser.add_argument("--workdir", required=True)
            parser.add_argument("--profile", type=int)
            parser.set_defaults(run=run, overrides=[])

        module = types.ModuleType("longcat_jax.cli.train")
        module.register = register
        monkeypatch.setitem(sys.modules, "longcat_jax.cli.train", module)

    return install


GIVEN = ["train", "--config=c.py", "--workdir=w"]


def test_overrides_reach_the_command(command: Callable[..., None]) -> None:
    seen = []
    command(seen.append)
    arguments = ["--config.train.steps=7", "--config.seed", "3", "--config.a.b=x=y"]
    assert cli.main([*GIVEN[:2], *arguments, "--workdir=w"]) == 0
    assert seen[0].overrides == ["train.steps=7", "seed=3", "a.b=x=y"]
    assert (seen[0].config, seen[0].workdir) == ("c.py", "w")
    assert cli.main(GIVEN) == 0
    assert seen[1].overrides == []


def test_exit_status_is_the_commands(command: Callable[..., None]) -> None:
    command(lambda args: 3)
    assert cli.main(GIVEN) == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "longcat: unknown command 'trian'; did you mean 'train'?"),
        (["--workdir=x"], "longcat: unknown option '--workdir=x'; known: convert, evaluate, "),
        (["train", "--wrokdir=w"], "unknown option '--wrokdir'; did you mean '--workdir'?"),
        (["train", "--work", "w"], "unknown option '--work'; did you mean '--workdir'?"),
        (["train", "--config=c.py"], "longcat train: the following arguments are required: --work"),
        ([*GIVEN, "--profile=two"], "argument --profile: invalid int value: 'two'"),
        ([*GIVEN, "stray"], "longcat train: unexpected argument 'stray'"),
        ([*GIVEN, "-x"], "longcat train: unexpected argument '-x'"),
        ([*GIVEN, "--config.seed"], "--config.seed: write --config.PATH=VALUE"),
        ([*GIVEN, "--config.seed", "--profile=1"], "--config.seed: write --config.PATH=VALUE"),
        ([*GIVEN, "--config.=1"], "--config.=1: write --config.PATH=VALUE"),
    ],
)
def test_bad_usage_is_one_line(
    argv: list[str],
    message: str,
    command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(lambda args: pytest.fail("ran"))
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""


def test_overrides_are_unknown_where_a_command_takes_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["report", "--workdir=w", "--config.seed=1"]) == 2
    assert "longcat report: unknown option '--config.seed'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError("seed=-1: must be >= 0"), "seed=-1: must be >= 0"),
        (ValueError("first\n  second"), "first second"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: No such file or d"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (FileNotFoundError("w: no metrics"), "w: no metrics"),
        (ValueError(), "ValueError"),
    ],
)
def test_errors_of_a_command_are_one_line(
    error: Exception,
    message: str,
    command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(args: argparse.Namespace) -> None:
        raise error

    command(run)
    assert cli.main(GIVEN) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"longcat train: {message}") and err.count("\n") == 1


def test_interruption_and_bugs(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    command(interrupted)
    assert cli.main(GIVEN) == 130
    assert capsys.readouterr().err == "longcat train: interrupted\n"

    def broken(args: argparse.Namespace) -> None:
        raise ZeroDivisionError

    command(broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(GIVEN)


def test_help_of_everything_needs_no_jax() -> None:
    code = (
        "import sys; from longcat_jax.cli.main import main; status = main(['--help']);"
        "heavy = {'jax', 'numpy', 'matplotlib', 'flax'} & set(sys.modules);"
        "sys.exit(f'imports {heavy}' if heavy else status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert all(f"  {name} " in result.stdout for name in cli.COMMANDS)


def test_module_and_no_command() -> None:
    run = [sys.executable, "-m", "longcat_jax"]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 2 and "usage: longcat COMMAND" in result.stderr
    result = subprocess.run([*run, "report", "--workdir=no/such"], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("longcat report: no/such") and result.stderr.count("\n") == 1


def test_reader_that_goes_away_leaves_no_traceback() -> None:
    code = (
        "import os, sys; from longcat_jax.cli import main as cli;"
        "cli.parse = lambda argv: type('A', (), dict(run=lambda self, args=None: print('x' * 99999)"
        " or sys.stdout.flush()))(); sys.exit(cli.main(['train']))"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait() == 1
    program.stderr.close()


def test_every_command_has_its_file() -> None:
    for name in cli.COMMANDS:
        assert importlib.util.find_spec(f"longcat_jax.cli.{name}") is not None, name


def test_files_of_the_folder_are_commands_or_shared() -> None:
    shared = {"__init__", "main", "config_file", "placement"}
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert files - shared <= set(cli.COMMANDS)
