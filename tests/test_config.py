"""Configuration: every check speaks in one line; what is written is read back."""

import dataclasses
from pathlib import Path

import pytest

from longcat_jax.cli.config_file import load_config
from longcat_jax.config import (
    ConfigError,
    ProxyConfig,
    differences,
    from_mapping,
    override,
    to_mapping,
)
from tests.helpers import tiny_config

CONFIGS = sorted(Path("configs").glob("*.py"))
YARN = "model.rope_scaling={'factor': %s, 'original_max_position_embeddings': %s, %s}"


def _stages(*starts):
    stages = [{"from_step": start, "weights": {"python": 1.0}} for start in starts]
    return f"data.stages={stages}"


# Assignments -> what the message must hold: field and value, then what is allowed.
WRONG = {
    "model.hidden_size=0": ("model.hidden_size=0", "> 0"),
    "model.num_layers=-1": ("model.num_layers=-1", "> 0"),
    "model.zero_expert_num=-2": ("model.zero_expert_num=-2", ">= 0"),
    "model.eos_token_id=-1": ("model.eos_token_id=-1", ">= 0"),
    "model.rms_norm_eps=0": ("model.rms_norm_eps=0.0", "> 0"),
    "model.mla_norm_eps=0": ("model.mla_norm_eps=0.0", "> 0"),
    "model.routed_scaling_factor=0": ("model.routed_scaling_factor=0.0", "> 0"),
    "model.rope_theta=-1.5": ("model.rope_theta=-1.5", "> 0"),
    "model.initializer_range=0": ("model.initializer_range=0.0", "> 0"),
    "model.initializer_range=1e999": ("model.initializer_range=inf", "finite"),
    "model.qk_rope_head_dim=7": ("model.qk_rope_head_dim=7", "even"),
    "model.moe_topk=18": ("model.moe_topk=18", "n_routed_experts + zero_expert_num = 17"),
    "model.moe_topk_real=4.5": ("model.moe_topk_real=4.5", "at most", "= 4"),
    "model.moe_topk_real=0": ("model.moe_topk_real=0.0", "above 0"),
    "model.zero_expert_num=0": ("model.moe_topk_real=2.5", "moe_topk - zero_expert_num = 4"),
    "model.zero_expert_num=1": ("model.moe_topk_real=2.5", "at least", "= 3"),
    "model.bos_token_id=44": ("model.bos_token_id=44", "< vocab_size = 44"),
    "model.num_nextn_predict_layers=2": ("model.num_nextn_predict_layers=2", "0 or 1"),
    "model.dtype=int8": ("model.dtype='int8'", "bfloat16, float16, float32, float64"),
    "model.max_position_embeddings=11": (
        "train.sequence_length=12",
        "model.max_position_embeddings=11",
    ),
    YARN % (0.5, 16, ""): ("model.rope_scaling.factor=0.5", ">= 1"),
    YARN % (4.0, 0, ""): ("original_max_position_embeddings=0", "> 0"),
    YARN % (4.0, 16, "'type': 'linear'"): ("model.rope_scaling.type='linear'", "'yarn'"),
    YARN % (4.0, 16, "'beta_slow': 0.0"): ("model.rope_scaling.beta_slow=0.0", "> 0"),
    YARN % (4.0, 16, "'beta_fast': 1.0"): ("model.rope_scaling.beta_fast=1.0", "> beta_slow"),
    YARN % (4.0, 16, "'mscale': -1.0"): ("model.rope_scaling.mscale=-1.0", ">= 0"),
    "model.rope_scaling={'factor': 2.0}": ("original_max_position_embeddings", "missing"),
    "proxy.hidden_size=-3": ("proxy.hidden_size=-3", ">= 0"),
    "proxy.q_lora_rank=4": ("proxy.hidden_size=0", "another proxy width"),
    "mesh.data=0": ("mesh.data=0", "> 0"),
    "mesh.pipeline=2": ("mesh.pipeline=2", "not built yet"),
    "mesh.context=4": ("train.sequence_length=12", "divisible by 2 * mesh.context = 8"),
    "mesh.data=5": ("train.global_batch=16", "divisible by", "= 5"),
    "mesh.expert=3": (
        "model.hidden_size",
        "model.q_lora_rank",
        "model.kv_lora_rank",
        "model.vocab_size",
        "= 3",
    ),
    "parallel.expert_backend=ring": ("expert_backend='ring'", "auto, dense, allgather, all_to_all"),
    "kernels=fast": ("kernels='fast'", "one of auto, reference"),
    "parallel.token_chunks=0": ("parallel.token_chunks=0", "> 0"),
    "parallel.token_chunks=5": ("parallel.token_chunks=5", "a divisor of the 192 tokens"),
    "parallel.capacity_factor=0": ("parallel.capacity_factor=0.0", "> 0"),
    "parallel.capacity_factor=1e999": ("parallel.capacity_factor=inf", "finite"),
    "parallel.dropless=1": ("parallel.dropless=1", "of type bool"),
    "train.steps=0": ("train.steps=0", "> 0"),
    "train.accumulate=5": ("train.global_batch=16", "divisible by train.accumulate=5"),
    "train.eval_batches=-1": ("train.eval_batches=-1", ">= 0"),
    "train.vocab_chunk=0": ("train.vocab_chunk=0", "> 0"),
    "train.sequence_length=2": ("train.sequence_length=2", ">= 3"),
    "train.remat=some": ("train.remat='some'", "none, ample, selective, full"),
    "train.unroll=0": ("train.unroll=0", "> 0"),
    "train.max_loss_rise=0": ("train.max_loss_rise=0.0", "> 0"),
    "optim.learning_rate=0": ("optim.learning_rate=0.0", "> 0"),
    "optim.eps=0": ("optim.eps=0.0", "> 0"),
    "optim.clip_norm=0": ("optim.clip_norm=0.0", "> 0"),
    "optim.warmup_steps=-1": ("optim.warmup_steps=-1", ">= 0"),
    "optim.mtp_weight=-0.1": ("optim.mtp_weight=-0.1", ">= 0"),
    "optim.schedule=linear": ("optim.schedule='linear'", "wsd, cosine"),
    "optim.beta1=1": ("optim.beta1=1.0", "in [0, 1)"),
    "optim.beta2=-0.1": ("optim.beta2=-0.1", "in [0, 1)"),
    "optim.balance.alpha=-1": ("optim.balance.alpha=-1.0", ">= 0"),
    "optim.balance.groups=0": ("optim.balance.groups=0", "> 0"),
    "optim.balance.groups=3": ("optim.balance.groups=3", "divisor of model.n_routed_experts=8"),
    "optim.pid.mu=-1": ("optim.pid.mu=-1.0", ">= 0"),
    "optim.pid.every=0": ("optim.pid.every=0", "> 0"),
    _stages(-1): ("data.stages.from_step=-1", ">= 0"),
    _stages(0, 0): ("data.stages.from_step=[0, 0]", "rising, the first 0"),
    _stages(5): ("data.stages.from_step=[5]", "rising, the first 0"),
    "data.stages=[{'from_step': 0, 'weights': {'python': -1.0}}]": ("weights=", "at least one > 0"),
    "data.stages=[{'from_step': 0, 'weights': {'pyton': 1.0}}]": ("did you mean 'python'",),
    "data.sources={}": ("data.sources={}", "at least one"),
    "data.corpus_mb=0": ("data.corpus_mb=0.0", "> 0"),
    "data.prefetch=-1": ("data.prefetch=-1", ">= 0"),
    "seed=-1": ("seed=-1", "from 0"),
    "seed=4294967296": ("seed=4294967296", "2**32 - 1"),
    # Names and types.
    "model.hiden_size=3": ("model.hiden_size", "did you mean 'hidden_size'"),
    "optim.pid.kq=3": ("optim.pid.kq", "known: every, kd, kp, mu, mu_final"),
    "modle.hidden_size=3": ("modle.hidden_size", "did you mean 'model'"),
    "zzz=3": ("zzz: unknown name", "known: data, deterministic, init_from, kernels, mesh"),
    "seed.low=3": ("seed is 0 and has no fields",),
    "train.steps=5.0": ("train.steps=5.0", "type int, not float"),
    "train.steps=True": ("train.steps=True", "type int, not bool"),
    "train.steps": ("train.steps=''", "type int, not str"),
    "optim.learning_rate=fast": ("optim.learning_rate='fast'", "type float, not str"),
    "model=3": ("model=3", "a section with fields, not int"),
    "data.sources=5": ("data.sources=5", "type mapping, not int"),
    "data.stages=5": ("data.stages=5", "type list, not int"),
}


@pytest.mark.parametrize("assignment", WRONG)
def test_a_wrong_value_gives_one_line_with_field_value_and_what_is_allowed(assignment):
    config, parts = tiny_config(), WRONG[assignment]
    if assignment == "mesh.expert=3":  # three checks of one kind, each shown alone
        _check_shards_one_by_one(parts)
        return
    with pytest.raises(ConfigError) as error:
        override(config, [assignment])
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def _check_shards_one_by_one(parts):
    *fields, allowed = parts
    base = {"hidden_size": 24, "q_lora_rank": 15, "kv_lora_rank": 21, "vocab_size": 45}
    base |= {"n_routed_experts": 9}

    def build(**sizes):
        rest = {"mesh": {"expert": 3}, "optim": {"balance": {}}, "train": {"global_batch": 12}}
        return tiny_config(model={**base, **sizes}, **rest)

    assert build().mesh.expert == 3
    for field in fields:
        with pytest.raises(ConfigError, match=f"{field}=26.*divisible by.*{allowed}"):
            build(**{field.removeprefix("model."): 26})
    with pytest.raises(ConfigError, match="n_routed_experts=8.*mesh.expert = 3"):
        build(n_routed_experts=8)


def test_a_batch_must_divide_by_mesh_and_accumulation_together():
    override(tiny_config(), ["mesh.data=2", "train.accumulate=8"])
    with pytest.raises(ConfigError, match=r"train.global_batch=16.* = 32"):
        override(tiny_config(), ["mesh.data=2", "mesh.fsdp=2", "train.accumulate=8"])


def test_overrides_are_parsed_by_the_field_s_type():
    config = override(
        tiny_config(),
        [
            "model.num_layers=5",
            "optim.learning_rate=1",
            "optim.pid.mu=2e-2",
            "train.remat=full",
            "data.tokenizer=17",
            "init_from=runs/a=b",
            "data.sources={'own': 'dir', 'python': 'installed-python'}",
            "data.sources.more=3=x",
            _stages(0, 9),
            YARN % (4.0, 16, "'mscale': 1"),
            "model.rope_scaling.mscale_all_dim=0.5",
        ],
    )
    assert config.model.num_layers == 5
    assert config.optim.learning_rate == 1.0 and type(config.optim.learning_rate) is float
    assert (config.optim.pid.mu, config.train.remat) == (0.02, "full")
    assert (config.data.tokenizer, config.init_from) == ("17", "runs/a=b")
    assert config.data.sources == {"own": "dir", "python": "installed-python", "more": "3=x"}
    assert [stage.from_step for stage in config.data.stages] == [0, 9]
    assert config.model.rope_scaling.mscale_all_dim == 0.5
    assert override(config, ["model.rope_scaling=None"]).model.rope_scaling is None
    assert config.train.steps == 50, "what is not named stays"


def test_missing_fields_without_default_are_named():
    mapping = to_mapping(tiny_config())
    del mapping["train"]["steps"]
    with pytest.raises(ConfigError, match="train.steps: missing"):
        from_mapping(mapping)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_in_configs_loads_and_survives_a_round_trip(path):
    config = load_config(path)
    assert from_mapping(to_mapping(config)) == config


def test_round_trip_keeps_optional_sections():
    rich = override(tiny_config(), [_stages(0, 3), YARN % (4.0, 16, ""), "proxy.hidden_size=6"])
    assert from_mapping(to_mapping(rich)) == rich
    assert rich != tiny_config()


def test_defaults_stay_the_released_recipe_s():
    optim = load_config("configs/flash_560b.py").optim
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.95, 1e-16)
    assert (optim.weight_decay, optim.clip_norm) == (0.1, 1.0)
    assert (optim.z_weight, optim.mtp_weight, optim.balance.alpha) == (1e-6, 0.1, 1e-3)
    assert (optim.pid.mu, optim.pid.mu_final, optim.pid.kp, optim.pid.kd) == (0.1, 0.01, 0, 0)


def test_differences_name_every_leaf_that_changed():
    old = tiny_config()
    new = override(old, ["optim.pid.mu=0.5", "train.steps=7"])
    assert differences(to_mapping(old), to_mapping(new)) == [
        "optim.pid.mu: 0.1 -> 0.5",
        "train.steps: 50 -> 7",
    ]
    assert differences(to_mapping(old), to_mapping(tiny_config())) == []


def test_proxy_ratio_is_of_the_matrix_own_fan_in():
    model = tiny_config().model
    assert ProxyConfig().ratio(model, "hidden_size") == 1
    proxy = ProxyConfig(hidden_size=6, q_lora_rank=14)
    assert proxy.ratio(model, "hidden_size") == 4
    assert proxy.ratio(model, "q_lora_rank") == 2
    assert proxy.ratio(model, "ffn_hidden_size") == 4, "widths not given count as scaled with it"


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().model.hidden_size = 3
