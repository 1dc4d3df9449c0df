"""The table of names: complete, one to one, of the shapes that the model has."""

import dataclasses

import jax
import pytest

from longcat_jax.config import ModelConfig
from longcat_jax.hf import layout
from longcat_jax.model.longcat import init
from longcat_jax.parameters import by_path, unbox
from tests.helpers import tiny_config
from tests.hf.variants import golden

FLASH = dict(
    vocab_size=131072,
    hidden_size=6144,
    num_layers=28,
    num_attention_heads=64,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    ffn_hidden_size=12288,
    expert_ffn_hidden_size=2048,
    n_routed_experts=512,
    zero_expert_num=256,
    moe_topk=12,
    moe_topk_real=8.0,
)


@pytest.mark.parametrize("mtp", [0, 1])
def test_the_table_has_exactly_the_parameters_of_the_model(mtp: int) -> None:
    config = dataclasses.replace(tiny_config().model, num_nextn_predict_layers=mtp, dtype="float32")
    boxed = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    own = {path: leaf.shape for path, leaf in by_path(unbox(boxed)).items()}
    assert layout.array_shapes(config) == own


def test_the_released_model_has_43739_tensors_and_17_of_mtp() -> None:
    config = ModelConfig(**FLASH)
    names = [tensor.name for tensor in layout.tensors(config)]
    assert len(names) == len(set(names)) == 43_739 + 17
    assert sum(name.startswith("model.mtp.") for name in names) == 17
    assert sum(1 for _ in layout.padding(config)) == 256 * 2 * 28


def test_names_and_shapes_are_those_of_the_golden_file() -> None:
    raw, tensors = golden("tiny")
    sizes = {key: raw[key] for key in FLASH if key in raw}
    config = ModelConfig(**sizes, moe_topk_real=2.0)
    expected = {tensor.name: tensor.shape for tensor in layout.tensors(config)}
    assert expected == {name: value.shape for name, value in tensors.items()}


def test_tensors_fill_every_array_once() -> None:
    config = tiny_config().model
    filled = dict.fromkeys(layout.array_shapes(config), 0)
    places = set()
    for tensor in layout.tensors(config):
        size = 1
        for dim in tensor.shape:
            size *= dim
        filled[tensor.rule.path] += size
        places.add((tensor.rule.path, tensor.index, tensor.offset))
    for path, shape in layout.array_shapes(config).items():
        size = 1
        for dim in shape:
            size *= dim
        assert filled[path] == size, path
    assert len(places) == sum(1 for _ in layout.tensors(config))
