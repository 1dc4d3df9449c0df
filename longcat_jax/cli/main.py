"""`longcat COMMAND`: finds the command, parses its options, turns errors into one line.

A command is a file of this folder with `register(subparsers) -> None`, which adds a parser of its
own name with `set_defaults(run=function)`; `function(args) -> int | None` does the work. A command
that takes `--config.PATH=VALUE` says `set_defaults(overrides=[])` too and finds them, as
`PATH=VALUE`, in `args.overrides`. Only the file of the command asked for is imported, so that help
is immediate.
"""

import argparse
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

COMMANDS = {
    "train": "train a model; the same command again resumes it",
    "evaluate": "loss and bits per byte of a checkpoint on validation text",
    "generate": "continue a prompt",
    "report": "plots and final figures of a run, one html and one png",
    "prepare": "turn text files into tokenized training data",
    "convert": "HuggingFace checkpoints to ours and back",
    "plan": "parameters, memory and work of a configuration, without running it",
}
EXAMPLE = "longcat train --config=configs/quickstart.py --workdir=runs/quickstart"
OVERRIDE = "--config."
USAGE_ERROR = 2
INTERRUPTED = 130


class UsageError(Exception):
    """A command line that cannot be read; the message is one line meant for the user."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations and usage dumps; unknown options get a suggestion."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but an unknown option is reported before a missing one.

        Raises:
          UsageError: an unknown or impossible option.
        """
        args = sys.argv[1:] if args is None else list(args)
        overrides = self.get_default("overrides")
        if overrides is not None:
            args, overrides = split_overrides(args, self.prog)
        if self._subparsers is None:
            self._check_options(args)
        known, rest = super().parse_known_args(args, namespace)
        if overrides is not None:
            known.overrides = overrides
        if rest and self._subparsers is None:
            raise UsageError(f"{self.prog}: unexpected argument {rest[0]!r}")
        return known, rest

    def _check_options(self, args: Sequence[str]) -> None:
        options = [name for name in self._option_string_actions if name.startswith("--")]
        for argument in args:
            if argument == "--":
                return
            name = argument.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in options:
                raise UsageError(f"{self.prog}: unknown option {name!r}{suggest(name, options)}")

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below the usage."""
        raise UsageError(f"{self.prog}: {message}")


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'train'?`, or what is known where nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def split_overrides(args: Sequence[str], prog: str) -> tuple[list[str], list[str]]:
    """`--config.PATH=VALUE` and `--config.PATH VALUE` out of the arguments, as `PATH=VALUE`.

    Raises:
      UsageError: a path without a value.
    """
    rest, overrides = [], []
    pending = iter(args)
    for argument in pending:
        if not argument.startswith(OVERRIDE):
            rest.append(argument)
            continue
        path, equals, value = argument.removeprefix(OVERRIDE).partition("=")
        if not equals:
            value = next(pending, "--")
        if not path or (not equals and value.startswith("--")):
            raise UsageError(f"{prog}: {argument}: write {OVERRIDE}PATH=VALUE")
        overrides.append(f"{path}={value}")
    return rest, overrides


def help_text() -> str:
    """What `longcat --help` prints."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: longcat COMMAND [options]",
            "",
            *lines,
            "",
            "`longcat COMMAND --help` lists a command's options.",
            f"Start with: {EXAMPLE}",
        ]
    )


def describe(error: BaseException) -> str:
    """An error as one line."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The chosen command's arguments, its function under `run`.

    Raises:
      UsageError: an unknown command or option.
    """
    name = argv[0]
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UsageError(f"longcat: unknown {kind} {name!r}{suggest(name, COMMANDS)}")
    parser = Parser(prog="longcat")
    subparsers = parser.add_subparsers(parser_class=Parser)
    importlib.import_module(f"longcat_jax.cli.{name}").register(subparsers)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: done; 1: ValueError or OSError, one line on stderr; 2: a command line that cannot be read;
    130: interrupted. Any other exception is a bug and keeps its traceback. `python -X dev -m
    longcat_jax ...` keeps all of them.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        print(help_text(), file=sys.stderr)
        return USAGE_ERROR
    if argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    # Orbax logs every thread of a failing save; what matters of it is in the error that is raised.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        args = parse(argv)
        return args.run(args) or 0
    except UsageError as error:
        print(error, file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"longcat {argv[0]}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`longcat generate ... | head`); nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"longcat {argv[0]}: {describe(error)}", file=sys.stderr)
        return 1
