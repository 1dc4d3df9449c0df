import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import zstandard

from longcat_jax.cli.main import main
from longcat_jax.data import DataError, prepare, records
from longcat_jax.data.records import TokenDocuments, read_manifest
from longcat_jax.data.text import DOCUMENT_CHARACTERS, find_files, read_documents
from longcat_jax.data.tokenizer import load_tokenizer

DOCUMENTS = [f"Document {i}: " + "some words " * (i % 7) + "\u00e9nd\n" for i in range(90)]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A directory of every kind of file, 90 documents together."""
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    (root / "a.txt").write_text(DOCUMENTS[0], newline="")
    (root / "b.jsonl").write_bytes(json_lines(DOCUMENTS[1:30]) + b"\n")
    (root / "c.jsonl.gz").write_bytes(gzip.compress(json_lines(DOCUMENTS[30:60])))
    packer = zstandard.ZstdCompressor()
    frames = [packer.compress(json_lines(part)) for part in (DOCUMENTS[60:70], DOCUMENTS[70:88])]
    (root / "deep" / "d.JSONL.zst").write_bytes(b"".join(frames))
    (root / "deep" / "e.txt.zst").write_bytes(packer.compress(DOCUMENTS[88].encode()))
    (root / "deep" / "f.txt.gz").write_bytes(gzip.compress(DOCUMENTS[89].encode()))
    (root / "ignored.md").write_text("not a document")
    return root


def texts_of(directory: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    documents = TokenDocuments(directory, split)
    return [tokenizer.decode(documents[i]) for i in range(len(documents))]


def test_all_documents_are_in_one_of_the_splits(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(["prepare", f"--input={inputs}", f"--output={output}", "--vocab_size=290"]) == 0
    train, held = texts_of(output, "train"), texts_of(output, "validation")
    assert sorted(train + held) == sorted(DOCUMENTS)
    assert 1 <= len(held) <= 5
    manifest = read_manifest(output)
    assert (manifest.train.documents, manifest.validation.documents) == (len(train), len(held))
    assert manifest.train.bytes == sum(len(text.encode()) for text in train)
    documents = TokenDocuments(output, "train")
    read = [documents[i] for i in range(len(documents))]
    assert manifest.train.tokens == sum(map(len, read))
    assert all(document[0] == 1 and document[-1] == 2 for document in read)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"], "nothing left beside it"


def test_the_split_depends_on_the_text_alone(inputs: Path, tmp_path: Path) -> None:
    prepare([str(inputs)], tmp_path / "one", vocab_size=290, validation=0.3)
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_bytes(json_lines(DOCUMENTS[::-1] + DOCUMENTS[3:9]))
    tokenizer = str(tmp_path / "one" / "tokenizer.json")
    prepare([str(backwards)], tmp_path / "two", tokenizer_path=tokenizer, validation=0.3)
    for split in ("train", "validation"):
        assert set(texts_of(tmp_path / "one", split)) == set(texts_of(tmp_path / "two", split))
    assert 12 < len(texts_of(tmp_path / "one", "validation")) < 42
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    prepare([str(inputs)], tmp_path / "three", vocab_size=290, validation=0.3)
    for name in names:
        same = (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
        assert same, f"{name} is not repeatable"


def test_shards(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "SHARD_BYTES", 600)
    manifest = prepare([str(inputs)], tmp_path / "out", vocab_size=290, validation=0)
    assert len(manifest.train.shards) > 3
    assert manifest.validation.documents == 0
    assert sorted(texts_of(tmp_path / "out", "train")) == sorted(DOCUMENTS)


def test_long_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 400 + "\n\n"
    text = paragraph * 60 + "x" * 7 + "\n" + "line without blank ones\n" * 5000
    (tmp_path / "long.txt").write_text(text)
    pieces = list(read_documents(tmp_path / "long.txt"))
    assert "".join(pieces) == text
    assert all(len(piece) < 2 * DOCUMENT_CHARACTERS + 100 for piece in pieces)
    assert pieces[0] == paragraph * -(-DOCUMENT_CHARACTERS // len(paragraph))
    assert len(pieces) == 6


def test_find_files(inputs: Path) -> None:
    names = [
        "a.txt",
        "b.jsonl",
        "c.jsonl.gz",
        "deep/d.JSONL.zst",
        "deep/e.txt.zst",
        "deep/f.txt.gz",
    ]
    found = find_files([str(inputs)])
    assert [path.relative_to(inputs).as_posix() for path in found] == names
    assert find_files([f"{inputs}/**/*.zst", str(inputs / "deep")]) == [*found[3:5], found[5]]


BAD = {
    "nothing.txt": (None, "nothing.txt: no such file or directory"),
    "empty.txt": (b"", "empty.txt: empty file"),
    "blank.txt": (b" \n \n", "blank.txt: no documents, only blank text"),
    "table.csv": (b"a,b", "table.csv: unknown kind of file; must be .txt or .jsonl"),
    "latin.txt": (b"fine\nna\xefve\n", "latin.txt: invalid UTF-8 at byte 7 (line 2)"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b\n', "cut.jsonl:2: malformed JSON"),
    "field.jsonl": (b'{"text": "a"}\n\n{"body": "b"}\n', "field.jsonl:3: must be an object with"),
    "list.jsonl": (b"[1]\n", 'list.jsonl:1: must be an object with a field "text"'),
    "number.jsonl": (b'{"text": 7}\n', 'number.jsonl:1: "text" must be a string, not int'),
    "half.jsonl": (b'{"text": "\\ud800"}\n', 'half.jsonl:1: "text" has half of a surrogate pair'),
    "cut.txt.gz": (gzip.compress(b"abc" * 99)[:-9], "cut.txt.gz: damaged compressed file"),
    "not.txt.gz": (b"plain text", "not.txt.gz: damaged compressed file"),
    "not.txt.zst": (b"plain text", "not.txt.zst: damaged compressed file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = BAD[name]
    folder = tmp_path / "in"
    folder.mkdir()
    if content is not None:
        (folder / name).write_bytes(content)
    (folder / "good.txt").write_text("A good document.")
    given = [f"--input={folder / name}"]
    if name != "blank.txt":
        given.append(f"--input={folder / 'good.txt'}")
    assert main(["prepare", *given, f"--output={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1].startswith("longcat prepare: ")
    assert message in error and "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_what_is_there_is_not_overwritten(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    prepare([str(inputs)], output, vocab_size=290)  # empty: taken
    before = {path: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(DataError, match="out: exists and is not an empty directory"):
        prepare([str(inputs)], output, vocab_size=290)
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_options_out_of_range(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--validation=1\.5: must be in"):
        prepare([str(inputs)], tmp_path / "out", validation=1.5)
    same = tmp_path / "same.jsonl"
    same.write_bytes(json_lines(["alike"] * 4))
    with pytest.raises(DataError, match="all documents are alike; use --validation=0"):
        prepare([str(same)], tmp_path / "out")
    prepare([str(same)], tmp_path / "out", validation=0)


def test_killed_half_way_leaves_no_output(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    program = f"""
        import os, signal
        from pathlib import Path
        from longcat_jax.data import prepare, records
        write, left = records._SplitWriter.write, iter(range(40))
        def stop(self, tokens, num_bytes):
            if next(left) == 30:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, tokens, num_bytes)
        records._SplitWriter.write = stop
        prepare([{str(inputs)!r}], Path({str(output)!r}), vocab_size=290)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()
    prepare([str(inputs)], output, vocab_size=290)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"], "remains are cleared away"


def test_full_disk(inputs: Path, tmp_path: Path) -> None:
    program = """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        from longcat_jax.cli.main import main
        sys.exit(main(["prepare", "--input=in", "--output=out", "--vocab_size=290"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "arrayrecord: cannot be written" in done.stderr.strip().splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_large_vocabularies_are_stored_wide(tmp_path: Path) -> None:
    tokens = np.array([1, 70_000, 131_071, 2], np.int32)
    with records.staged(tmp_path / "out") as directory:
        records.write_documents(
            directory,
            [("train", tokens, 9)],
            tokenizer_sha256="",
            vocab_size=131_072,
            bos_token_id=1,
            eos_token_id=2,
            settings={},
        )
    np.testing.assert_array_equal(TokenDocuments(tmp_path / "out", "train")[0], tokens)
