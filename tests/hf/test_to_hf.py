"""Exported checkpoints: the same bits that came in, in every layout."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import longcat_jax as lc
from longcat_jax.checkpoint import Checkpoints
from longcat_jax.config import TrainConfig, to_mapping
from longcat_jax.hf.from_hf import from_hf
from longcat_jax.hf.selection import Selection
from longcat_jax.hf.to_hf import Target, check, to_hf
from tests.helpers import random_params, tiny_config
from tests.hf import variants
from tests.hf.variants import BF16, GOLDEN, golden, read_config, read_tensors, same_bits


def there_and_back(source: Path, tmp_path: Path, target: Target | None = None) -> Path:
    from_hf(source, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back", target=target)
    return tmp_path / "back"


@pytest.mark.parametrize("variant", ["plain", "without_mtp"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_in_and_out_again_is_bit_identical(dtype: str, variant: str, tmp_path: Path) -> None:
    raw, tensors = golden("tiny")
    kind = BF16 if dtype == "bfloat16" else np.dtype(dtype)
    source = variants.VARIANTS[variant](raw, variants.rounded(tensors, kind), tmp_path / "hf")
    back = there_and_back(source, tmp_path)
    same_bits(read_tensors(source), read_tensors(back))
    assert read_config(back)["dtype"] == dtype
    assert read_config(back)["num_nextn_predict_layers"] == (variant == "plain")


def test_unusual_bits_survive(tmp_path: Path) -> None:
    """NaNs with a payload, negative zeros, subnormal numbers."""
    raw, tensors = golden("tiny")
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.integers(0, 256, value.nbytes, np.uint8).view(np.float32).reshape(value.shape)
        for name, value in tensors.items()
    }
    source = variants.plain(raw, tensors, tmp_path / "hf")
    same_bits(tensors, read_tensors(there_and_back(source, tmp_path)))


def test_transformers_layout_in_shards_and_back_is_bit_identical(tmp_path: Path) -> None:
    raw, tensors = golden("tiny_yarn")
    target = Target("transformers", shard_bytes=100_000)
    padded = there_and_back(GOLDEN / "tiny_yarn", tmp_path, target)
    files = sorted(padded.glob("*.safetensors"))
    assert len(files) > 5 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 100_000 + 20_000 for path in files)  # its header not counted
    found = read_tensors(padded)
    index = json.loads((padded / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    extra = {name: found[name] for name in found.keys() - tensors.keys()}
    assert len(extra) == 3 * 5 * 2
    assert all(v.shape == (22, 48) and not v.any() for v in extra.values())
    assert "model.layers.2.mlp.experts.14.up_proj.weight" in extra
    from_hf(padded, tmp_path / "again")
    to_hf(tmp_path / "again", tmp_path / "last")
    same_bits(tensors, read_tensors(tmp_path / "last"))
    again, first = (lc.load(tmp_path / name).config for name in ("again", "ours"))
    assert again == first


def test_dtype_option_rounds_all_but_the_router(tmp_path: Path) -> None:
    back = there_and_back(GOLDEN / "tiny", tmp_path, Target(dtype="bfloat16"))
    same_bits(variants.rounded(golden("tiny")[1], BF16), read_tensors(back))
    assert read_config(back)["torch_dtype"] == "bfloat16"


def test_slices_of_a_slice_are_slices_of_the_whole(tmp_path: Path) -> None:
    from_hf(GOLDEN / "tiny", tmp_path / "whole")
    from_hf(GOLDEN / "tiny", tmp_path / "part", selection=Selection((1, 3), (2, 8)))
    to_hf(tmp_path / "whole", tmp_path / "a", selection=Selection((2, 3), (4, 7)))
    to_hf(tmp_path / "part", tmp_path / "b", selection=Selection((1, 2), (2, 5)))
    same_bits(read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b"))
    tensors, whole = read_tensors(tmp_path / "a"), golden("tiny")[1]
    np.testing.assert_array_equal(
        tensors["model.layers.0.mlp.experts.1.gate_proj.weight"],
        whole["model.layers.2.mlp.experts.5.gate_proj.weight"],
    )
    np.testing.assert_array_equal(
        tensors["model.layers.0.mlp.router.e_score_correction_bias"],
        whole["model.layers.2.mlp.router.e_score_correction_bias"][[4, 5, 6, 10, 11, 12, 13, 14]],
    )


@pytest.mark.parametrize("large", [False, True])
def test_what_training_saved_goes_out_and_comes_back(
    large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax' own files: compressed, in one OCDBT store, cut into chunks of another kind."""
    if large:  # chunks beyond what is moved at once
        monkeypatch.setattr("longcat_jax.hf.store.PIECE", 1000)
    config = tiny_config(model={"dtype": "float32"}, train={"checkpoint_every": 5})
    params = jax.tree.map(jax.numpy.asarray, random_params(config))
    checkpoints = Checkpoints(tmp_path / "run", TrainConfig(1, 4, 8))
    saved = dict(params=params, optimizer={"step": np.int32(0)}, data={}, metrics=None)
    checkpoints.save(3, config=to_mapping(config), **saved)
    checkpoints.close()
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    to_hf(tmp_path / "run", tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "back")
    model = lc.load(tmp_path / "back")
    assert model.config == config.model
    assert model.tokenizer is not None
    jax.tree.map(np.testing.assert_array_equal, model.params, params)


def test_check_says_what_would_be_written(tmp_path: Path) -> None:
    from_hf(GOLDEN / "tiny", tmp_path / "ours")
    text = check(
        tmp_path / "ours", target=Target(shard_bytes=100_000), selection=Selection(layers=(0, 2))
    )
    assert "48 arrays fit the model; 132 tensors" in text and "mostly float32" in text
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
