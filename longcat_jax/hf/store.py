"""Our side: the `params` item of a checkpoint, read and written chunk by chunk with tensorstore.

Orbax' own save wants whole stacked arrays (361 GB for the released experts). This writes the same
item piecewise: an array is a zarr folder `a.b.c` beside the `_METADATA` that Orbax reads. A matrix
is cut along its out dim only, and a chunk's bytes are in Fortran order: they are then exactly
HuggingFace's [out, in] rows, so a conversion moves bytes and transposes nothing.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from longcat_jax.config import ModelConfig
from longcat_jax.hf.layout import Tensor, array_shapes, rules
from longcat_jax.hf.safetensors import HFError

PIECE = 32 << 20
"""Bytes of a matrix that are in hand at once, and of a chunk."""
CONTEXT = {
    "data_copy_concurrency": {"limit": 2},
    "file_io_concurrency": {"limit": 8},
    "file_io_sync": False,
}
METADATA = "_METADATA"
_HANDLERS = "orbax.checkpoint._src.handlers."
_ITEMS = {
    "config": f"{_HANDLERS}json_checkpoint_handler.JsonCheckpointHandler",
    "params": f"{_HANDLERS}standard_checkpoint_handler.StandardCheckpointHandler",
}


def piece_rows(rows: int, row_bytes: int) -> int:
    """Rows of HuggingFace's to move at once: at most PIECE bytes, dividing `rows` where that is
    not much smaller.
    """
    most = max(min(rows, PIECE // row_bytes), 1)
    even = next(count for count in range(most, 0, -1) if rows % count == 0)
    return even if 2 * even > most else most


def array_name(path: str) -> str:
    """Folder or key of an array."""
    return path.replace("/", ".")


def create(item: Path, config: ModelConfig, dtypes: Mapping[str, np.dtype]) -> None:
    """Makes the item of a model with its metadata and no chunks.

    Args:
      item: the folder `params`.
      config: the model.
      dtypes: by our path.
    """
    item.mkdir(parents=True)
    shapes = array_shapes(config)
    for rule in {rule.path: rule for rule in rules(config)}.values():
        folder = item / array_name(rule.path)
        folder.mkdir()
        dtype, shape = dtypes[rule.path], shapes[rule.path]
        own = shape[rule.stacked :]
        if rule.transposed:
            out = own[-1] if rule.half is None else own[-1] // 2
            chunk = (own[0], piece_rows(out, own[0] * dtype.itemsize))
        else:
            chunk = (piece_rows(own[0], math.prod(own[1:]) * dtype.itemsize), *own[1:])
        metadata = {
            "zarr_format": 2,
            "shape": list(shape),
            "chunks": [1] * rule.stacked + list(chunk),
            "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.newbyteorder("<").str,
            "order": "F" if rule.transposed else "C",
            "compressor": None,
            "fill_value": None,
            "filters": None,
            "dimension_separator": ".",
        }
        (folder / ".zarray").write_text(json.dumps(metadata), encoding="utf-8")
    (item / METADATA).write_text(json.dumps(_tree_metadata(shapes)), encoding="utf-8")


def _tree_metadata(shapes: Mapping[str, tuple]) -> dict[str, Any]:
    tree = {}
    for path, shape in shapes.items():
        keys = tuple(path.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(shape),
            },
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def write_step(step: Path, config: Mapping[str, Any]) -> None:
    """What makes a folder with a `params` item a checkpoint: the `config` item and Orbax' file."""
    (step / "config").mkdir(exist_ok=True)
    (step / "config" / "metadata").write_text(json.dumps(config), encoding="utf-8")
    now = time.time_ns()
    record = {
        "item_handlers": _ITEMS,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(record), encoding="utf-8")


def open_arrays(item: Path, config: ModelConfig) -> dict[str, ts.TensorStore]:
    """The arrays of an item, by our path; of a converted checkpoint or one that training saved.

    Raises:
      HFError: an array is missing, or not of the shape that the model says.
    """
    try:
        metadata = json.loads((item / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        metadata = None
    if not isinstance(metadata, dict):
        raise HFError(f"{item}: not an Orbax item (no readable {METADATA})")
    arrays = _open_all(item, config, metadata, cache_bytes=0)
    largest = max(
        math.prod(a.chunk_layout.read_chunk.shape) * a.dtype.numpy_dtype.itemsize
        for a in arrays.values()
    )
    if largest > 2 * PIECE:
        # A larger chunk is read once and cut from memory, not read again for every piece.
        arrays = _open_all(item, config, metadata, cache_bytes=2 * largest)
    for path, shape in array_shapes(config).items():
        if arrays[path].shape != shape:
            raise HFError(f"{item}: {path} is {list(arrays[path].shape)}, expected {list(shape)}")
    return arrays


def _open_all(
    item: Path, config: ModelConfig, metadata: Mapping, *, cache_bytes: int
) -> dict[str, ts.TensorStore]:
    context = ts.Context({**CONTEXT, "cache_pool": {"total_bytes_limit": cache_bytes}})
    return {path: _open(item, path, metadata, context=context) for path in array_shapes(config)}


def _open(item: Path, path: str, metadata: Mapping, *, context: ts.Context) -> ts.TensorStore:
    base = {"driver": "file", "path": f"{item}/"}
    if metadata.get("use_ocdbt"):
        kvstore: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": array_name(path) + "/"}
    else:
        kvstore = {"driver": "file", "path": f"{item / array_name(path)}/"}
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    spec = {
        "driver": driver,
        "kvstore": kvstore,
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,  # a chunk that is gone is an error, not zeros
    }
    try:
        return ts.open(spec, open=True, context=context).result()
    except ValueError as error:
        reason = str(error).splitlines()[0][:150]
        raise HFError(f"{item}: {path} cannot be opened ({reason})") from error


def _place(array: ts.TensorStore, tensor: Tensor, start: int, stop: int) -> ts.TensorStore:
    """The part of ours that holds rows start..stop of HuggingFace's, in its orientation."""
    part = array[tensor.index] if tensor.index else array
    if not tensor.rule.transposed:
        return part[start:stop]
    return part[:, tensor.offset + start : tensor.offset + stop].T


def read(array: ts.TensorStore, tensor: Tensor, start: int, stop: int) -> np.ndarray:
    """Rows start..stop of HuggingFace's tensor.

    Raises:
      HFError: a chunk is missing or damaged.
    """
    try:
        return np.ascontiguousarray(_place(array, tensor, start, stop).read().result())
    except ValueError as error:
        reason = str(error).splitlines()[0][:150]
        raise HFError(f"{array.kvstore.path}: {tensor.name} cannot be read ({reason})") from error


def write(array: ts.TensorStore, tensor: Tensor, start: int, rows: np.ndarray) -> None:
    """Puts rows of HuggingFace's tensor at start.. into our array; returns when they are stored."""
    place = _place(array, tensor, start, start + len(rows))
    place.write(rows, can_reference_source_data_indefinitely=True).result()
