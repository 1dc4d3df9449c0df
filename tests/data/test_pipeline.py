import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longcat_jax.config import Config, ConfigError
from longcat_jax.data import (
    DataError,
    load_tokenizer,
    open_train,
    open_validation,
    prepare,
    target_pairs,
    token_bytes,
    validation_text,
)
from longcat_jax.data.packing import PackedRows
from longcat_jax.data.pipeline import Mixture
from longcat_jax.data.records import TokenDocuments
from tests.data.conftest import write_text

Batch = dict[str, np.ndarray]
Make = Callable[..., Config]
BOTH = [
    dict(from_step=0, weights=dict(letters=3.0, digits=1.0)),
    dict(from_step=5, weights=dict(digits=1.0)),
    dict(from_step=8, weights=dict(letters=1.0, digits=2.0)),
]


def take(config: Config, directory: Path, count: int, **process: int) -> list[Batch]:
    iterator = open_train(config, directory, **process)
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert list(a) == list(b) == ["tokens", "segment_ids", "positions"]
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def rows_in_epoch(source: str, length: int) -> int:
    documents = TokenDocuments(Path(source), "train")
    return PackedRows(documents, documents.lengths, length=length).full_rows


@pytest.mark.parametrize("prefetch", [0, 3])
def test_restored_state_gives_the_same_batches(
    sources: dict[str, str], make_config: Make, tmp_path: Path, prefetch: int
) -> None:
    config = make_config(dict(sources=sources, stages=BOTH, prefetch=prefetch))
    epoch = rows_in_epoch(sources["letters"], 20)
    count = epoch // 2 + 10  # two of six rows a step
    iterator = open_train(config, tmp_path)
    states, batches = [iterator.get_state()], []
    for _ in range(count):
        batches.append(next(iterator))
        states.append(json.loads(json.dumps(iterator.get_state())))
    # Beginning, within a stage, both sides of each switch, and all around the end of an epoch.
    taken = [state["taken"]["letters"] for state in states]
    crossing = int(np.searchsorted(taken, epoch))
    assert 8 < crossing < count - 5
    for position in (0, 1, 4, 5, 6, 8, crossing - 1, crossing, crossing + 1):
        fresh = open_train(config, tmp_path)
        fresh.set_state(states[position])
        assert fresh.get_state() == states[position]
        assert_same([next(fresh) for _ in range(4)], batches[position : position + 4])
        fresh.close()
    # An iterator that has run ahead goes back, too.
    iterator.set_state(states[2])
    assert_same([next(iterator) for _ in range(3)], batches[2:5])
    iterator.close()


def test_prefetch_changes_nothing(
    sources: dict[str, str], make_config: Make, tmp_path: Path
) -> None:
    taken = [take(make_config(dict(sources=sources, prefetch=p)), tmp_path, 9) for p in (0, 1, 5)]
    assert_same(taken[0], taken[1])
    assert_same(taken[0], taken[2])


def test_epochs_are_complete_and_differ(
    sources: dict[str, str], make_config: Make, tmp_path: Path
) -> None:
    only = dict(sources=dict(letters=sources["letters"]))
    rows = rows_in_epoch(sources["letters"], 20)
    config = make_config(only, global_batch=rows)
    first, second = take(config, tmp_path, 2)
    documents = TokenDocuments(Path(sources["letters"]), "train")
    expected = Counter(t for i in range(len(documents)) for t in documents[i][1:].tolist())
    for batch in (first, second):
        assert (batch["segment_ids"] > 0).all()
        found = Counter(target_pairs(batch)[1].tolist())
        assert not found - expected, "no target twice"
        assert (expected - found).total() < 19, "less than a row is left out"
    ordered = [{tuple(row) for row in batch["tokens"].tolist()} for batch in (first, second)]
    assert ordered[0] != ordered[1], "cut at other places"
    reseeded = take(make_config(only, global_batch=rows, seed=3), tmp_path, 1)[0]
    assert not np.array_equal(reseeded["tokens"], first["tokens"])


def test_rows_are_shuffled(sources: dict[str, str], make_config: Make, tmp_path: Path) -> None:
    config = make_config(dict(sources=dict(letters=sources["letters"])), global_batch=40)
    (batch,) = take(config, tmp_path, 1)
    follows = (batch["tokens"][1:, 0] == batch["tokens"][:-1, -1]).mean()
    assert follows < 0.5, "neighbours in the source would share that token"


@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_share_one_global_batch(
    sources: dict[str, str], make_config: Make, tmp_path: Path, process_count: int
) -> None:
    config = make_config(dict(sources=sources, stages=BOTH))
    whole = take(config, tmp_path, 10)
    parts = [
        take(config, tmp_path, 10, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    joined = [
        {key: np.concatenate([p[key] for p in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_state_of_one_process_serves_several(
    sources: dict[str, str], make_config: Make, tmp_path: Path
) -> None:
    config = make_config(dict(sources=sources, stages=BOTH))
    iterator = open_train(config, tmp_path)
    for _ in range(7):
        next(iterator)
    part = open_train(config, tmp_path, process_index=1, process_count=3)
    part.set_state(iterator.get_state())
    whole = next(iterator)
    assert_same([next(part)], [{key: value[2:4] for key, value in whole.items()}])
    iterator.close()
    part.close()


def test_stages_switch_at_their_step(
    sources: dict[str, str], make_config: Make, tmp_path: Path
) -> None:
    tokenizer_ids = {}
    config = make_config(dict(sources=sources, stages=BOTH), global_batch=12)
    batches = take(config, tmp_path, 11)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    digits = {i for i in range(tokenizer.vocab_size) if set(tokenizer.decode([i])) & set("01234")}
    tokenizer_ids["digits"] = [
        sum(bool(digits & set(row)) for row in batch["tokens"].tolist()) for batch in batches
    ]
    assert tokenizer_ids["digits"] == [3] * 5 + [12] * 3 + [8] * 3


def test_mixture_keeps_proportions_at_any_number_of_rows() -> None:
    mixture = Mixture(["a", "b", "c"], ())
    first = [name for step in range(7) for name in mixture.choose(step, 2)]
    assert {name: first.count(name) for name in "abc"} == {"a": 5, "b": 5, "c": 4}
    for size in range(1, 15):
        counts = [first[:size].count(name) for name in "abc"]
        assert max(counts) - min(counts) <= 1


def test_validation_holds_every_document_once(
    sources: dict[str, str], make_config: Make, tmp_path: Path
) -> None:
    config = make_config(dict(sources=sources))
    batches = list(open_validation(config, tmp_path))
    assert {b["tokens"].shape for b in batches} == {(6, 20)}
    following = np.concatenate([target_pairs(b)[1] for b in batches])
    parts = [TokenDocuments(Path(path), "validation") for path in sources.values()]
    documents = [part[i] for part in parts for i in range(len(part))]
    assert [len(part) > 0 for part in parts] == [True, True]
    np.testing.assert_array_equal(following, np.concatenate([d[1:] for d in documents]))
    text = validation_text(config, tmp_path)
    assert len(text) == token_bytes(tmp_path)[following].sum()
    assert set(text.decode()) == set("abcde01234 ")
    assert_same(list(open_validation(config, tmp_path)), batches)


def test_validation_parts_and_limit(
    sources: dict[str, str], make_config: Make, tmp_path: Path
) -> None:
    config = make_config(dict(sources=sources))
    whole = list(open_validation(config, tmp_path))
    part = list(open_validation(config, tmp_path, process_index=1, process_count=2))
    assert_same(part, [{key: value[3:] for key, value in batch.items()} for batch in whole])
    limited = make_config(dict(sources=sources), eval_batches=2)
    assert_same(list(open_validation(limited, tmp_path)), whole[:2])


def test_fast_enough(sources: dict[str, str], make_config: Make, tmp_path: Path) -> None:
    """Even with documents much shorter than a row; processor time, for other jobs may run here."""
    data = dict(sources=sources, prefetch=0)
    iterator = open_train(make_config(data, global_batch=8, sequence_length=128), tmp_path)
    next(iterator)
    start = time.process_time()
    for _ in range(100):
        next(iterator)
    speed = 100 * 8 * 128 / (time.process_time() - start)
    iterator.close()
    assert speed > 200_000


def copied(source: str, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(source, target)
    return target


def read_all(config: Config, directory: Path) -> None:
    iterator = open_train(config, directory)
    try:
        for _ in range(60):
            next(iterator)
    finally:
        iterator.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_corrupt_record_is_named(
    sources: dict[str, str], make_config: Make, tmp_path: Path, prefetch: int
) -> None:
    copy = copied(sources["letters"], tmp_path)
    shard = copy / "train-00000.arrayrecord"
    content = bytearray(shard.read_bytes())
    used = len(bytes(content).rstrip(b"\0"))
    first = next(i for i in range(200, used) if content[i])  # the file is mostly padding
    for i in range(first, first + 40):
        content[i] ^= 0xFF
    shard.write_bytes(content)
    config = make_config(dict(sources=dict(letters=str(copy)), prefetch=prefetch))
    with pytest.raises(DataError, match=r"train-00000\.arrayrecord: damaged") as caught:
        read_all(config, tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_unusable_directories(sources: dict[str, str], make_config: Make, tmp_path: Path) -> None:
    copy = copied(sources["letters"], tmp_path)
    config = make_config(dict(sources=dict(letters=str(copy))))
    shard, manifest = copy / "train-00000.arrayrecord", copy / "manifest.json"
    content, about = shard.read_bytes(), manifest.read_text()

    def refuse(match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            read_all(config, tmp_path / "data")
        assert "\n" not in str(caught.value)

    shard.write_bytes(content[: len(content) // 2])
    refuse(r"train-00000\.arrayrecord: \d+ bytes, manifest\.json says \d+")
    shard.write_bytes(bytes(len(content)))
    refuse(r"train-00000\.arrayrecord: damaged")
    shard.unlink()
    refuse(r"train-00000\.arrayrecord: missing")
    shard.write_bytes(content)
    np.save(copy / "train.lengths.npy", np.ones(3, np.uint32))
    refuse(r"train\.lengths\.npy: does not agree with manifest\.json")
    manifest.write_text(about[:100])
    refuse(r"manifest\.json: damaged manifest")
    manifest.write_text(about.replace('"format": 1', '"format": 7'))
    refuse(r"manifest\.json: format 7, this version reads 1")
    manifest.unlink()
    refuse(r"copy: not made by `longcat prepare`")


def test_sources_of_different_tokenizers(
    sources: dict[str, str], make_config: Make, tmp_path: Path
) -> None:
    copy = copied(sources["digits"], tmp_path)
    manifest = copy / "manifest.json"
    about = json.loads(manifest.read_text())
    about["tokenizer_sha256"] = "0" * 64
    manifest.write_text(json.dumps(about))
    config = make_config(dict(sources=dict(letters=sources["letters"], digits=str(copy))))
    with pytest.raises(DataError, match=r"copy/manifest\.json: tokenized with another tokenizer"):
        open_train(config, tmp_path / "data")


def test_another_job_in_the_directory(
    sources: dict[str, str], make_config: Make, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(
        Path(sources["letters"], "tokenizer.json").read_text() + " "
    )
    with pytest.raises(DataError, match=r"tokenizer\.json: another tokenizer than the config's"):
        open_train(make_config(dict(sources=sources)), tmp_path)


def test_config_that_does_not_fit(
    sources: dict[str, str], make_config: Make, tmp_path: Path
) -> None:
    small = make_config(dict(sources=sources), model=dict(vocab_size=288))
    with pytest.raises(ConfigError, match="model.vocab_size=288: must be >= 310"):
        open_train(small, tmp_path)
    other = make_config(dict(sources=sources), model=dict(bos_token_id=2))
    with pytest.raises(ConfigError, match="model.bos_token_id=2: must be 1"):
        open_train(other, tmp_path)
    unknown = make_config(dict(sources=sources), model=dict(eos_token_id=70))
    with pytest.raises(DataError, match="eos_token_id=70: not a special token"):
        open_train(unknown, tmp_path)
    config = make_config(dict(sources=sources))
    with pytest.raises(ConfigError, match="train.global_batch=6: must be divisible by .* 4"):
        open_train(config, tmp_path, process_count=4)
    missing = make_config(dict(sources=dict(letters="/does/not/exist")))
    with pytest.raises(DataError, match="/does/not/exist: not made by `longcat prepare`"):
        open_train(missing, tmp_path)


def test_state_of_other_sources_is_refused(
    sources: dict[str, str], make_config: Make, tmp_path: Path
) -> None:
    iterator = open_train(make_config(dict(sources=sources)), tmp_path)
    one = open_train(make_config(dict(sources=dict(letters=sources["letters"]))), tmp_path)
    with pytest.raises(DataError, match="had digits, letters, the config has letters"):
        one.set_state(iterator.get_state())
    iterator.close()
    one.close()


def test_no_validation_documents(make_config: Make, tmp_path: Path) -> None:
    text = write_text(tmp_path / "some.jsonl", "abc", 9, seed=4)
    prepare([str(text)], tmp_path / "some", vocab_size=262, validation=0)
    config = make_config(dict(sources=dict(some=str(tmp_path / "some"))))
    with pytest.raises(DataError, match="some: no validation documents"):
        open_validation(config, tmp_path / "data")
    (batch,) = take(config, tmp_path / "data", 1)
    assert batch["tokens"].shape == (6, 20)
