"""Text to prepared directories: `prepare` for files, `prepare_installed_python` for the default.

Own text is read twice: once to check all of it, hash it and sample it for the tokenizer, once to
tokenize it. So bad input ends the command before anything is written.
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from longcat_jax.data.corpus import installed_python
from longcat_jax.data.records import (
    TOKENIZER,
    DataError,
    Manifest,
    staged,
    write_documents,
)
from longcat_jax.data.text import find_files, read_documents
from longcat_jax.data.tokenizer import SAMPLE_BYTES, Tokenizer, load_tokenizer, train_tokenizer

BLOCK_CHARACTERS = 1_000_000
"""Text handed to the tokenizer at a time."""


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids that begin and end every document."""

    bos_token_id: int = 1
    eos_token_id: int = 2

    def check(self, tokenizer: Tokenizer, path: str) -> None:
        """Raises DataError where the tokenizer has other tokens at these ids than special ones."""
        special = tokenizer.special_ids()
        for name, index in dataclasses.asdict(self).items():
            if index not in special:
                known = ", ".join(map(str, sorted(special)[:8])) or "none"
                raise DataError(
                    f"{name}={index}: not a special token of {path}; special ids there: {known}"
                )


def _blocks(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    block, size = [], 0
    for item in documents:
        block.append(item)
        size += len(item[1])
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _tokenized(
    documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, ids: SpecialIds, *, total_bytes: int
) -> Iterator[tuple[str, np.ndarray, int]]:
    """(split, text) -> (split, tokens, bytes), with a progress bar of `total_bytes`."""
    bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None)
    with bar as progress:
        for block in _blocks(documents):
            tokens = tokenizer.encode_documents(
                [text for _, text in block], **dataclasses.asdict(ids)
            )
            for (split, text), ids_of_text in zip(block, tokens, strict=True):
                size = len(text.encode())
                progress.update(size)
                yield split, ids_of_text, size


def _write(
    directory: Path,
    documents: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    *,
    ids: SpecialIds,
    total_bytes: int,
    settings: dict,
) -> Manifest:
    tokenizer.save(directory / TOKENIZER)
    return write_documents(
        directory,
        _tokenized(documents, tokenizer, ids, total_bytes=total_bytes),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        settings=settings,
        **dataclasses.asdict(ids),
    )


def prepare_installed_python(
    output: Path, *, settings: dict, vocab_size: int, tokenizer: Tokenizer | None, ids: SpecialIds
) -> Manifest:
    """Writes the default corpus to `output`.

    Args:
      output: appears when everything is in it.
      settings: recorded; `corpus_mb` and `validation_mb` size the splits.
      vocab_size: entries of the tokenizer that is trained where `tokenizer` is None.
      tokenizer: the one to use.
      ids: begin and end.
    """
    start = time.monotonic()
    train_bytes = round(settings["corpus_mb"] * 1e6)
    validation_bytes = round(settings["validation_mb"] * 1e6)
    with staged(output) as directory:
        corpus = installed_python(train_bytes=train_bytes, validation_bytes=validation_bytes)
        if tokenizer is None:
            tokenizer = train_tokenizer(corpus.train, vocab_size)
            ids.check(tokenizer, "the default tokenizer")
        documents = [("train", text) for text in corpus.train]
        documents += [("validation", text) for text in corpus.validation]
        total = sum(corpus.train_packages.values()) + sum(corpus.validation_packages.values())
        manifest = _write(
            directory, documents, tokenizer, ids=ids, total_bytes=total, settings=settings
        )
    train, held = manifest.train, manifest.validation
    tqdm.write(
        f"installed-python: {train.bytes / 1e6:.1f} of {settings['corpus_mb']:g} MB asked for, "
        f"{train.tokens / 1e6:.1f} M tokens, {len(corpus.train_packages)} packages; "
        f"validation {held.bytes / 1e6:.2f} MB, {len(corpus.validation_packages)} other packages; "
        f"{time.monotonic() - start:.0f} s"
    )
    return manifest


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


@dataclasses.dataclass(frozen=True)
class _Survey:
    """What the first reading found: sizes, the lowest share of a document, a sample of text."""

    documents: int
    total_bytes: int
    lowest: float
    sample: tuple[str, ...]


def _survey(files: Sequence[Path]) -> _Survey:
    documents = total = 0
    lowest, sample = 1.0, []
    with tqdm(unit=" documents", desc="checking", disable=None) as progress:
        for path in files:
            room = SAMPLE_BYTES // len(files)  # every file has its part in the vocabulary
            for text in read_documents(path):
                documents += 1
                total += len(text.encode())
                lowest = min(lowest, _share(text))
                if room > 0:
                    sample.append(text)
                    room -= len(text)
                progress.update()
    if not documents:
        raise DataError(f"{', '.join(map(str, files[:3]))}: no documents, only blank text")
    return _Survey(documents, total, lowest, tuple(sample))


def prepare(
    inputs: Sequence[str],
    output: Path,
    *,
    tokenizer_path: str = "",
    vocab_size: int = 32768,
    validation: float = 0.01,
    ids: SpecialIds = SpecialIds(),
) -> Manifest:
    """Tokenizes text files into a prepared directory, a source for `data.sources`.

    Args:
      inputs: files, directories, globs; see text.py.
      output: directory to make.
      tokenizer_path: a tokenizer.json; empty: one of `vocab_size` entries is trained on a sample of
        the text.
      vocab_size: see there.
      validation: share of documents that go to validation, chosen by their content; at least one
        where > 0 and there are different documents.
      ids: begin and end.

    Raises:
      DataError: bad input, or an output that isn't empty.
    """
    output = output.absolute()
    if not 0 <= validation < 1:
        raise DataError(f"--validation={validation}: must be in [0, 1)")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output}: exists and is not an empty directory")
    files = find_files(inputs)
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else None
    survey = _survey(files)
    limit = (
        max(validation, np.nextafter(survey.lowest, 1.0))
        if validation and survey.documents > 1
        else 0.0
    )

    def documents() -> Iterator[tuple[str, str]]:
        for path in files:
            for text in read_documents(path):
                yield ("validation" if _share(text) < limit else "train"), text

    with staged(output) as directory:
        tokenizer = tokenizer or train_tokenizer(survey.sample, vocab_size)
        ids.check(tokenizer, tokenizer_path or "the trained tokenizer")
        settings = {"inputs": [str(path) for path in files], "validation": validation}
        manifest = _write(
            directory,
            documents(),
            tokenizer,
            ids=ids,
            total_bytes=survey.total_bytes,
            settings=settings,
        )
        if not manifest.train.documents:
            raise DataError(f"{', '.join(inputs)}: all documents are alike; use --validation=0")
    return manifest
