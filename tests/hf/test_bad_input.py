"""Checkpoints that cannot be converted: one clear line, nothing left under the output's name."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longcat_jax.checkpoint import CheckpointError
from longcat_jax.hf import selection
from longcat_jax.hf.from_hf import check, from_hf
from longcat_jax.hf.safetensors import HFError
from longcat_jax.hf.selection import Selection
from longcat_jax.hf.to_hf import Target, to_hf
from tests.hf import variants
from tests.hf.variants import GOLDEN, copy_golden, golden, read_config, write_config

NORM = "model.layers.1.input_layernorm.0.weight"
EXPERT = "model.layers.2.mlp.experts.3.down_proj.weight"


def truncated(folder: Path) -> None:
    data = (copy_golden("tiny", folder) / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-7])


def truncated_in_header(folder: Path) -> None:
    data = (copy_golden("tiny", folder) / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:500])


def empty_file(folder: Path) -> None:
    (copy_golden("tiny", folder) / "model.safetensors").write_bytes(b"")


def not_safetensors(folder: Path) -> None:
    (copy_golden("tiny", folder) / "model.safetensors").write_bytes(b"no checkpoint at all")


def header_of_another_kind(folder: Path) -> None:
    text = b'{"a": [1, 2]}'
    blob = struct.pack("<Q", len(text)) + text
    (copy_golden("tiny", folder) / "model.safetensors").write_bytes(blob)


def sizes_that_contradict(folder: Path) -> None:
    text = b'{"a": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 56]}}'
    blob = struct.pack("<Q", len(text)) + text + bytes(56)
    (copy_golden("tiny", folder) / "model.safetensors").write_bytes(blob)


def header(**new: object) -> Callable[[Path], None]:
    """A file whose second tensor says something else of itself."""

    def make(folder: Path) -> None:
        first = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
        second = {"dtype": "F32", "shape": [2, 5], "data_offsets": [12, 52]} | new
        text = json.dumps({"a": first, "b": second}).encode()
        blob = struct.pack("<Q", len(text)) + text + bytes(52)
        (copy_golden("tiny", folder) / "model.safetensors").write_bytes(blob)

    return make


def unknown_dtype(folder: Path) -> None:
    change({NORM: np.zeros(48, np.int32)})(folder)


def missing_shard(folder: Path) -> None:
    variants.sharded(*golden("tiny"), folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def missing_shard_without_index(folder: Path) -> None:
    variants.sharded_without_index(*golden("tiny"), folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_that_lies(folder: Path) -> None:
    variants.sharded(*golden("tiny"), folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.norm"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))


def index_of_numbers(folder: Path) -> None:
    text = '{"weight_map": {"a": 3}}'
    (copy_golden("tiny", folder) / "model.safetensors.index.json").write_text(text)


def broken_index(folder: Path) -> None:
    variants.sharded(*golden("tiny"), folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def twice(folder: Path) -> None:
    variants.sharded_without_index(*golden("tiny"), folder)
    data = (folder / "model-00001-of-00002.safetensors").read_bytes()
    (folder / "model-00003-of-00002.safetensors").write_bytes(data)


def single_beside_shards(folder: Path) -> None:
    variants.sharded_without_index(*golden("tiny"), folder)
    data = (GOLDEN / "tiny" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data)


def change(new: dict[str, np.ndarray | None]) -> Callable[[Path], None]:
    """Tensors replaced, added, or (None) left out."""

    def make(folder: Path) -> None:
        raw, tensors = golden("tiny")
        kept = {name: value for name, value in (tensors | new).items() if value is not None}
        variants.plain(raw, kept, folder)

    return make


def configured(**new: object) -> Callable[[Path], None]:
    """config.json with other values."""

    def make(folder: Path) -> None:
        copy_golden("tiny", folder)
        write_config(folder, read_config(folder) | new)

    return make


def no_files(folder: Path) -> None:
    folder.mkdir()
    write_config(folder, golden("tiny")[0])


def no_config(folder: Path) -> None:
    (copy_golden("tiny", folder) / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (copy_golden("tiny", folder) / "config.json").write_text('{"hidden_size": 48,')


def config_is_a_list(folder: Path) -> None:
    (copy_golden("tiny", folder) / "config.json").write_text("[]")


def fp8_without_its_config(folder: Path) -> None:
    copy_golden("tiny_fp8", folder)
    raw = read_config(folder)
    del raw["quantization_config"]
    write_config(folder, raw)


def fp8_of_block(*sizes: object) -> Callable[[Path], None]:
    """config.json with another block than the files have."""

    def make(folder: Path) -> None:
        copy_golden("tiny_fp8", folder)
        raw = read_config(folder)
        raw["quantization_config"]["weight_block_size"] = list(sizes)
        write_config(folder, raw)

    return make


def fp8_without_a_scale(folder: Path) -> None:
    raw, tensors = variants.read_fp8("tiny_fp8")
    del tensors["model.layers.1.self_attn.1.o_proj.weight_scale_inv"]
    variants.write_fp8(folder, raw, tensors)


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "model.safetensors: truncated: 842845 bytes"),
    "truncated header": (truncated_in_header, "truncated inside its header"),
    "empty file": (empty_file, "not a safetensors file"),
    "not safetensors": (not_safetensors, "not a safetensors file"),
    "strange header": (header_of_another_kind, "unreadable header"),
    "sizes contradict": (sizes_that_contradict, "a: 56 bytes for a F32 of shape [3, 5]"),
    "overlap": (header(data_offsets=[8, 48]), "model.safetensors: b: its bytes do not follow"),
    "hole": (header(shape=[2, 4], data_offsets=[20, 52]), "b: its bytes do not follow"),
    "negative offsets": (header(data_offsets=[-40, 0]), "b: shape [2, 5], data_offsets [-40, 0]"),
    "three offsets": (header(data_offsets=[12, 52, 60]), "b: shape [2, 5], data_offsets [12, 52,"),
    "negative dims": (header(shape=[-2, -5]), "model.safetensors: b: shape [-2, -5]"),
    "dims of another type": (header(shape=[2, "x"]), "model.safetensors: b: shape [2, 'x']"),
    "float dims": (header(shape=[2.0, 5]), "model.safetensors: b: shape [2.0, 5]"),
    "unknown dtype": (unknown_dtype, f"{NORM}: dtype I32 is not supported"),
    "missing shard": (missing_shard, "names model-00002-of-00003.safetensors, which is not there"),
    "missing shard, no index": (missing_shard_without_index, "94 tensors missing"),
    "index lies": (index_that_lies, "holds model.layers.9.norm, which it doesn't"),
    "index of numbers": (index_of_numbers, "index.json: a: 3 is not the name of a file"),
    "broken index": (broken_index, "not an index (no weight_map)"),
    "tensor twice": (twice, ", and so does model-00001-of-00002.safetensors"),
    "single file beside shards": (
        single_beside_shards,
        "model.safetensors: holds lm_head.weight, and so does model-00001-of-00002.safetensors",
    ),
    "tensor missing": (change({EXPERT: None}), f"1 tensor missing ({EXPERT})"),
    "unknown tensor": (
        change({"model.layers.0.extra.weight": np.zeros(3, np.float32)}),
        "1 tensor unknown (model.layers.0.extra.weight)",
    ),
    "a layer too many": (
        change({"model.layers.3.input_layernorm.0.weight": np.zeros(48, np.float32)}),
        "unknown (model.layers.3.input_layernorm.0.weight)",
    ),
    "wrong shape": (
        change({EXPERT: np.zeros((22, 48), np.float32)}),
        f"wrong shape ({EXPERT} [22, 48], expected [48, 22])",
    ),
    "half an MTP head": (
        change({"model.mtp.norm.weight": None}),
        "1 tensor missing (model.mtp.norm.weight)",
    ),
    "config of another width": (configured(ffn_hidden_size=40), "21 tensors of the wrong shape"),
    "config of more layers": (configured(num_layers=4), "56 tensors missing"),
    "config of fewer experts": (configured(n_routed_experts=9), "tensors of the wrong shape"),
    "rope type": (configured(rope_scaling={"type": "linear", "factor": 2}), "rope type 'linear'"),
    "zero_expert_type": (configured(zero_expert_type="copy"), "zero_expert_type='copy'"),
    "quantised otherwise": (
        configured(quantization_config={"quant_method": "gptq"}),
        "quantization_config 'gptq' 'e4m3' is not implemented",
    ),
    "quantised by name": (
        configured(quantization_config="fp8"),
        "quantization_config='fp8': must be an object",
    ),
    "no files": (no_files, "holds no safetensors file"),
    "no folder": (lambda folder: None, "no such directory"),
    "no config": (no_config, "config.json: not there"),
    "broken config": (broken_config, "config.json: not valid JSON"),
    "config is a list": (config_is_a_list, "holds one list, not an object"),
    "fp8, no config": (fp8_without_its_config, "is fp8, and config.json has no quantization_"),
    "fp8, block of text": (fp8_of_block("128", "128"), "weight_block_size=['128', '128']: must"),
    "fp8, block of floats": (fp8_of_block(128.0, 128.0), "weight_block_size=[128.0, 128.0]: must"),
    "fp8, another block": (fp8_of_block(64, 128), "weight_scale_inv [2, 2], expected [3, 2]"),
    "fp8, no scale": (
        fp8_without_a_scale,
        "1 tensor missing (model.layers.1.self_attn.1.o_proj.weight_scale_inv)",
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_bad_checkpoints_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    damage, message = CASES[case]
    folder = tmp_path / "hf"
    damage(folder)
    with pytest.raises(HFError, match=re.escape(message)) as found:
        from_hf(folder, tmp_path / "out")
    assert "\n" not in str(found.value)
    with pytest.raises(HFError, match=re.escape(message)):
        check(folder)
    assert {path.name for path in tmp_path.iterdir()} <= {"hf"}


def test_an_output_in_the_way_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(HFError, match="exists already"):
        from_hf(GOLDEN / "tiny", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("a file")
    with pytest.raises(HFError, match="exists already"):
        from_hf(GOLDEN / "tiny", tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


@pytest.mark.parametrize(
    "name", ["notes.txt", "result/thesis.txt", "lock", "plan.json", "plan.json.new", "journal-0"]
)
def test_somebody_elses_folder_of_the_staging_name_is_left_alone(name: str, tmp_path: Path) -> None:
    path = tmp_path / "out.partial" / name
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(HFError, match="out.partial: in the way"):
        from_hf(GOLDEN / "tiny", tmp_path / "out")
    assert path.read_text() == "{"


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_is_followed(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    from_hf(GOLDEN / "tiny", tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_a_disk_that_is_too_small_is_told_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("longcat_jax.hf.staging.shutil.disk_usage", lambda path: usage)
    with pytest.raises(HFError, match="needs 0.0 GB, 0.0 GB are free"):
        from_hf(GOLDEN / "tiny", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers=0-2", "write layers=0:2"),
        ("layers=2:2", "write layers=0:2"),
        ("heads=0:2", "write layers=0:2"),
        ("layers=0:1,layers=1:2", "write layers=0:2"),
    ],
)
def test_slices_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(HFError, match=message):
        selection.parse(text)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (Selection(layers=(0, 4)), "layers=0:4 of a model with 3"),
        (Selection(experts=(3, 11)), "experts=3:11 of a model with 10"),
    ],
)
def test_slices_beyond_the_model(chosen: Selection, message: str, tmp_path: Path) -> None:
    with pytest.raises(HFError, match=message):
        from_hf(GOLDEN / "tiny", tmp_path / "out", selection=chosen)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"layout": "hf"}, "one of release, transformers"), ({"shard_bytes": 0}, "must be > 0")],
)
def test_targets_that_do_not_exist(settings: dict, message: str) -> None:
    with pytest.raises(HFError, match=message):
        Target(**settings)


def test_export_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoints here"):
        to_hf(GOLDEN / "tiny", tmp_path / "out")
    from_hf(GOLDEN / "tiny", tmp_path / "ours")
    (tmp_path / "ours" / "checkpoints" / "0" / "params" / "norm" / ".zarray").unlink()
    with pytest.raises(HFError, match="norm cannot be opened") as found:
        to_hf(tmp_path / "ours", tmp_path / "out")
    assert "\n" not in str(found.value)
    metadata = tmp_path / "ours" / "checkpoints" / "0" / "params" / "_METADATA"
    metadata.write_text("[1]")
    with pytest.raises(HFError, match="not an Orbax item"):
        to_hf(tmp_path / "ours", tmp_path / "out")
    metadata.unlink()
    with pytest.raises(HFError, match="not an Orbax item"):
        to_hf(tmp_path / "ours", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_export_of_a_lost_chunk_is_refused(damage: str, tmp_path: Path) -> None:
    """It would read as zeros."""
    from_hf(GOLDEN / "tiny", tmp_path / "ours")
    chunk = tmp_path / "ours/checkpoints/0/params/layers.mlp.experts.down_proj/2.3.0.0"
    data = chunk.read_bytes()
    chunk.unlink()
    if damage == "truncated":
        chunk.write_bytes(data[:-5])
    with pytest.raises(HFError, match=f"down_proj/: {EXPERT} cannot be read") as found:
        to_hf(tmp_path / "ours", tmp_path / "out")
    assert "\n" not in str(found.value) and not (tmp_path / "out").exists()
