"""A run's directory: which job it belongs to, and what may change when the job is run again.

config.json  tokenizer.json  data/  metrics.jsonl  expert_load.jsonl  tensorboard/
checkpoints/STEP/  profile/  report.html  report.png
"""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from longcat_jax.checkpoint import TOKENIZER, finished_steps, write_json
from longcat_jax.config import (
    Config,
    ConfigError,
    differences,
    from_mapping,
    read_json,
    to_mapping,
)
from longcat_jax.parallel import expert

CONFIG = "config.json"
DATA = "data"

FREE = ("train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every")
FREE += ("train.keep_last", "train.keep_best", "train.max_loss_rise", "data.prefetch", "mesh.")
FREE += ("train.accumulate", "train.remat", "train.unroll", "parallel.")
FREE += ("kernels", "deterministic")
"""Keys that don't change what is learnt, but for selections that a capacity leaves out: a resumed
run may set them anew.
"""


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
    """Makes the directory this job's, or checks that it already is. A job that never saved a
    checkpoint gives way to the next.

    Raises:
      ConfigError: it belongs to another job; the line says which keys differ.
    """
    path, wanted = workdir / CONFIG, to_mapping(config)
    if not finished_steps(workdir):
        write_json(path, wanted)
        return
    stored = read_config(workdir)
    changed = differences(to_mapping(stored), wanted)
    refused = [line for line in changed if not line.startswith(FREE)]
    if refused:
        raise ConfigError(
            f"{workdir}: holds a run of another config ({'; '.join(refused)}); "
            "use another --workdir, or the config it was started with"
        )
    before, now = (expert.described(one.parallel, one.mesh) for one in (stored, config))
    if before != now:
        print(f"experts: {now} from here on; {before} so far", flush=True)
    if changed:
        write_json(path, wanted)


def read_config(workdir: Path) -> Config:
    """The job of a workdir.

    Raises:
      ConfigError: no such file, or not one of ours.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise ConfigError(f"{path}: not there; is {workdir} the workdir of a training run?")
    mapping = read_json(path)
    try:
        return from_mapping(mapping)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def keep_tokenizer(workdir: Path) -> None:
    """Puts the data's tokenizer beside the checkpoints, where `load` finds it."""
    source, target = workdir / DATA / TOKENIZER, workdir / TOKENIZER
    if not target.is_file() or target.read_bytes() != source.read_bytes():
        partial = workdir / (TOKENIZER + ".partial")
        shutil.copyfile(source, partial)
        partial.replace(target)


def started_from(workdir: Path, path: str) -> Path | None:
    """The checkpoint that the run in `workdir` was started from, if `path` means that one.

    It need not exist any more: a run that has saved goes on without it.
    """
    if not finished_steps(workdir):
        return None
    stored, named = read_config(workdir).init_from, Path(path).absolute()
    return Path(stored) if stored and named in (Path(stored), *Path(stored).parents) else None
