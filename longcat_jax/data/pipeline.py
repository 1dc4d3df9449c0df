"""Batches: records packed into rows, shuffled, repeated, mixed by weight, made ahead (grain).

Row n of a source is a function of seed and n, and the iterator's whole state a few counters. So it
is saved with each checkpoint and restored exactly wherever it stands, in the middle of an epoch or
a stage, by any number of processes.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from longcat_jax.config import Config, ConfigError, StageConfig
from longcat_jax.data.packing import PackedRows, pack_all, to_batch
from longcat_jax.data.records import MANIFEST, TOKENIZER, DataError, TokenDocuments
from longcat_jax.data.shuffle import ROUNDS, permuted
from longcat_jax.data.sources import resolve_sources
from longcat_jax.data.tokenizer import load_tokenizer

Batch = dict[str, np.ndarray]


class _Stream:
    """A source's rows, endless: each epoch is cut at other places and comes in another order."""

    def __init__(self, documents: TokenDocuments, *, seed: int, length: int, content: str) -> None:
        self.content = content
        """Identifies the data: a saved position counts in these rows and no others."""
        self._packed = PackedRows(documents, documents.lengths, length=length)
        self._seed, self._length = seed, length
        self._keys: tuple[int, list[int]] | None = None

    def _epoch_keys(self, epoch: int) -> list[int]:
        if self._keys is None or self._keys[0] != epoch:
            sequence = np.random.SeedSequence((self._seed, epoch))
            self._keys = epoch, sequence.generate_state(ROUNDS + 1, np.uint64).tolist()
        return self._keys[1]

    def row(self, number: int) -> np.ndarray:
        """The row that training reads as its `number`-th from this source."""
        rows = self._packed.full_rows
        epoch, index = divmod(number, rows)
        phase, *keys = self._epoch_keys(epoch)
        return self._packed.row(permuted(index, rows, keys), phase=phase % (self._length - 1))


class Mixture:
    """Which source a row comes from: the one furthest behind its weight since the stage began.

    Rows are counted over the global batch, so that a batch keeps the proportions with any number of
    processes. `drawn`: rows of each source since the stage began.
    """

    def __init__(self, sources: Sequence[str], stages: Sequence[StageConfig]) -> None:
        self._sources = tuple(sources)
        self._stages = tuple(stages) or (StageConfig(0, dict.fromkeys(sources, 1.0)),)
        self.drawn = dict.fromkeys(self._sources, 0)

    def choose(self, step: int, rows: int) -> list[str]:
        """The sources of the `rows` rows of optimizer step `step`; steps are asked for in order."""
        stage = max((s for s in self._stages if s.from_step <= step), key=lambda s: s.from_step)
        if stage.from_step == step:
            self.drawn = dict.fromkeys(self._sources, 0)
        weights = {name: stage.weights.get(name, 0.0) for name in self._sources}
        total = sum(weights.values())
        used = [name for name in self._sources if weights[name] > 0]
        before = sum(self.drawn.values())
        chosen = []
        for count in range(before + 1, before + 1 + rows):
            # max takes the first of equals: the order of sources decides.
            behind = {name: weights[name] / total * count - self.drawn[name] for name in used}
            chosen.append(max(behind, key=behind.__getitem__))
            self.drawn[chosen[-1]] += 1
        return chosen


class _Batches(grain.IterDataset):
    """Endless batches: rows `part` of each global batch."""

    def __init__(self, streams: Mapping[str, _Stream], config: Config, *, part: slice) -> None:
        super().__init__()
        self.streams, self.config, self.part = streams, config, part

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)


class _BatchIterator(grain.DatasetIterator):
    """Counts rows of the global batch, so its state is the same in all processes."""

    def __init__(self, batches: _Batches) -> None:
        super().__init__()
        self._batches = batches
        self._step = 0
        self._mixture = Mixture(list(batches.streams), batches.config.data.stages)
        self._taken = dict.fromkeys(batches.streams, 0)

    def __next__(self) -> Batch:
        numbered = []
        for name in self._mixture.choose(self._step, self._batches.config.train.global_batch):
            numbered.append((name, self._taken[name]))
            self._taken[name] += 1
        self._step += 1
        streams, mine = self._batches.streams, numbered[self._batches.part]
        return to_batch([streams[name].row(number) for name, number in mine])

    def get_state(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "drawn": dict(self._mixture.drawn),
            "taken": dict(self._taken),
            "content": {name: s.content for name, s in self._batches.streams.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        if set(state["taken"]) != set(self._taken):
            saved, now = ", ".join(sorted(state["taken"])), ", ".join(sorted(self._taken))
            raise DataError(
                f"data.sources: the checkpoint's data had {saved}, the config has {now}"
            )
        for name, stream in self._batches.streams.items():
            if state["content"][name] != stream.content:
                raise DataError(
                    f"data.sources.{name}: holds other data than when the checkpoint was saved"
                )
        self._step = state["step"]
        self._mixture.drawn = dict(state["drawn"])
        self._taken = dict(state["taken"])


def _part(config: Config, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that a process reads."""
    rows, left = divmod(config.train.global_batch, process_count)
    if left:
        raise ConfigError(
            f"train.global_batch={config.train.global_batch}: must be divisible by the number of "
            f"processes, {process_count}"
        )
    return slice(process_index * rows, (process_index + 1) * rows)


def open_train(
    config: Config, directory: str | Path, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless training batches of this process, `data.prefetch` of them made ahead by a thread.

    A batch holds `tokens`, `segment_ids` and `positions`, int32 [global_batch / process_count,
    sequence_length + 1]. The global batch of step i depends on the config, the data and i alone.
    `get_state()` gives a JSON-able dict that stands for the batches handed out so far; after
    `set_state` of it the same batches follow, bit for bit, whatever the number of processes.
    `close()` ends the thread.

    Args:
      config: `data`, `train`, `model` and `seed` are used.
      directory: of the default corpus and tokenizer.json; process 0 makes them on first use.
      process_index: of this process.
      process_count: of all.

    Raises:
      ConfigError, DataError: one line; DataError also from the iterator, at a damaged record.
    """
    part = _part(config, process_index, process_count)
    paths = resolve_sources(config, Path(directory), process_index=process_index)
    streams = {}
    for name, path in paths.items():
        documents = TokenDocuments(path, "train")
        seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{name}".encode()).digest()[:8])
        manifest = (path / MANIFEST).read_bytes()
        streams[name] = _Stream(
            documents,
            seed=seed,
            length=config.train.sequence_length + 1,
            content=hashlib.sha256(manifest).hexdigest()[:16],
        )
    batches = _Batches(streams, config, part=part)
    return iter(ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.data.prefetch))


class _Chain:
    """Documents of several sources, one source after the other."""

    def __init__(self, parts: Sequence[TokenDocuments]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.lengths = np.concatenate([part.lengths for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - (int(self._ends[part - 1]) if part else 0)]


def _validation_documents(config: Config, directory: Path, process_index: int) -> _Chain:
    paths = resolve_sources(config, directory, process_index=process_index)
    # A directory may serve two names; its validation documents count once.
    parts = [TokenDocuments(path, "validation") for path in dict.fromkeys(paths.values())]
    documents = _Chain(parts)
    if not len(documents):
        names = ", ".join(map(str, paths.values()))
        raise DataError(
            f"{names}: no validation documents; prepare more documents, with --validation > 0"
        )
    return documents


def open_validation(
    config: Config, directory: str | Path, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """The validation batches, shaped as training's; the last is filled up with segment 0.

    Every token of every validation document but its first is a target once. All sources' validation
    documents are read, the first `train.eval_batches` batches of them if that is > 0.

    Raises:
      ConfigError, DataError: as `open_train`; no validation documents.
    """
    part = _part(config, process_index, process_count)
    documents = _validation_documents(config, Path(directory), process_index)
    packed = PackedRows(documents, documents.lengths, length=config.train.sequence_length + 1)

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(pack_all(packed, rows=config.train.global_batch), 1):
            yield {key: value[part] for key, value in batch.items()}
            if number == config.train.eval_batches:
                return

    return batches()


def validation_text(config: Config, directory: str | Path) -> bytes:
    """Text of all validation documents, joined, for baselines that work on bytes."""
    documents = _validation_documents(config, Path(directory), 0)
    tokenizer = load_tokenizer(Path(directory) / TOKENIZER)
    return "".join(tokenizer.decode(documents[i]) for i in range(len(documents))).encode()


def token_bytes(directory: str | Path) -> np.ndarray:
    """int32 [entries of DIR/tokenizer.json]: bytes of text behind every id, 0 for special ones."""
    return load_tokenizer(Path(directory) / TOKENIZER).token_bytes()
