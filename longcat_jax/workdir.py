"""A run's directory: which job it belongs to, and what may change when the job is run again.

config.json  tokenizer.json  data/  metrics.jsonl  expert_load.jsonl  tensorboard/
checkpoints/STEP/  profile/  report.html  report.png
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from longcat_jax.checkpoint import FOLDER, TOKENIZER, write_json
from longcat_jax.config import Config, ConfigError, differences, from_mapping, to_mapping

CONFIG = "config.json"
DATA = "data"

FREE = ("train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every")
FREE += ("train.keep_last", "train.keep_best", "train.max_loss_rise", "data.prefetch", "mesh.")
"""Keys that don't change what is learnt: a resumed run may set them anew."""


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the directory for one training process; the system lets go when that process ends.

    Raises:
      ConfigError: another process trains in it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{workdir}: another process is training in it") from None
        yield


def claim(workdir: Path, config: Config) -> None:
    """Makes the directory this job's, or checks that it already is.

    Raises:
      ConfigError: it belongs to another job; the line says which keys differ.
    """
    path = workdir / CONFIG
    if not path.exists():
        if (workdir / FOLDER).is_dir() and any((workdir / FOLDER).iterdir()):
            raise ConfigError(
                f"{workdir}: holds checkpoints but no {CONFIG}; use another --workdir"
            )
        write_json(path, to_mapping(config))
        return
    changed = differences(to_mapping(read_config(workdir)), to_mapping(config))
    refused = [line for line in changed if not line.startswith(FREE)]
    if refused:
        raise ConfigError(
            f"{workdir}: holds a run of another config ({'; '.join(refused)}); "
            "use another --workdir, or the config it was started with"
        )
    if changed:
        write_json(path, to_mapping(config))


def read_config(workdir: Path) -> Config:
    """The job of a workdir.

    Raises:
      ConfigError: no such file, or not one of ours.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise ConfigError(f"{path}: not there; is {workdir} the workdir of a training run?")
    try:
        return from_mapping(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error


def keep_tokenizer(workdir: Path) -> None:
    """Puts the data's tokenizer beside the checkpoints, where `load` finds it."""
    source = workdir / DATA / TOKENIZER
    if source.is_file() and not (workdir / TOKENIZER).is_file():
        partial = workdir / (TOKENIZER + ".partial")
        shutil.copyfile(source, partial)
        partial.replace(workdir / TOKENIZER)
