"""Reads a configuration: a Python file with get_config(), or a saved config.json."""

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longcat_jax import config as config_lib

OVERRIDES = "Any key of the configuration can be set: --config.train.steps=200"
"""What the help of a command with --config.KEY=VALUE ends with."""


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, directory: Path | None = None
) -> config_lib.Config:
    """`path` validated, with `PATH=VALUE` overrides applied.

    A job that starts from a checkpoint (`init_from`) has that checkpoint's model, whatever the
    file's section `model` says; overrides still apply.

    Args:
      path: a .py file whose `get_config()` returns a mapping such as ml_collections.ConfigDict, or
        a .json file as a workdir holds it.
      overrides: e.g. `["model.num_layers=4"]`.
      directory: the workdir that it is for; a run there that has saved holds its model itself.

    Raises:
      ConfigError: anything wrong with the file or a value in it, as one line.
      OSError: the file cannot be read.
    """
    path = Path(path)
    readers = {".py": _run_python, ".json": config_lib.read_json}
    if path.suffix not in readers:
        raise config_lib.ConfigError(
            f"{path}: not a configuration; name a .py file with get_config(), or a .json file"
        )
    mapping = readers[path.suffix](path)
    if not hasattr(mapping, "items"):
        kind = type(mapping).__name__
        raise config_lib.ConfigError(f"{path}: holds one {kind}, not a mapping of sections")
    mapping = dict(mapping.items())
    start = _init_from(mapping, overrides)
    if start:
        mapping["model"] = _started_model(start, directory)
    try:
        config = config_lib.from_mapping(mapping)
    except config_lib.ConfigError as error:
        raise config_lib.ConfigError(f"{path}: {error}") from error
    return config_lib.override(config, overrides)


def _started_model(start: str, directory: Path | None) -> config_lib.ModelConfig:
    from longcat_jax import checkpoint, workdir  # they bring jax: only where needed

    if directory is not None and workdir.started_from(directory, start):
        return workdir.read_config(directory).model
    return checkpoint.saved_model_config(start)


def _init_from(mapping: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """The checkpoint that training starts from, whose model the file's section gives way to."""
    given = [text.partition("=")[2] for text in overrides if text.startswith("init_from=")]
    start = given[-1] if given else mapping.get("init_from")
    return start if isinstance(start, str) else ""  # from_mapping refuses anything else


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise config_lib.ConfigError(f"{path}: not UTF-8 text ({error.reason})") from error


def _run_python(path: Path) -> Mapping[str, Any]:
    # Compiled here, not imported: a configuration leaves no bytecode and no entry in sys.modules.
    names = {"__name__": path.stem, "__file__": str(path)}
    text = _read_text(path)
    try:
        exec(compile(text, str(path), "exec"), names)
        if not callable(names.get("get_config")):
            raise config_lib.ConfigError(f"{path}: has no function get_config()")
        return names["get_config"]()
    except config_lib.ConfigError:
        raise
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        raise config_lib.ConfigError(f"{path}{line}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f":{frame.lineno}" for frame in frames if frame.filename == str(path)]
        where, kind = f"{path}{''.join(lines[-1:])}", type(error).__name__
        raise config_lib.ConfigError(f"{where}: {kind}: {error}") from error
