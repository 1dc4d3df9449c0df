"""The safetensors format: headers read and written, bytes moved in pieces, nothing held.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, byte range), and the bytes.
A checkpoint is one file or several, the latter usually with an index.json.
"""

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FP8 = DTYPES["F8_E4M3"]
LONGEST_HEADER = 100_000_000


class HFError(ValueError):
    """A HuggingFace checkpoint that cannot be converted; the message is one line for the user."""


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """The system's errors on an open file don't say which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the file's start."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first dim."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.shape[0] * self.row_bytes

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start..stop.

        Raises:
          HFError: the file has become shorter.
        """
        stop = self.shape[0] if stop is None else stop
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        view = memoryview(rows.reshape(-1).view(np.uint8))
        done, first = 0, self.offset + start * self.row_bytes
        file = os.open(self.file, os.O_RDONLY)
        try:
            while done < len(view):
                count = os.preadv(file, [view[done:]], first + done)
                if count == 0:
                    raise HFError(f"{self.file}: ends early")
                done += count
        finally:
            os.close(file)
        return rows

    def write(self, start: int, rows: np.ndarray) -> None:
        """Puts rows at start.. into a file made by `create`."""
        view = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        done, first = 0, self.offset + start * self.row_bytes
        with _named(self.file):
            file = os.open(self.file, os.O_WRONLY)
            try:
                while done < len(view):
                    done += os.pwrite(file, view[done:], first + done)
            finally:
                os.close(file)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a file.

    Raises:
      HFError: not a safetensors file, truncated, tensors that overlap or leave holes, or a dtype
        that no LongCat checkpoint has.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else LONGEST_HEADER + 1
        if length > LONGEST_HEADER:
            raise HFError(f"{file}: not a safetensors file")
        if 8 + length > size:
            raise HFError(f"{file}: truncated inside its header")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {n: _entry(file, n, v, 8 + length) for n, v in header.items()}
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError):
            raise HFError(f"{file}: not a safetensors file (unreadable header)") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise HFError(f"{file}: {name}: its bytes do not follow those of the tensor before it")
        end += entry.nbytes
    if end > size:
        raise HFError(f"{file}: truncated: {size} bytes, its header speaks of {end}")
    return entries


def _entry(file: Path, name: str, value: Mapping, base: int) -> Entry:
    dtype, shape, offsets = value["dtype"], tuple(value["shape"]), tuple(value["data_offsets"])
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise HFError(f"{file}: {name}: dtype {dtype} is not supported; known: {known}")
    if not shape:
        raise HFError(f"{file}: {name}: has no dims")
    if len(offsets) != 2 or any(type(n) is not int or n < 0 for n in (*shape, *offsets)):
        raise HFError(
            f"{file}: {name}: shape {list(shape)}, data_offsets {list(offsets)}: must be sizes and "
            "[begin, end]"
        )
    begin, end = offsets
    entry = Entry(file, DTYPES[dtype], shape, base + begin)
    if entry.nbytes != end - begin:
        raise HFError(f"{file}: {name}: {end - begin} bytes for a {dtype} of shape {list(shape)}")
    return entry


def open_checkpoint(directory: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder, by name.

    Raises:
      HFError: no safetensors files, a shard missing or damaged, or an index that contradicts them.
    """
    if not directory.is_dir():
        raise HFError(f"{directory}: no such directory")
    index = directory / INDEX
    if index.is_file():
        return _indexed(directory, index)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise HFError(f"{directory}: holds no safetensors file")
    return _merged(files)


def _indexed(directory: Path, index: Path) -> dict[str, Entry]:
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (KeyError, TypeError, ValueError):
        raise HFError(f"{index}: not an index (no weight_map)") from None
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise HFError(f"{index}: {name}: {file!r} is not the name of a file")
    files = sorted({directory / file for file in weight_map.values()})
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise HFError(f"{index}: names {absent[0]}, which is not there ({len(absent)} missing)")
    entries = _merged(files)
    for name, file in weight_map.items():
        if name not in entries or entries[name].file.name != file:
            raise HFError(f"{index}: says that {file} holds {name}, which it doesn't")
    return entries


def _merged(files: Iterable[Path]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise HFError(f"{file}: holds {name}, and so does {entries[name].file.name}")
            entries[name] = entry
    return entries


def create(file: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, Entry]:
    """Makes a file of its final size, all zeros behind the header (sparse where the disk can).

    Args:
      file: overwritten.
      tensors: name -> (dtype, shape), in the order of their bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        entry = entries[name] = Entry(file, dtype, shape, end)
        end = entry.offset + entry.nbytes
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [entry.offset, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # bytes begin aligned
    base = 8 + len(text)
    with _named(file), file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(base + end)
    return {n: dataclasses.replace(e, offset=base + e.offset) for n, e in entries.items()}
