"""Reads the golden checkpoints (released HuggingFace layout) into a parameter tree, for tests."""

import json
import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from longcat_jax.config import ModelConfig, RopeScaling

HERE = pathlib.Path(__file__).parent


def load_golden(name: str, dtype: str = "float32") -> tuple[ModelConfig, dict, dict]:
    """-> (config, parameters, expected arrays)."""
    raw = json.loads((HERE / name / "config.json").read_text())
    sizes = {key: raw[key] for key in ModelConfig.__dataclass_fields__ if key in raw}
    scaling = sizes.pop("rope_scaling", None) or raw.get("rope_scaling")
    config = ModelConfig(
        **{key: value for key, value in sizes.items() if key not in ("dtype", "rope_scaling")},
        moe_topk_real=raw["moe_topk"] * 0.5,
        rope_scaling=RopeScaling(**scaling) if scaling else None,
        dtype=dtype,
    )
    tensors = load_file(HERE / name / "model.safetensors")
    params = _tree(config, {key: np.asarray(v, dtype) for key, v in tensors.items()})
    return config, params, dict(np.load(HERE / name / "expected.npz"))


def _tree(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    def attention(prefix: str) -> dict[str, np.ndarray]:
        names = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        linears = {n: tensors[f"{prefix}.{n}.weight"].T for n in names}
        norms = ("q_a_layernorm", "kv_a_layernorm")
        return linears | {n: tensors[f"{prefix}.{n}.weight"] for n in norms}

    def ffn(prefix: str) -> dict[str, np.ndarray]:
        names = ("gate_proj", "up_proj", "down_proj")
        return {n: tensors[f"{prefix}.{n}.weight"].T for n in names}

    def layer(index: int) -> dict[str, Any]:
        p = f"model.layers.{index}"
        experts = [ffn(f"{p}.mlp.experts.{i}") for i in range(config.n_routed_experts)]
        out: dict[str, Any] = {
            "mlp": {
                "router": {
                    "classifier": tensors[f"{p}.mlp.router.classifier.weight"].T,
                    "e_score_correction_bias": tensors[f"{p}.mlp.router.e_score_correction_bias"],
                },
                "experts": {
                    "gate_up_proj": np.stack(
                        [np.concatenate([e["gate_proj"], e["up_proj"]], axis=1) for e in experts]
                    ),
                    "down_proj": np.stack([e["down_proj"] for e in experts]),
                },
            }
        }
        for i in (0, 1):
            out[f"self_attn_{i}"] = attention(f"{p}.self_attn.{i}")
            out[f"mlps_{i}"] = ffn(f"{p}.mlps.{i}")
            for norm in ("input_layernorm", "post_attention_layernorm"):
                out[f"{norm}_{i}"] = tensors[f"{p}.{norm}.{i}.weight"]
        return out

    import jax

    layers = [layer(index) for index in range(config.num_layers)]
    m = "model.mtp.layers.0"
    return {
        "embed_tokens": tensors["model.embed_tokens.weight"],
        "norm": tensors["model.norm.weight"],
        "lm_head": tensors["lm_head.weight"].T,
        "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
        "mtp": {
            "embed_tokens": tensors["model.mtp.embed_tokens.weight"],
            "norm": tensors["model.mtp.norm.weight"],
            "enorm": tensors[f"{m}.enorm.m.weight"],
            "hnorm": tensors[f"{m}.hnorm.m.weight"],
            "eh_proj": tensors[f"{m}.eh_proj.weight"].T,
            "input_layernorm": tensors[f"{m}.input_layernorm.weight"],
            "post_attention_layernorm": tensors[f"{m}.post_attention_layernorm.weight"],
            "self_attn": attention(f"{m}.self_attn"),
            "mlp": ffn(f"{m}.transformer_layer.mlp"),
        },
    }
