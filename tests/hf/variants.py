"""The same small checkpoint as different people publish it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from longcat_jax.hf import safetensors

GOLDEN = Path(__file__).parents[1] / "golden"
BF16 = np.dtype(ml_dtypes.bfloat16)
Tensors = dict[str, np.ndarray]


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of a folder, read by the safetensors library."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def write_fp8(folder: Path, raw: dict, tensors: Tensors) -> Path:
    """Our own writer: the safetensors library's numpy side has no fp8."""
    folder.mkdir()
    write_config(folder, raw)
    kinds = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    for name, entry in safetensors.create(folder / "model.safetensors", kinds).items():
        entry.write(0, tensors[name])
    return folder


def read_fp8(name: str) -> tuple[dict, Tensors]:
    """As `golden`, by our own reader."""
    entries = safetensors.open_checkpoint(GOLDEN / name)
    return read_config(GOLDEN / name), {n: entry.read() for n, entry in entries.items()}


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def write_config(folder: Path, raw: dict) -> None:
    (folder / "config.json").write_text(json.dumps(raw))


def write(folder: Path, raw: dict, tensors: Tensors, *, shards: int = 1) -> Path:
    """A checkpoint folder of `shards` files, by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, raw)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def kept_in_float32(name: str) -> bool:
    return ".router." in name


def rounded(tensors: Tensors, dtype: np.dtype) -> Tensors:
    """As published in 16 bits: the router stays in float32."""
    return {n: v if kept_in_float32(n) else v.astype(dtype) for n, v in tensors.items()}


def plain(raw: dict, tensors: Tensors, folder: Path) -> Path:
    return write(folder, raw, tensors)


def sharded(raw: dict, tensors: Tensors, folder: Path) -> Path:
    return write(folder, raw, tensors, shards=3)


def sharded_without_index(raw: dict, tensors: Tensors, folder: Path) -> Path:
    write(folder, raw, tensors, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    return folder


def padded(raw: dict, tensors: Tensors, folder: Path) -> Path:
    """As transformers >= 5 saves it: with gate and up of identity experts (here: noise)."""
    rng, extra = np.random.default_rng(0), {}
    for layer in range(raw["num_layers"]):
        for expert in range(raw["n_routed_experts"], raw["n_routed_experts"] + 5):
            for name in ("gate_proj", "up_proj"):
                key = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                extra[key] = rng.standard_normal((22, 48), np.float32)
    return write(folder, raw, tensors | extra)


def transformers_dialect(raw: dict) -> dict:
    """config.json as transformers >= 5 writes it: rope in a section, Meituan's keys dropped."""
    dropped = ("zero_expert_type", "mla_scale_q_lora", "mla_scale_kv_lora", "router_bias")
    dropped += ("attention_method", "rope_theta", "rope_scaling")
    rope = {"rope_theta": raw["rope_theta"], "rope_type": "default"}
    scaling = dict(raw.get("rope_scaling") or {})
    if scaling:
        rope |= {"rope_type": scaling.pop("type"), **scaling}
    kept = {key: value for key, value in raw.items() if key not in dropped}
    layers = raw["num_layers"]
    return kept | {
        "model_type": "longcat_flash",
        "rope_parameters": rope,
        "num_hidden_layers": 2 * layers,
        "head_dim": raw["qk_rope_head_dim"],
        "transformers_version": "5.17.0",
    }


def without_mtp(raw: dict, tensors: Tensors, folder: Path) -> Path:
    return write(folder, raw, {n: v for n, v in tensors.items() if ".mtp." not in n})


VARIANTS: dict[str, Callable[[dict, Tensors, Path], Path]] = {
    "plain": plain,
    "sharded": sharded,
    "sharded_without_index": sharded_without_index,
    "padded": padded,
    "without_mtp": without_mtp,
}


def golden(name: str) -> tuple[dict, Tensors]:
    """config.json and tensors."""
    return read_config(GOLDEN / name), read_tensors(GOLDEN / name)


def copy_golden(name: str, folder: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(GOLDEN / name, folder)
    return folder


def same_bits(a: Tensors, b: Tensors) -> None:
    """Asserts equal names, dtypes, shapes and bytes."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name
