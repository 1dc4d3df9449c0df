"""config.json in both dialects, what is refused, and back."""

import dataclasses
import re
from typing import Any

import pytest

from longcat_jax.config import ModelConfig, RopeScaling
from longcat_jax.hf.config import parse, to_raw
from longcat_jax.hf.safetensors import HFError
from tests.helpers import tiny_config
from tests.hf.variants import golden, transformers_dialect


def model_of(raw: dict[str, Any]) -> ModelConfig:
    return parse(raw, dtype="float32", mtp=True)


@pytest.mark.parametrize("name", ["tiny", "tiny_yarn"])
def test_both_dialects_say_the_same(name: str) -> None:
    raw, _ = golden(name)
    config = model_of(raw)
    assert "model_type" not in raw and model_of(transformers_dialect(raw)) == config
    assert config.rope_theta == raw["rope_theta"]
    assert (config.rope_scaling is not None) == (name == "tiny_yarn")
    assert config.eos_token_id == 2 and config.routed_scaling_factor == 2.5


def test_budget_of_real_experts_is_read_or_follows_from_the_sizes() -> None:
    raw, _ = golden("tiny")
    assert model_of(raw).moe_topk_real == pytest.approx(4 * 10 / 15)
    assert model_of({**raw, "moe_topk_real": 3.25}).moe_topk_real == 3.25
    released = {**raw, "moe_topk": 12, "n_routed_experts": 512, "zero_expert_num": 256}
    assert model_of(released).moe_topk_real == 8


@pytest.mark.parametrize(
    "scaling",
    [None, RopeScaling(4.0, 16), RopeScaling(10.0, 64, mscale=0.7, mscale_all_dim=0.9)],
)
def test_a_config_survives_the_way_out_and_back(scaling: RopeScaling | None) -> None:
    model = dataclasses.replace(tiny_config().model, rope_scaling=scaling, dtype="bfloat16")
    raw = to_raw(model, dtype="bfloat16")
    assert parse(raw, dtype="bfloat16", mtp=True) == model
    # Either half alone is enough: vLLM reads the top level, transformers the section.
    for section in ("rope_theta", "rope_parameters"):
        less = {key: value for key, value in raw.items() if key != section}
        assert parse(less, dtype="bfloat16", mtp=True) == model


def test_export_writes_what_vllm_and_sglang_read() -> None:
    raw = to_raw(tiny_config().model, dtype="float32")
    wanted = dict(
        model_type="longcat_flash",
        zero_expert_type="identity",
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        router_dtype="float32",
        norm_topk_prob=False,
        attention_method="MLA",
        rope_theta=10000.0,
        num_key_value_heads=3,
        qk_head_dim=11,
    )
    assert {key: raw.get(key) for key in wanted} == wanted
    assert raw["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}


def test_latent_norms_of_another_epsilon_cannot_be_told() -> None:
    model = dataclasses.replace(tiny_config().model, mla_norm_eps=1e-5)
    with pytest.raises(HFError, match="mla_norm_eps=1e-05"):
        to_raw(model, dtype="float32")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"router_bias": True}, "router_bias=True is not implemented; only False"),
    ({"zero_expert_type": "copy"}, "zero_expert_type='copy' is not implemented; only 'identity'"),
    ({"zero_expert_type": "drop"}, "zero_expert_type='drop'"),
    ({"mla_scale_q_lora": False}, "mla_scale_q_lora=False is not implemented; only True"),
    ({"mla_scale_kv_lora": False}, "mla_scale_kv_lora=False"),
    ({"norm_topk_prob": True}, "norm_topk_prob=True"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"attention_method": "GQA"}, "attention_method='GQA'"),
    ({"model_type": "longcat_flash_ngram"}, "model_type='longcat_flash_ngram'"),
    ({"emb_neighbor_num": 4}, "n-gram embeddings"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
    ({"rope_scaling": {"rope_type": "deepseek_yarn", "factor": 2.0}}, "'deepseek_yarn'"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings is"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 0.5}},
        "rope attention_factor=0.5 is not implemented",
    ),
    (
        {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16}},
        "rope factor=4.0 without a scaling type",
    ),
    (
        {"rope_parameters": {"rope_theta": 1e7, "rope_type": "default", "factor": 4.0}},
        "rope factor=4.0 without a scaling type",
    ),
    ({"rope_scaling": {"type": ["yarn"], "factor": 2.0}}, "is not implemented; only 'default'"),
    ({"rope_theta": None}, "rope_theta is missing"),
    ({"rope_theta": [1e7]}, "rope_theta=[10000000.0]: must be a number"),
    ({"rope_theta": "abc"}, "rope_theta='abc': must be a number"),
    ({"eos_token_id": []}, "eos_token_id=[]: must be of type int"),
    ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta has two values"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "48"}, "hidden_size='48': must be of type int"),
    ({"num_key_value_heads": 1}, "num_key_value_heads=1 contradicts the other sizes: 3"),
    ({"num_hidden_layers": 5}, "num_hidden_layers=5 contradicts"),
    ({"moe_topk": 99}, "moe_topk"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_implemented_is_refused_in_one_line(
    change: dict[str, Any], message: str
) -> None:
    raw, _ = golden("tiny")
    with pytest.raises(HFError, match=re.escape(message)) as found:
        model_of({**raw, **change})
    assert "\n" not in str(found.value)
