"""A HuggingFace checkpoint becomes one of ours, in the files' dtype."""

import collections
import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longcat_jax.checkpoint import FOLDER, write_json
from longcat_jax.config import ModelConfig, to_mapping
from longcat_jax.hf import config as hf_config
from longcat_jax.hf import layout, safetensors, store
from longcat_jax.hf.check import SCALE, Comparison, compare
from longcat_jax.hf.safetensors import FP8, Entry, HFError
from longcat_jax.hf.selection import Selection, router_rows, shrink, source_of
from longcat_jax.hf.staging import Staging
from longcat_jax.hf.transfer import Task, Workers, transfer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Passed through in both directions, as far as they are there."""
FP8_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a conversion did."""

    finished: bool
    """False: this process' share is done, others are still at work."""
    tensors: int
    moved_bytes: int
    """By this run; an interrupted one's part is not in it."""
    seconds: float
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class HFCheckpoint:
    """A folder that has been looked at."""

    directory: Path
    entries: dict[str, Entry]
    config: ModelConfig
    block: tuple[int, int] | None
    """Rows and columns that share an fp8 scale."""
    comparison: Comparison

    def dtypes(self, wanted: str | None) -> dict[str, np.dtype]:
        """Dtype of each of our arrays: the files', unless `wanted`; the router at least float32."""
        single, default = np.dtype(np.float32), np_dtype(self.config.dtype)
        found: dict[str, np.dtype] = {}
        for tensor in layout.tensors(self.config):
            own = self.entries[tensor.name].dtype
            own = default if own == FP8 else own
            if wanted is not None:
                own = np_dtype(wanted)
            if tensor.rule.float32:
                own = np.promote_types(own, single)
            path = tensor.rule.path
            found[path] = np.promote_types(found[path], own) if path in found else own
        return found

    def read(self, tensor: layout.Tensor, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor, fp8 ones in float32."""
        entry = self.entries[tensor.name]
        rows = entry.read(start, stop)
        return rows if entry.dtype != FP8 else self._dequantise(tensor.name, start, rows)

    def _dequantise(self, name: str, start: int, rows: np.ndarray) -> np.ndarray:
        block_rows, block_columns = self.block
        scale = self.entries[name + SCALE].read().astype(np.float32)
        columns = np.repeat(scale, block_columns, axis=1)[:, : rows.shape[1]]
        values = FP8_VALUES[rows.view(np.uint8)]
        for index, row in enumerate(values, start):
            row *= columns[index // block_rows]
        return values


def np_dtype(name: str) -> np.dtype:
    """The numpy dtype of a `model.dtype`."""
    return next(dtype for dtype in safetensors.DTYPES.values() if dtype.name == name)


def open_hf(directory: str | Path) -> HFCheckpoint:
    """Reads config.json and every header, and compares the two.

    Raises:
      HFError: unreadable files, or an architecture that our model doesn't implement. Tensors that
        don't fit are in `comparison`, and raise nothing yet.
    """
    directory = Path(directory)
    entries = safetensors.open_checkpoint(directory)
    raw = hf_config.read_raw(directory)
    embedding = entries.get(layout.MAIN[0].name)
    own = embedding.dtype.name if embedding is not None and embedding.dtype != FP8 else None
    stated = raw.get("dtype") or raw.get("torch_dtype")
    quantised = any(entry.dtype == FP8 for entry in entries.values())
    dtype = (stated or own) if quantised else (own or stated)
    mtp = any(name.startswith(layout.MTP_PREFIX) for name in entries)
    config = hf_config.parse(raw, dtype=str(dtype or "float32"), mtp=mtp)
    block = _block(raw)
    return HFCheckpoint(directory, entries, config, block, compare(entries, config, block))


def _block(raw: Mapping[str, Any]) -> tuple[int, int] | None:
    quantisation = raw.get("quantization_config")
    if not quantisation:
        return None
    if not isinstance(quantisation, dict):
        raise HFError(
            f"{hf_config.CONFIG}: quantization_config={quantisation!r}: must be an object"
        )
    method, form = quantisation.get("quant_method"), quantisation.get("fmt", "e4m3")
    block = quantisation.get("weight_block_size")
    if method != "fp8" or form != "e4m3":
        raise HFError(
            f"{hf_config.CONFIG}: quantization_config {method!r} {form!r} is not implemented; only "
            "'fp8' 'e4m3'"
        )
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or any(type(size) is not int or size <= 0 for size in sizes):
        raise HFError(f"{hf_config.CONFIG}: weight_block_size={block!r}: must be [rows, columns]")
    return block[0], block[1]


def check(hf_dir: str | Path, *, selection: Selection | None = None) -> str:
    """What a folder holds, in words; writes nothing.

    Raises:
      HFError: it cannot be converted; one line with what is missing, unknown or misshapen.
    """
    found = open_hf(hf_dir)
    found.comparison.require(found.directory)
    shrink(found.config, selection or Selection())
    compared, config = found.comparison, found.config
    kinds = collections.Counter(entry.dtype.name for entry in found.entries.values())
    nbytes = sum(entry.nbytes for entry in found.entries.values())
    lines = [
        f"{found.directory}: {compared.present} of {compared.expected} tensors, "
        f"{nbytes / 1e9:.2f} GB ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})",
        f"{config.num_layers} layers, {config.n_routed_experts} real + {config.zero_expert_num} "
        f"identity experts, {'an' if config.num_nextn_predict_layers else 'no'} MTP head",
    ]
    if compared.padded:
        lines.append(f"{compared.padded} matrices of identity experts are not used")
    if compared.scales:
        lines.append(f"{compared.scales} fp8 matrices become {config.dtype}")
    return "\n".join(lines)


def from_hf(
    hf_dir: str | Path,
    output: str | Path,
    *,
    selection: Selection | None = None,
    dtype: str | None = None,
    workers: Workers | None = None,
) -> Result:
    """Converts a HuggingFace folder into a checkpoint that `longcat_jax.load` opens.

    An interrupted conversion goes on where it was when called again alike; `output` appears by one
    rename at the end.

    Args:
      hf_dir: config.json and safetensors files, in any of the layouts of docs/converting.md.
      output: made here; must not exist.
      selection: layers and experts to keep; None: all.
      dtype: to convert to; None: the files' own. The router stays float32.
      workers: threads, and this process among several.

    Raises:
      HFError: a checkpoint that cannot be converted, or an output in the way.
    """
    started, workers = time.perf_counter(), workers or Workers()
    selection = selection or Selection()
    found = open_hf(hf_dir)
    found.comparison.require(found.directory)
    dtypes = found.dtypes(dtype)
    config = dataclasses.replace(shrink(found.config, selection), dtype=dtype or found.config.dtype)
    files = sorted({entry.file for entry in found.entries.values()})
    plan = {
        "direction": "from_hf",
        "source": str(found.directory.resolve()),
        "files": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "model": to_mapping(config),
        "selection": json.loads(json.dumps(to_mapping(selection))),
        "dtypes": {path: kind.name for path, kind in dtypes.items()},
    }
    tasks = [
        Task(
            tensor,
            dtypes[tensor.rule.path],
            router_rows(tensor, selection, found.config) is not None,
        )
        for tensor in layout.tensors(config)
    ]
    staging = Staging(Path(output), plan, process=workers.index)
    item = staging.result / FOLDER / "0" / "params"

    def make(result: Path) -> None:
        store.create(item, config, dtypes)
        store.write_step(item.parent, {"model": to_mapping(config)})
        write_json(result / hf_config.CONFIG, {"model": to_mapping(config)})
        copy_tokenizer(found.directory, result)

    staging.prepare(make, nbytes=sum(task.nbytes for task in tasks))
    arrays = store.open_arrays(item, config)

    def read(tensor: layout.Tensor, start: int, stop: int) -> np.ndarray:
        source = source_of(tensor, selection, found.config)
        kept = router_rows(tensor, selection, found.config)
        if kept is not None:
            return found.read(source, 0, source.shape[0])[kept]
        return found.read(source, start, stop)

    def write(tensor: layout.Tensor, start: int, rows: np.ndarray) -> None:
        store.write(arrays[tensor.rule.path], tensor, start, rows)

    moved = transfer(tasks, read, write, staging=staging, workers=workers)
    return conclude(staging, tasks, moved=moved, started=started)


def conclude(staging: Staging, tasks: list[Task], *, moved: int, started: float) -> Result:
    """Makes the output appear if nothing is left to do."""
    warnings = tuple(text for text in staging.finished().values() if text)
    finished = staging.finish(task.tensor.name for task in tasks)
    return Result(finished, len(tasks), moved, time.perf_counter() - started, warnings)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files that belong to the tokenizer."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
