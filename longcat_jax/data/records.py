"""A prepared directory: ArrayRecord shards of token ids, a manifest, the tokenizer.

    DIR/manifest.json  DIR/tokenizer.json  DIR/train.lengths.npy  DIR/validation.lengths.npy
    DIR/train-00000.arrayrecord ...  DIR/validation-00000.arrayrecord ...

A record is a document: begin, ids, end, as little-endian uint16 or uint32. ArrayRecord stores a
checksum with every record, so a damaged one is noticed when it is read; truncated files are noticed
on opening, by their size.
"""

import array
import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

FORMAT = 1
SHARD_BYTES = 256 * 2**20
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"


class DataError(ValueError):
    """Data that cannot be used; the message is one line meant for the user."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file: name in its directory, documents in it, its size in bytes."""

    name: str
    documents: int
    size: int


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents, tokens (begin and end included) and bytes of text of a split, and its files."""

    documents: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a prepared directory holds. `settings`: what it was made from."""

    format: int
    tokenizer_sha256: str
    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    dtype: str
    settings: dict[str, Any]
    train: Split
    validation: Split


def _lengths_name(split: str) -> str:
    return f"{split}.lengths.npy"


def _split_from(mapping: dict[str, Any]) -> Split:
    shards = tuple(Shard(**shard) for shard in mapping["shards"])
    return Split(mapping["documents"], mapping["tokens"], mapping["bytes"], shards)


def read_manifest(directory: Path) -> Manifest:
    """The directory's manifest, after checking that every file is there in its full size.

    Raises:
      DataError: no manifest, an unreadable one, or one of another format; a missing or truncated
        file.
    """
    path = directory / MANIFEST
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
        if mapping["format"] != FORMAT:
            raise DataError(
                f"{path}: format {mapping['format']}, this version reads {FORMAT}; prepare it again"
            )
        splits = {name: _split_from(mapping.pop(name)) for name in SPLITS}
        manifest = Manifest(**mapping, **splits)
    except FileNotFoundError as error:
        raise DataError(f"{directory}: not made by `longcat prepare` (no {MANIFEST})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged manifest ({error}); prepare it again") from error
    for shard in (*manifest.train.shards, *manifest.validation.shards):
        file = directory / shard.name
        if not file.is_file():
            raise DataError(f"{file}: missing, though {MANIFEST} lists it; prepare it again")
        if file.stat().st_size != shard.size:
            raise DataError(
                f"{file}: {file.stat().st_size} bytes, {MANIFEST} says {shard.size}; prepare it "
                "again"
            )
    return manifest


class _SplitWriter:
    """Writes a split's documents, a new file every SHARD_BYTES."""

    def __init__(self, directory: Path, split: str, dtype: str) -> None:
        self._directory, self._split = directory, split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shards: list[Shard] = []
        self._bytes = 0
        self._lengths = array.array("I")
        self._writer: ArrayRecordWriter | None = None
        self._in_shard = self._shard_bytes = 0

    def write(self, tokens: np.ndarray, num_bytes: int) -> None:
        if self._writer is None:
            # One record a group: documents are read one at a time, in random order.
            self._writer = ArrayRecordWriter(str(self._path()), "group_size:1,zstd:1")
        record = tokens.astype(self._dtype).tobytes()
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise OSError(f"{self._path()}: cannot be written ({error})") from error
        self._in_shard += 1
        self._shard_bytes += len(record)
        self._lengths.append(len(tokens))
        self._bytes += num_bytes
        if self._shard_bytes >= SHARD_BYTES:
            self._finish_shard()

    def _path(self) -> Path:
        return self._directory / f"{self._split}-{len(self._shards):05d}.arrayrecord"

    def _finish_shard(self) -> None:
        if self._writer is None:
            return
        writer, self._writer, path = self._writer, None, self._path()
        try:
            writer.close()
        except RuntimeError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error
        self._shards.append(Shard(path.name, self._in_shard, path.stat().st_size))
        self._in_shard = self._shard_bytes = 0

    def finish(self) -> Split:
        self._finish_shard()
        lengths = np.array(self._lengths, "<u4")
        np.save(self._directory / _lengths_name(self._split), lengths)
        return Split(
            len(lengths), int(lengths.sum(dtype=np.int64)), self._bytes, tuple(self._shards)
        )


def write_documents(
    directory: Path, documents: Iterable[tuple[str, np.ndarray, int]], **about: Any
) -> Manifest:
    """Writes (split, tokens, bytes of text) documents as shards, then the manifest.

    Args:
      directory: an existing one, see `staged`.
      documents: in the order in which they are to be stored.
      **about: the manifest's `tokenizer_sha256`, `vocab_size`, `bos_token_id`, `eos_token_id`,
        `settings`.
    """
    dtype = "uint16" if about["vocab_size"] <= 2**16 else "uint32"
    writers = {split: _SplitWriter(directory, split, dtype) for split in SPLITS}
    try:
        for split, tokens, num_bytes in documents:
            writers[split].write(tokens, num_bytes)
    finally:
        splits = {split: writer.finish() for split, writer in writers.items()}
    manifest = Manifest(format=FORMAT, dtype=dtype, **about, **splits)
    text = json.dumps(dataclasses.asdict(manifest), indent=2)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """An empty directory that becomes `output` if the block succeeds and is removed otherwise.

    What a killed run left of it is removed by the next one.
    """
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(output)  # takes the place of an empty directory, fails on any other
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_lengths(path: Path, split: Split) -> np.ndarray:
    try:
        lengths = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read, prepare it again ({error})") from error
    if lengths.shape != (split.documents,) or lengths.sum(dtype=np.int64) != split.tokens:
        raise DataError(f"{path}: does not agree with {MANIFEST}, prepare it again")
    return lengths


class TokenDocuments:
    """Random access to a split's documents, int32 arrays. `lengths`: uint32 [documents].

    Raises:
      DataError: a damaged file, naming it.
    """

    def __init__(self, directory: Path, split: str) -> None:
        manifest = read_manifest(directory)
        shards = getattr(manifest, split).shards
        self._paths = [directory / shard.name for shard in shards]
        self._ends = np.cumsum([shard.documents for shard in shards])
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._source = None
        self.lengths = _read_lengths(directory / _lengths_name(split), getattr(manifest, split))
        if shards:
            try:
                self._source = ArrayRecordDataSource([str(path) for path in self._paths])
                found = len(self._source)
            except (RuntimeError, ValueError, OSError) as error:
                raise DataError(self._damaged(self._first_damaged(), error)) from error
            if found != self._ends[-1]:
                raise DataError(
                    f"{directory}: {found} {split} records, {MANIFEST} says {self._ends[-1]}"
                )

    def _first_damaged(self) -> Path:
        for path in self._paths:
            try:
                len(ArrayRecordDataSource([str(path)]))
            except (RuntimeError, ValueError, OSError):
                return path
        return self._paths[0].parent

    def _damaged(self, path: Path, error: Exception) -> str:
        reason = " ".join(str(error).split())
        return f"{path}: damaged, prepare it again ({reason[:200]})"

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            record = self._source[index]
        except (RuntimeError, OSError) as error:
            path = self._paths[int(np.searchsorted(self._ends, index, side="right"))]
            raise DataError(self._damaged(path, error)) from error
        return np.frombuffer(record, self._dtype).astype(np.int32)

    def __repr__(self) -> str:
        return f"TokenDocuments({', '.join(map(str, self._paths))})"
