"""A checkpoint of ours, converted or trained, becomes a HuggingFace one."""

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longcat_jax import checkpoint
from longcat_jax.config import ModelConfig, to_mapping
from longcat_jax.hf import config as hf_config
from longcat_jax.hf import layout as table
from longcat_jax.hf import safetensors, store
from longcat_jax.hf.from_hf import Result, conclude, copy_tokenizer, np_dtype
from longcat_jax.hf.safetensors import Entry, HFError
from longcat_jax.hf.selection import Selection, router_rows, shrink, source_of
from longcat_jax.hf.staging import Staging
from longcat_jax.hf.transfer import Task, Workers, transfer

LAYOUTS = ("release", "transformers")
SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Target:
    """What to write: layout, dtype and size of files."""

    layout: str = "release"
    """release: what Meituan publishes, vLLM and SGLang read; transformers: with the zero rows for
    identity experts without which transformers >= 5 refuses a file.
    """
    dtype: str | None = None
    """None: as stored."""
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise HFError(f"--layout={self.layout}: must be one of {', '.join(LAYOUTS)}")
        if self.shard_bytes <= 0:
            raise HFError(f"--shard_size={self.shard_bytes}: must be > 0")


@dataclasses.dataclass(frozen=True)
class _Source:
    """A checkpoint of ours that has been looked at."""

    workdir: Path
    item: Path
    full: ModelConfig
    config: ModelConfig
    """Of the chosen part."""
    arrays: dict[str, Any]
    dtypes: dict[str, np.dtype]
    """At the destination, by our path."""
    raw: dict[str, Any]
    """config.json to write."""


def _open(path: str | Path, target: Target, selection: Selection) -> _Source:
    workdir, step = checkpoint.locate(path)
    full = checkpoint.saved_model_config(path)
    config = shrink(full, selection)
    item = workdir / checkpoint.FOLDER / str(step) / "params"
    arrays = store.open_arrays(item, full)
    dtypes = _dtypes(arrays, target.dtype)
    raw = hf_config.to_raw(config, dtype=dtypes[table.MAIN[0].path].name)
    return _Source(workdir, item, full, config, arrays, dtypes, raw)


def check(path: str | Path, *, target: Target, selection: Selection) -> str:
    """What `to_hf` would write, in words; writes nothing.

    Raises:
      HFError, CheckpointError: it cannot be converted; one line says why.
    """
    source = _open(path, target, selection)
    tensors = list(_all_tensors(source.config, target.layout))
    files = len(_shards(iter(tensors), source.dtypes, target.shard_bytes))
    nbytes = sum(Task(t, source.dtypes[t.rule.path]).nbytes for t in tensors)
    return (
        f"{source.item}: {len(source.arrays)} arrays fit the model; "
        f"{len(tensors)} tensors, {nbytes / 1e9:.2f} GB, in {files} "
        f"{'file' if files == 1 else 'files'}, mostly {source.raw['dtype']}"
    )


def _dtypes(arrays: Mapping, wanted: str | None) -> dict[str, np.dtype]:
    kept = {rule.path for rule in table.MAIN if rule.float32}
    dtypes = {}
    for path, array in arrays.items():
        dtype = np_dtype(wanted) if wanted else np.dtype(array.dtype.numpy_dtype)
        dtypes[path] = np.promote_types(dtype, np.float32) if path in kept else dtype
        if dtypes[path] not in safetensors.NAMES:
            raise HFError(f"{path}: dtype {dtypes[path].name} has no place in a checkpoint")
    return dtypes


def _shards(
    tensors: Iterator[table.Tensor], dtypes: Mapping[str, np.dtype], shard_bytes: int
) -> list[list[table.Tensor]]:
    """Tensors in files of at most `shard_bytes`, or of one tensor."""
    shards: list[list[table.Tensor]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        nbytes = Task(tensor, dtypes[tensor.rule.path]).nbytes
        if nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= nbytes
    return shards


def _all_tensors(config: ModelConfig, layout: str) -> Iterator[table.Tensor]:
    yield from table.tensors(config)
    if layout == "transformers":
        yield from table.padding(config)


def to_hf(
    path: str | Path,
    output: str | Path,
    *,
    target: Target | None = None,
    selection: Selection | None = None,
    workers: Workers | None = None,
) -> Result:
    """Converts a checkpoint into a HuggingFace folder; restartable as `from_hf` is.

    Args:
      path: a workdir or `WORKDIR/checkpoints/STEP`, from training or from `from_hf`.
      output: made here; must not exist.
      target: layout, dtype, size of files.
      selection: layers and experts to keep; None: all.
      workers: threads, and this process among several.

    Raises:
      HFError, CheckpointError: a checkpoint that cannot be read or told to HuggingFace's readers,
        or an output in the way.
    """
    started, workers, target = time.perf_counter(), workers or Workers(), target or Target()
    selection = selection or Selection()
    source = _open(path, target, selection)
    config, full, dtypes = source.config, source.full, source.dtypes
    metadata = (source.item / store.METADATA).stat()
    plan = {
        "direction": "to_hf",
        "source": str(source.item),
        "files": [metadata.st_size, metadata.st_mtime_ns],
        "config": json.loads(json.dumps(source.raw)),
        "selection": json.loads(json.dumps(to_mapping(selection))),
        "target": to_mapping(target),
    }
    shards = _shards(_all_tensors(config, target.layout), dtypes, target.shard_bytes)
    staging = Staging(Path(output), plan, process=workers.index)
    # The reader goes array by array: a training checkpoint's chunks span many tensors.
    ordered = sorted(table.tensors(config), key=lambda tensor: tensor.rule.path)
    tasks = [
        Task(tensor, dtypes[tensor.rule.path], router_rows(tensor, selection, full) is not None)
        for tensor in ordered
    ]

    def make(result: Path) -> None:
        _create_files(result, shards, dtypes)
        checkpoint.write_json(result / hf_config.CONFIG, source.raw)
        copy_tokenizer(source.workdir, result)

    staging.prepare(make, nbytes=sum(task.nbytes for task in tasks))
    entries = safetensors.open_checkpoint(staging.result)

    def read(tensor: table.Tensor, start: int, stop: int) -> np.ndarray:
        whole = source_of(tensor, selection, full)
        kept = router_rows(tensor, selection, full)
        array = source.arrays[tensor.rule.path]
        if kept is not None:
            return store.read(array, whole, 0, whole.shape[0])[kept]
        return store.read(array, whole, start, stop)

    def write(tensor: table.Tensor, start: int, rows: np.ndarray) -> None:
        entries[tensor.name].write(start, rows)

    moved = transfer(tasks, read, write, staging=staging, workers=workers)
    return conclude(staging, tasks, moved=moved, started=started)


def _create_files(
    folder: Path, shards: list[list[table.Tensor]], dtypes: Mapping[str, np.dtype]
) -> None:
    """Files of final size with their headers, and the index where there are several."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = safetensors.SINGLE
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        contents = {tensor.name: (dtypes[tensor.rule.path], tensor.shape) for tensor in shard}
        entries: dict[str, Entry] = safetensors.create(folder / name, contents)
        weight_map |= dict.fromkeys(entries, name)
        total += sum(entry.nbytes for entry in entries.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        checkpoint.write_json(folder / safetensors.INDEX, index)
