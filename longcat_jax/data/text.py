"""Documents of text files: .txt and .jsonl (field "text"), plain, .gz or .zst, streamed.

A .jsonl line is a document. A .txt file is one too, unless it is long: then it is cut at the first
blank line (or after twice the length, line) past DOCUMENT_CHARACTERS, so that a book shuffles,
packs and splits well.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import zstandard

from longcat_jax.data.records import DataError

DOCUMENT_CHARACTERS = 32_768
KINDS = (".txt", ".jsonl")
PACKED = (".gz", ".zst")


def _kind(path: Path) -> str | None:
    """.txt or .jsonl, looking through .gz and .zst; None for anything else."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes[-1:] and suffixes[-1] in KINDS else None


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Text files of paths, directories (searched through) and globs, each once and sorted.

    Raises:
      DataError: nothing there, or a file named outright that is of another kind.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
            if not matches:
                raise DataError(f"{pattern}: no .txt or .jsonl files (.gz, .zst) in this directory")
        elif path.is_file():
            matches = [path]
        else:
            matches = sorted(
                p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file()
            )
            if not matches:
                raise DataError(f"{pattern}: no such file or directory")
        for match in matches:
            if _kind(match) is None:
                raise DataError(
                    f"{match}: unknown kind of file; must be .txt or .jsonl, or one of them as .gz "
                    "or .zst"
                )
            found[match] = None
    return list(found)


def _lines(path: Path) -> Iterator[str]:
    """The file's lines, unpacked and decoded, ends of line kept.

    Raises:
      DataError: damaged compression, or invalid UTF-8 with its line and byte offset in the unpacked
        text.
    """
    offset = 0
    try:
        with path.open("rb") as raw:
            stream = raw
            if path.suffix.lower() == ".gz":
                stream = gzip.GzipFile(fileobj=raw)
            elif path.suffix.lower() == ".zst":
                unpacker = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                stream = io.BufferedReader(unpacker, 2**16)
            for number, line in enumerate(stream, 1):
                try:
                    yield line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}: invalid UTF-8 at byte {offset + error.start} (line {number})"
                    ) from error
                offset += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: damaged compressed file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _text_documents(path: Path) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in _lines(path):
        lines.append(line)
        size += len(line)
        if size >= 2 * DOCUMENT_CHARACTERS or (size >= DOCUMENT_CHARACTERS and not line.strip()):
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


def _json_documents(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: malformed JSON ({error.msg})") from error
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f'{path}:{number}: must be an object with a field "text"') from error
        if not isinstance(text, str):
            raise DataError(f'{path}:{number}: "text" must be a string, not {type(text).__name__}')
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f'{path}:{number}: "text" has half of a surrogate pair') from error
        yield text


def read_documents(path: Path) -> Iterator[str]:
    """The file's documents in order; blank ones are left out.

    Raises:
      DataError: a line that says what is wrong and where; an empty file.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path}: empty file")
    documents = _text_documents(path) if _kind(path) == ".txt" else _json_documents(path)
    yield from (document for document in documents if document.strip())
