"""config.json of a HuggingFace checkpoint, in either dialect, to `ModelConfig` and back.

The released files and transformers >= 5 differ: `rope_theta` at the top or in `rope_parameters`,
`model_type` absent, keys that only vLLM and SGLang read. What our model doesn't do is refused here,
never dropped. Two keys are ours alone and ignored by other readers: `moe_topk_real`, and
`num_nextn_predict_layers`, which says what the files themselves show.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longcat_jax.config import ConfigError, ModelConfig, RopeScaling
from longcat_jax.dataclass_mapping import build
from longcat_jax.hf.safetensors import HFError

CONFIG = "config.json"
MLA_NORM_EPS = 1e-6
"""What every HuggingFace reader of this architecture uses for the two latent norms."""

FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": (None, "longcat_flash"),
    "attention_bias": (None, False),
    "attention_method": (None, "MLA"),
    "hidden_act": (None, "silu"),
    "mla_scale_kv_lora": (None, True),
    "mla_scale_q_lora": (None, True),
    "nextn_use_scmoe": (None, False),
    "norm_topk_prob": (None, False),
    "router_bias": (None, False),
    "tie_word_embeddings": (None, False),
    "zero_expert_type": (None, "identity"),
}
"""Keys with the only values that our model implements; None: absent or null."""
NOT_OURS = ("emb_neighbor_num", "emb_split_num", "ngram_vocab_size_ratio")
"""N-gram embeddings of LongCat-Flash-Lite."""
OPTIONAL = ("routed_scaling_factor", "rms_norm_eps", "max_position_embeddings")
OPTIONAL += ("initializer_range", "bos_token_id", "eos_token_id")
SCALING = {field.name for field in dataclasses.fields(RopeScaling)}


def read_raw(directory: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
      HFError: absent, or not a JSON object.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise HFError(f"{path}: not there")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HFError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise HFError(f"{path}: holds one {type(raw).__name__}, not an object")
    return raw


def parse(raw: Mapping[str, Any], *, dtype: str, mtp: bool) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      raw: the parsed file.
      dtype: of the tensors, as far as they follow the model's.
      mtp: whether the files hold an MTP head.

    Raises:
      HFError: not this architecture, something that is not implemented, or a missing key.
    """
    for key, allowed in FIXED.items():
        if raw.get(key) not in allowed:
            wanted = " or ".join(repr(value) for value in allowed if value is not None)
            raise HFError(f"{CONFIG}: {key}={raw[key]!r} is not implemented; only {wanted}")
    for key in NOT_OURS:
        if raw.get(key):
            raise HFError(f"{CONFIG}: {key}={raw[key]!r}: n-gram embeddings are not implemented")
    _check_derived(raw)
    theta, scaling = _rope(raw)
    fields = dataclasses.fields(ModelConfig)
    required = [f.name for f in fields if f.default is dataclasses.MISSING]
    required.remove("moe_topk_real")
    absent = [name for name in required if raw.get(name) is None]
    if absent:
        raise HFError(f"{CONFIG}: {absent[0]} is missing")
    values = {name: raw[name] for name in required}
    values |= {name: raw[name] for name in OPTIONAL if raw.get(name) is not None}
    if isinstance(values.get("eos_token_id"), list) and values["eos_token_id"]:
        values["eos_token_id"] = values["eos_token_id"][0]
    try:
        return build(
            ModelConfig,
            {
                **values,
                "moe_topk_real": raw.get("moe_topk_real") or _topk_real(raw),
                "rope_theta": theta,
                "rope_scaling": scaling,
                "num_nextn_predict_layers": int(mtp),
                "dtype": dtype,
            },
        )
    except ConfigError as error:
        raise HFError(f"{CONFIG}: {error}") from error


def _topk_real(raw: Mapping[str, Any]) -> float:
    """K_e where the file doesn't say: selections spread evenly over all N + Z (released: 8)."""
    try:
        real, zero = raw["n_routed_experts"], raw["zero_expert_num"]
        return min(raw["moe_topk"] * real / (real + zero), real)
    except (TypeError, ZeroDivisionError):
        raise HFError(f"{CONFIG}: moe_topk, n_routed_experts: must be positive integers") from None


def _check_derived(raw: Mapping[str, Any]) -> None:
    """Keys that repeat others must agree with them."""

    def total(*names: str) -> Any:
        values = [raw.get(name) for name in names]
        return sum(values) if all(isinstance(value, int) for value in values) else None

    layers = total("num_layers")
    expected = {
        "num_key_value_heads": (total("num_attention_heads"),),
        "qk_head_dim": (total("qk_nope_head_dim", "qk_rope_head_dim"),),
        # transformers counts attentions, two a layer.
        "num_hidden_layers": (layers, layers and 2 * layers),
    }
    for key, allowed in expected.items():
        if raw.get(key) is not None and None not in allowed and raw[key] not in allowed:
            raise HFError(f"{CONFIG}: {key}={raw[key]!r} contradicts the other sizes: {allowed[0]}")


def _rope(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Theta and YaRN, from the top level, `rope_scaling` or `rope_parameters`."""
    sections = [raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key)]
    if not all(isinstance(section, dict) for section in sections):
        raise HFError(f"{CONFIG}: rope_parameters, rope_scaling: must be objects")
    found = [s["rope_theta"] for s in (raw, *sections) if s.get("rope_theta") is not None]
    for theta in found:
        if type(theta) not in (int, float):
            raise HFError(f"{CONFIG}: rope_theta={theta!r}: must be a number")
    thetas = set(found)
    if len(thetas) != 1:
        problem = "is missing" if not thetas else f"has two values: {sorted(thetas)}"
        raise HFError(f"{CONFIG}: rope_theta {problem}")
    scalings = [scaling for scaling in map(_scaling, sections) if scaling is not None]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise HFError(f"{CONFIG}: rope_parameters and rope_scaling contradict one another")
    return float(thetas.pop()), scalings[0] if scalings else None


def _scaling(section: Mapping[str, Any]) -> dict[str, Any] | None:
    values = {key: value for key, value in section.items() if value is not None}
    kinds = {str(values.pop(key)) for key in ("type", "rope_type") if key in values}
    values.pop("rope_theta", None)
    if kinds <= {"default"}:
        if values:
            key, value = next(iter(values.items()))
            raise HFError(f"{CONFIG}: rope {key}={value!r} without a scaling type")
        return None
    if kinds != {"yarn"}:
        name = " and ".join(map(repr, sorted(kinds - {"yarn"})))
        raise HFError(f"{CONFIG}: rope type {name} is not implemented; only 'default' and 'yarn'")
    if values.pop("truncate", True) is not True:
        raise HFError(f"{CONFIG}: rope truncate=false is not implemented")
    unknown = sorted(values.keys() - SCALING)
    if unknown:
        raise HFError(f"{CONFIG}: rope {unknown[0]}={values[unknown[0]]!r} is not implemented")
    if "original_max_position_embeddings" not in values:
        raise HFError(f"{CONFIG}: rope original_max_position_embeddings is missing")
    return {**values, "type": "yarn"}


def to_raw(model: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """config.json with every key that transformers, vLLM or SGLang reads.

    Raises:
      HFError: something that no HuggingFace reader can be told.
    """
    c = model
    if not math.isclose(c.mla_norm_eps, MLA_NORM_EPS, rel_tol=1e-6):
        raise HFError(
            f"model.mla_norm_eps={c.mla_norm_eps}: HuggingFace readers take {MLA_NORM_EPS} "
            "whatever config.json says"
        )
    scaling = None if c.rope_scaling is None else dataclasses.asdict(c.rope_scaling)
    if scaling is not None:
        scaling = {key: value for key, value in scaling.items() if value != 0}
    same = [f.name for f in dataclasses.fields(c)]
    for name in ("mla_norm_eps", "rope_scaling", "dtype"):
        same.remove(name)
    kind = (scaling or {}).get("type", "default")
    rest = {key: value for key, value in (scaling or {}).items() if key != "type"}
    return {
        "architectures": ["LongcatFlashForCausalLM"],
        "model_type": "longcat_flash",
        **{name: getattr(c, name) for name in same},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_method": "MLA",
        "dtype": dtype,
        "head_dim": c.qk_rope_head_dim,
        "hidden_act": "silu",
        "mla_scale_kv_lora": True,
        "mla_scale_q_lora": True,
        "norm_topk_prob": False,
        "num_key_value_heads": c.num_attention_heads,
        "qk_head_dim": c.qk_head_dim,
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": kind, **rest},
        "rope_scaling": scaling and {**scaling, "rope_type": kind},
        "rounter_params_dtype": "float32",  # SGLang's spelling
        "router_bias": False,
        "router_dtype": "float32",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "zero_expert_type": "identity",
    }
